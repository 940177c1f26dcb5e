"""Pictures to try the page with: procedural scenes, rendered here."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8

from jaxpercept.data.rows.own import TEST_SCENES

SIZE = (240, 320)
"""(height, width) of the scenes."""
# Of the test scenes, and what to look for: each time there are others of its kind.
REFERRING = (
    (2, "the yellow cone"),
    (7, "the red cone"),
    (10, "the red cone on the right"),
    (20, "the yellow ball"),
    (15, "the box on the left"),
    (22, "the small box"),
)
FURNISHED = (0, 1, 2, 3, 4, 5)


@dataclasses.dataclass(frozen=True)
class Scene:
    """A picture whose things are known.

    Attributes:
        name: what the page calls it.
        rgb: the picture.
        instance: which thing each pixel shows, 0 for the room itself.
        phrases: pairs of text and instance, each true of that one only.
        phrase: what to look for.
    """

    name: str
    rgb: UInt8[np.ndarray, "h w 3"]
    instance: Int[np.ndarray, "h w"]
    phrases: Sequence[tuple[str, int]] = ()
    phrase: str = ""

    def thing(self, phrase: str) -> int:
        """Which thing a phrase of this scene names; 0 for any other phrase."""
        wanted = " ".join(phrase.lower().split())
        return dict(self.phrases).get(wanted, 0)

    def names(self, x: int, y: int) -> list[str]:
        """The phrases for what is at a pixel; none for the room, and for what none speaks of."""
        here = int(self.instance[y, x])
        return [text for text, thing in self.phrases if thing == here and here]


def referring_scenes() -> list[Scene]:
    """Scenes in which there are several things of a kind."""
    from jaxpercept.data.scenes import render  # only who renders scenes pays for the import

    scenes = []
    for number, (index, phrase) in enumerate(REFERRING, start=1):
        height, width = SIZE
        scene = render(TEST_SCENES[index], height=height, width=width, alike=True)
        found = {"instance": scene["instance"], "phrases": scene["phrases"], "phrase": phrase}
        scenes.append(Scene(f"scene_{number}", scene["rgb"], **found))
    return scenes


def furnished_scenes() -> list[Scene]:
    """Furnished rooms, for models that look for nothing."""
    from jaxpercept.data.scenes import render

    scenes = []
    for number, index in enumerate(FURNISHED, start=1):
        height, width = SIZE
        scene = render(TEST_SCENES[index], height=height, width=width, furnished=True)
        scenes.append(Scene(f"room_{number}", scene["rgb"], scene["instance"]))
    return scenes
