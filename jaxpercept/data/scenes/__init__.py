"""Procedural indoor scenes with exact ground truth, the same on every machine.

`render(index)` draws a room from (seed, index), casts a camera's rays exactly, and shades the
picture with textures, lights, cast shadows and a camera model. The room is plain, with boxes,
balls, cylinders and cones on the floor, or furnished like real ones.

Conventions
- Pixel (row i, column j) looks along ((j + 0.5 - cx) / fx, (i + 0.5 - cy) / fy, 1) with x right,
  y down and z forward; `intrinsics` = (fx, fy, cx, cy) in pixels of this picture.
- depth is planar: the z coordinate in metres, not the distance along the ray.
- normals are unit vectors in camera coordinates, +x right, +y up, +z towards the viewer
  (Marigold's convention in diffusers).
- instance 0 is the room itself and its openings; instance k > 0 is one object.
- classes holds numbers into `CLASSES`.
- phrases are pairs of text and instance, each true of one thing that is to be seen; kinds are the
  classes of the instances from 1 on.

Subjects
A scene can be about one thing in its foreground; caption and phrases then name it first.
- "object": an intricate object; alpha is its mask, 0 or 1.
- "matte": hair, glass, smoke, gauze or an intricate object; alpha is its opacity, and the picture
  is alpha F + (1 - alpha) B. depth, normals, instance and classes are the subject's where alpha is
  at least a half. trimap is 0 (background), 128 (unknown) or 255 (foreground).
- "person": a person who stands, walks or sits. keypoints are COCO's 17 (`KEYPOINTS`; left is the
  person's own): x, y in pixels, the middle of the first pixel at 0.5, and 0 outside of the picture
  (x = y = 0), 1 hidden or 2 visible. box is (left, top, right, bottom) of what is seen of them.

Scenes of things alike
With `alike`, a plain room has several things of the same kinds and colours, and the phrases tell
them apart by size and place ("the red ball left of the tall box").
"""

from typing import NotRequired, TypedDict

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from jaxpercept.data.joints import KEYPOINTS
from jaxpercept.data.scenes.alike import AlikeRoom
from jaxpercept.data.scenes.builder import CLASSES
from jaxpercept.data.scenes.casting import cast, class_table, view_of
from jaxpercept.data.scenes.keypoints import bounding_box, project
from jaxpercept.data.scenes.language import caption, phrases, sights
from jaxpercept.data.scenes.layout import FurnishedRoom
from jaxpercept.data.scenes.matting import composite, trimap
from jaxpercept.data.scenes.palette import Draws
from jaxpercept.data.scenes.plain import PlainRoom
from jaxpercept.data.scenes.plan import Layout
from jaxpercept.data.scenes.raster import FACES, to_camera
from jaxpercept.data.scenes.relations import relations
from jaxpercept.data.scenes.shading import develop, expose, shade, surfels
from jaxpercept.data.scenes.staging import SUBJECTS, StagedFurnishedRoom, StagedPlainRoom
from jaxpercept.errors import UserError

__all__ = ["CLASSES", "KEYPOINTS", "SUBJECTS", "Scene", "SceneSource", "render"]


class Scene(TypedDict):
    """One rendered scene; arrays as in the module's conventions."""

    rgb: UInt8[np.ndarray, "h w 3"]
    depth: Float[np.ndarray, "h w 1"]
    valid: Bool[np.ndarray, "h w 1"]
    normals: Float[np.ndarray, "h w 3"]
    instance: Int[np.ndarray, "h w"]
    classes: Int[np.ndarray, "h w"]
    caption: str
    phrases: list[tuple[str, int]]
    kinds: tuple[str, ...]
    intrinsics: Float[np.ndarray, " 4"]
    index: int
    alpha: NotRequired[Float[np.ndarray, "h w 1"]]
    trimap: NotRequired[UInt8[np.ndarray, "h w 1"]]
    keypoints: NotRequired[Float[np.ndarray, "17 3"]]
    box: NotRequired[Float[np.ndarray, " 4"]]


def compose(
    draws: Draws, *, furnished: bool = False, subject: str = "", alike: bool = False
) -> Layout:
    """A whole scene before it is rendered, drawn from `draws`."""
    if alike:
        return AlikeRoom(draws).compose()
    if subject:
        staged = StagedFurnishedRoom if furnished else StagedPlainRoom
        return staged(draws, subject).compose()
    return (FurnishedRoom if furnished else PlainRoom)(draws).compose()


def _check_contents(furnished: bool, subject: str, alike: bool) -> None:
    if subject and subject not in SUBJECTS:
        raise UserError(
            f"scenes have no subject {subject!r}: use {', '.join(SUBJECTS)}, or '' for none."
        )
    if alike and (furnished or subject):
        raise UserError("scenes of things alike are plain: give neither furnished nor a subject.")


def render(
    index: int,
    *,
    height: int = 96,
    width: int = 128,
    seed: int = 0,
    furnished: bool = False,
    subject: str = "",
    alike: bool = False,
) -> Scene:
    """Scene `index` of the stream `seed`; the size changes the sampling, not the scene.

    Raises:
        UserError: for a negative index or seed, a picture smaller than 8 x 8, an unknown subject,
            or contents that exclude each other.
    """
    if index < 0 or seed < 0:
        raise UserError(f"scene index {index} and seed {seed} must not be negative.")
    if height < 8 or width < 8:
        raise UserError(f"scene size {height}x{width} is too small: use at least 8x8.")
    _check_contents(furnished, subject, alike)
    draws = Draws(seed, index)
    layout = compose(draws, furnished=furnished, subject=subject, alike=alike)
    parts = layout.builder.finish(1 + len(layout.recess_walls))
    view = view_of(layout.camera, height, width)
    solids = to_camera(parts.solids, view)
    truth: dict[str, np.ndarray] = {}
    with np.errstate(invalid="ignore"):  # rays that miss a quadric have no root
        if subject == "matte":
            matte = composite(layout, parts, solids, view, draws)
            s, rgb = matte.seen, matte.rgb
            truth = {"alpha": matte.alpha, "trimap": trimap(matte.alpha)}
        else:
            s = surfels(cast(parts, solids, view, layout), solids, parts.inward)
            radiance = shade(s, view, parts, solids, layout)
            rgb = develop(radiance, view, expose(radiance, draws))

    instance = np.repeat(parts.instance, FACES).take(s.face).reshape(height, width)
    depth = s.z.reshape(height, width, 1)
    normals = np.stack([s.nx, s.ny, -s.nz], axis=-1).reshape(height, width, 3)
    seen, main = sights(layout.builder.things, instance, depth), layout.subject
    if main:
        seen.sort(key=lambda sight: sight.id != main.instance)
        if subject == "object":
            truth = {"alpha": (instance == main.instance)[:, :, None].astype(np.float32)}
        elif subject == "person":
            truth = {
                "keypoints": project(main.joints, view, depth),
                "box": bounding_box(instance, main.instance),
            }
    return Scene(
        rgb=rgb,
        depth=depth,
        valid=np.ones((height, width, 1), bool),
        normals=normals,
        instance=instance,
        classes=class_table(parts, layout).take(s.face).reshape(height, width),
        caption=caption(layout.kind, seen, layout.wall_word, layout.floor_word, draws),
        phrases=relations(seen, instance, draws) if alike else phrases(seen),
        kinds=tuple(thing.kind for thing in layout.builder.things),
        intrinsics=np.array([*view.focal, *view.centre], np.float32),
        index=index,
        **truth,
    )


# So many scenes in which nothing can be named do not follow each other.
_LAPS = 32


class SceneSource:
    """Random access to scenes `start` ... `start + size - 1`, as Grain's sources want it.

    With `lap`, a scene in which no phrase names anything is replaced: by the first of those `lap`,
    twice `lap`, ... indices further that has phrases.
    """

    def __init__(
        self,
        seed: int = 0,
        size: int = 100_000,
        start: int = 0,
        *,
        height: int = 96,
        width: int = 128,
        furnished: bool = False,
        subject: str = "",
        alike: bool = False,
        lap: int = 0,
    ):
        if size < 1 or start < 0:
            raise UserError(f"scene source needs size >= 1 and start >= 0, not {size}, {start}.")
        _check_contents(furnished, subject, alike)
        self.size, self.start, self.lap = size, start, lap
        self.options = {
            "height": height, "width": width, "seed": seed, "furnished": furnished,
            "subject": subject, "alike": alike,
        }  # fmt: skip

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, record: int) -> Scene:
        if not 0 <= record < self.size:
            raise IndexError(f"scene {record} of a source of {self.size}")
        scene = render(self.start + record, **self.options)
        for lap in range(1, _LAPS if self.lap else 1):
            if scene["phrases"]:
                break
            scene = render(self.start + record + lap * self.lap, **self.options)
        return scene

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        return f"SceneSource(size={self.size}, start={self.start}, {options})"
