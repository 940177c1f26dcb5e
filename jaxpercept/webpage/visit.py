"""What one visitor of the page does: a picture, a model, and rounds of prediction."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

import jaxpercept
from jaxpercept.errors import UserError
from jaxpercept.inference.correction import Round, Session
from jaxpercept.inference.outputs import legend, save_prediction
from jaxpercept.webpage.drawing import draw, marked, scale_of, value_at
from jaxpercept.webpage.examples import Scene
from jaxpercept.webpage.models import Model
from jaxpercept.webpage.uploads import Picture

_LONGEST = 200  # characters of a phrase
_MOST_ROUNDS = 20  # each keeps its map
_PREVIEWS = 6  # of a whole round at most; each costs a pass through the decoder


@dataclasses.dataclass(frozen=True)
class Shown:
    """What the page is to show.

    Attributes:
        message: a sentence.
        image: the prediction drawn; None leaves what is there.
        done: whether the round is.
        suggestion: for the box of the correction; None leaves what is there.
    """

    message: str
    image: UInt8[np.ndarray, "h w 3"] | None = None
    done: bool = False
    suggestion: str | None = None


class Visit:
    """What one tab of a browser has.

    Attributes:
        picture: what is predicted for, None at first.
        scene: where the picture is an example, what is known of it.
        session: rounds for one phrase (or none) of one picture, None before the first.
    """

    def __init__(self) -> None:
        self.picture: Picture | None = None
        self.scene: Scene | None = None
        self.session: Session | None = None
        self._model: Model | None = None
        self._seed = 0
        self._clicked: tuple[int, int] | None = None
        self._clicks: list[tuple[int, int] | None] = []  # before each round
        self._drawn: list[UInt8[np.ndarray, "h w 3"]] = []
        self._folder = Path(tempfile.mkdtemp(prefix="jaxpercept_"))

    def close(self) -> None:
        """Remove the files."""
        shutil.rmtree(self._folder, ignore_errors=True)

    # ---- pictures --------------------------------------------------------------------------------

    def show(self, picture: Picture) -> str:
        """Take another picture; returns a sentence on it."""
        self.picture, self.scene = picture, None
        self._forget()
        height, width = picture.rgb.shape[:2]
        notes = f" ({'; '.join(picture.notes)})" if picture.notes else ""
        return f"{picture.name}, {width} x {height} pixels{notes}."

    def show_scene(self, scene: Scene) -> None:
        """Take an example."""
        self.show(Picture(scene.rgb, scene.name))
        self.scene = scene

    def _forget(self) -> None:
        self.session, self._clicked, self._clicks, self._drawn = None, None, [], []

    # ---- rounds ----------------------------------------------------------------------------------

    def find(
        self,
        model: Model,
        prompt: str = "",
        *,
        num_steps: int | None = None,
        seed: int = 0,
        correction: float = 1.0,
    ) -> Iterator[Shown]:
        """Predict, from the beginning: the rounds before are forgotten.

        Args:
            model: one of the page's.
            prompt: what to look for, of a model that reads text.
            num_steps: None: the model's own.
            seed: of the noise.
            correction: how strongly corrections will push away.

        Raises:
            UserError: there is no picture, or no prompt where one is needed, or a long one.
        """
        if self.picture is None:
            raise UserError("There is no picture yet: drop one, or choose an example.")
        prompt = _checked(prompt) if model.reads_text else ""
        if model.reads_text and not prompt:
            raise UserError("Say what to look for, such as 'the chair on the left'.")
        session = model.session(
            self.picture.rgb, prompt, num_steps=num_steps, seed=seed, correction=correction
        )
        self._forget()
        self._model, self.session, self._seed = model, session, seed
        yield from self._round("")

    def correct(self, unwanted: str) -> Iterator[Shown]:
        """The next round: all corrections so far, and this one.

        Raises:
            UserError: there is nothing to correct, or nothing is said.
        """
        self._check_correctable()
        unwanted = _checked(unwanted)
        if not unwanted:
            raise UserError("Say what was marked and should not be, such as 'the box on the left'.")
        rounds = self.session.rounds
        if unwanted in rounds[-1].unwanted:
            raise UserError(f"'{unwanted}' is among the corrections: say something else.")
        if len(rounds) >= _MOST_ROUNDS:
            raise UserError(f"{_MOST_ROUNDS} rounds are kept: look for it anew.")
        yield from self._round(unwanted)

    def _check_correctable(self) -> None:
        if not self._drawn:
            raise UserError("There is nothing to correct yet: look for something first.")
        if not self._model.reads_text:
            raise UserError("This model reads no text: its predictions cannot be corrected.")

    def _round(self, unwanted: str) -> Iterator[Shown]:
        # A visitor may take another picture while this one is worked on.
        session, model, picture = self.session, self._model, self.picture
        yield Shown(f"Looking for '{session.prompt}' ..." if session.prompt else "Predicting ...")
        for glimpse in session.watch(unwanted):
            if glimpse.step == glimpse.steps:
                break
            every = math.ceil(glimpse.steps / _PREVIEWS)
            shown = None
            if glimpse.step % every == 0:
                shown = _draw(model, picture, glimpse.prediction())
            if self.session is not session:
                return
            if shown is not None:
                yield Shown(f"Step {glimpse.step} of {glimpse.steps} ...", shown)
        if self.session is not session:
            return
        done = session.rounds[-1]
        self._drawn.append(_draw(model, picture, done.prediction[None]))
        self._clicks.append(self._clicked)
        self._clicked = None
        yield Shown(_facts(done, model), self._drawn[-1], done=True)

    # ---- clicks ----------------------------------------------------------------------------------

    @property
    def scale(self) -> float:
        """By what the last prediction is enlarged on the page; 1 where there is none."""
        return scale_of(self._drawn[-1]) if self._drawn else 1.0

    def click(self, x: int, y: int) -> Shown:
        """A click on the prediction.

        A point is no text, and the model reads text. Of an example it is known what lies there, and
        its phrase is suggested; of other pictures the point is marked, and words are asked for.

        Args:
            x, y: pixel of the prediction as it is drawn, before it is enlarged; where several maps
                lie beside each other, of any of them.

        Raises:
            UserError: there is nothing to click on yet.
        """
        if not self._drawn:
            raise UserError("There is no prediction yet to click on.")
        height, width = self.picture.rgb.shape[:2]
        drawn, model = self._drawn[-1], self._model
        x, y = min(max(x, 0), drawn.shape[1] - 1), min(max(y, 0), height - 1)
        drawn, x = marked(drawn, x, y), x % width
        if not model.reads_text:
            kind = model.pipe.perception.task.kind
            value = value_at(kind, self.session.rounds[-1].prediction, x, y, _legend(model))
            return Shown(f"At ({x}, {y}): {value}.", drawn)
        self._clicked = (x, y)
        if self.scene is None:
            return Shown("What is there? Say it in words under 'It is not'.", drawn)
        names, prompt = self.scene.names(x, y), self.session.prompt
        if not names:
            return Shown("Nothing there has a name of its own: say it in words.", drawn)
        if (thing := self.scene.thing(prompt)) and thing == self.scene.thing(names[0]):
            return Shown(f"That is '{prompt}' itself: click on what it is not.", drawn)
        said = self.session.rounds[-1].unwanted
        left = [name for name in names if name not in said]
        if not left:
            return Shown("All names of what is there have been said: use other words.", drawn)
        return Shown(
            f"That is '{left[0]}': correct, or say it otherwise.", drawn, suggestion=left[0]
        )

    # ---- what is kept ----------------------------------------------------------------------------

    def gallery(self) -> list[tuple[UInt8[np.ndarray, "h w 3"], str]]:
        """The rounds' pictures with captions."""
        rounds = self.session.rounds if self.session else []
        return [
            (drawn, _caption(done, self._model))
            for drawn, done in zip(self._drawn, rounds, strict=True)
        ]

    def log(self) -> list[dict[str, Any]]:
        """What happened, a record for each round."""
        rounds = self.session.rounds if self.session else []
        records = []
        for done, click in zip(rounds, self._clicks, strict=True):
            facts = done.facts()
            if self._model.pipe.perception.task.kind not in ("mask", "alpha"):
                del facts["foreground"]
            records.append({**self._record(), **facts, "clicked": click})
        return records

    def _record(self) -> dict[str, Any]:
        pipe = self._model.pipe
        return {
            "source": self.picture.name,
            "checkpoint": pipe.checkpoint,
            "step": pipe.step,
            "task": pipe.perception.task.name,
            "seed": self._seed,
            "version": jaxpercept.__version__,
        }

    def files(self) -> tuple[Path, Path]:
        """Write all rounds, as `predict` writes predictions: a ZIP file with them, and the log."""
        stem = re.sub(r"[^\w.-]+", "_", Path(self.picture.name).stem).strip("._") or "picture"
        maps = self._folder / "maps"
        shutil.rmtree(maps, ignore_errors=True)
        log = self._folder / f"{stem}_rounds.jsonl"
        records = self.log()
        log.write_text("".join(json.dumps(record) + "\n" for record in records))
        kind, options = self._model.pipe.perception.task.kind, _legend(self._model)
        paths = [log]
        for done, record in zip(self.session.rounds, records, strict=True):
            record = {"num_inference_steps": done.steps, **record}
            name = f"{stem}_round{done.number}"
            paths += save_prediction(
                maps, name, kind, done.prediction, record, image=self.picture.rgb, **options
            )
        together = self._folder / f"{stem}_maps.zip"
        with zipfile.ZipFile(together, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in paths:
                archive.write(path, path.name)
        return together, log


def _checked(text: str) -> str:
    text = " ".join(text.split())
    if len(text) > _LONGEST:
        raise UserError(f"The text has {len(text)} characters: use at most {_LONGEST}.")
    return text


def _draw(
    model: Model, picture: Picture, prediction: Float[np.ndarray, "n h w c"]
) -> UInt8[np.ndarray, "h _ 3"]:
    joined = np.concatenate(list(prediction), axis=-1)
    return draw(model.pipe.perception.task.kind, joined, picture.rgb, _legend(model))


def _legend(model: Model) -> dict[str, Any]:
    targets = model.pipe.description.model_index.get("target_properties")
    return {"target_properties": targets, **legend(model.pipe.perception.task)}


def _facts(done: Round, model: Model) -> str:
    steps = f"{done.steps} step{'s' if done.steps > 1 else ''}"
    taken = f"Round {done.number}: {steps}, {done.seconds:.1f} s"
    if model.pipe.perception.task.kind not in ("mask", "alpha"):
        return f"{taken}."
    return f"{taken}, {done.facts()['foreground']:.1%} of the picture."


def _caption(done: Round, model: Model) -> str:
    said = done.prompt.capitalize()
    if done.unwanted:
        said += f", not {' and not '.join(done.unwanted)}"
    return f"{_facts(done, model)} {said}".strip()
