"""Keypoints: places read off heat-maps, and PCK, the percentage of correct keypoints.

No published code of the methods here measures poses; heat-maps, their decoding and the evaluation
of one person per image are this package's design after common practice: the quarter-pixel shift of
Xiao et al. (Simple Baselines, ECCV 2018) and PCK of Yang and Ramanan (PAMI 2013). Places are (x, y)
in pixels, and the centre of the pixel in the top left corner is (0, 0).
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxpercept.errors import UserError
from jaxpercept.metrics.protocol import DeviceProtocol, Record, Row, count_images

REFINEMENTS = ("none", "quarter", "soft")


def locate_keypoints(
    heatmaps: Float[Array, "b h w k"],
    refinement: str = "quarter",
    *,
    radius: int = 5,
    sharpness: float = 10.0,
) -> tuple[Float[Array, "b k 2"], Float[Array, "b k"]]:
    """The place of each heat-map's maximum, refined below the pixel. Jittable.

    Args:
      heatmaps: one per keypoint, with a peak of about 1.
      refinement: "quarter": a quarter pixel from the maximum towards its higher neighbour, in x and
        in y; none where the neighbours are equal or the maximum lies on the border. "soft": the
        mean place of the pixels at most `radius` away in x and y, weighted by
        exp(sharpness · heat), a soft-argmax. "none": the maximum itself, the first of equals.

    Returns:
      (x, y) of each keypoint, and the heat at its maximum, which says how sure the map is.
    """
    if refinement not in REFINEMENTS:
        raise UserError(f"the refinement {refinement!r} is unknown: use {', '.join(REFINEMENTS)}.")
    b, height, width, k = heatmaps.shape
    maps = jnp.moveaxis(heatmaps.astype(jnp.float32), 3, 1)
    flat = maps.reshape(b, k, -1)
    best = flat.argmax(axis=2)
    row, column = best // width, best % width
    peak = jnp.take_along_axis(flat, best[..., None], axis=2)[..., 0]
    x, y = column.astype(jnp.float32), row.astype(jnp.float32)
    if refinement == "quarter":

        def heat(dy, dx):
            rows = jnp.clip(row + dy, 0, height - 1)
            columns = jnp.clip(column + dx, 0, width - 1)
            place = (rows * width + columns)[..., None]
            return jnp.take_along_axis(flat, place, axis=2)[..., 0]

        inside_x = (column > 0) & (column < width - 1)
        inside_y = (row > 0) & (row < height - 1)
        x += 0.25 * jnp.where(inside_x, jnp.sign(heat(0, 1) - heat(0, -1)), 0)
        y += 0.25 * jnp.where(inside_y, jnp.sign(heat(1, 0) - heat(-1, 0)), 0)
    elif refinement == "soft":
        rows = jnp.arange(height)[None, None, :, None]
        columns = jnp.arange(width)[None, None, None, :]
        near = (jnp.abs(rows - row[..., None, None]) <= radius) & (
            jnp.abs(columns - column[..., None, None]) <= radius
        )
        weights = jax.nn.softmax(
            jnp.where(near, sharpness * maps, -jnp.inf).reshape(b, k, -1), axis=2
        ).reshape(maps.shape)
        x = (weights * columns).sum(axis=(2, 3))
        y = (weights * rows).sum(axis=(2, 3))
    return jnp.stack([x, y], axis=-1), peak


def pck_counts(
    pred: Float[Array, "b k 2"],
    target: Float[Array, "b k 2"],
    visible: Bool[Array, "b k"],
    size: Float[Array, "b"],
    thresholds: tuple[float, ...],
) -> tuple[Int[Array, "b k t"], Int[Array, "b k"]]:
    """Which visible keypoints lie within threshold · size of the truth. Jittable.

    Args:
      size: length of the person in pixels, of `box_size` or `head_size`.
      thresholds: fractions of it; a keypoint exactly at the distance is right.

    Returns:
      right: 0 or 1 for each keypoint and threshold; 0 where not visible.
      counted: 0 or 1 for each keypoint: visible.
    """
    place = jnp.where(visible[..., None], target, 0).astype(jnp.float32)
    distance = jnp.linalg.norm(pred.astype(jnp.float32) - place, axis=-1)
    limit = size[:, None, None] * jnp.asarray(thresholds, jnp.float32)[None, None]
    right = (distance[..., None] <= limit) & visible[..., None]
    return right.astype(jnp.int32), visible.astype(jnp.int32)


def box_size(boxes: Float[Array, "b 4"]) -> Float[Array, "b"]:
    """max(height, width) of the person's box (left, top, right, bottom): the size for PCK."""
    return jnp.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])


def head_size(boxes: Float[Array, "b 4"]) -> Float[Array, "b"]:
    """0.6 of the diagonal of the head's box, the size for PCKh of Andriluka et al. (CVPR 2014)."""
    return 0.6 * jnp.hypot(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])


_SIZES = {"box": box_size, "head": head_size}


@dataclasses.dataclass(frozen=True)
class KeypointsProtocol(DeviceProtocol):
    """PCK of one person per image from heat-maps [h, w, k] at the size of the image.

    A dataset's PCK is the share of right keypoints among all visible ones, in per cent; a row's
    `pck@...` is that of its image. A record has `keypoints` float [k, 2], `visible` bool [k] and a
    box [4].

    Attributes:
      thresholds: fractions of the size of the box.
      size: "box" (`box_size` of the record's `box`) or "head" (`head_size` of its `head_box`).
      refinement: as in `locate_keypoints`.
      keypoint_names: if given, results have each keypoint's PCK as `pck@THRESHOLD/NAME` too.
    """

    thresholds: tuple[float, ...] = (0.05, 0.1, 0.2)
    size: str = "box"
    refinement: str = "quarter"
    keypoint_names: tuple[str, ...] | None = None

    def __post_init__(self):
        if self.size not in _SIZES:
            raise UserError(f"the size {self.size!r} is unknown: use {' or '.join(_SIZES)}.")

    @property
    def _titles(self) -> tuple[str, ...]:
        prefix = "pckh" if self.size == "head" else "pck"
        return tuple(f"{prefix}@{threshold:g}" for threshold in self.thresholds)

    @property
    def names(self) -> tuple[str, ...]:
        single = [f"{title}/{name}" for title in self._titles for name in self.keypoint_names or ()]
        return (*self._titles, *single)

    @property
    def _box(self) -> str:
        return "box" if self.size == "box" else "head_box"

    @property
    def fields(self) -> tuple[str, ...]:
        return ("keypoints", "visible", self._box)

    def check(self, record: Record) -> None:
        """Raises UserError if the box is empty."""
        left, top, right, bottom = np.asarray(record[self._box]).tolist()
        if not (right > left and bottom > top):
            raise UserError(
                f"the {self._box} of {record.get('name', 'an image')} is empty: "
                f"({left:g}, {top:g}, {right:g}, {bottom:g}) is to be left, top, right, bottom."
            )

    def batched(
        self, prediction: Shaped[Array, "b h w k"], batch: Mapping[str, Shaped[Array, "b ..."]]
    ) -> dict[str, Shaped[Array, "b ..."]]:
        places, _ = locate_keypoints(prediction, self.refinement)
        size = _SIZES[self.size](batch[self._box])
        right, counted = pck_counts(
            places, batch["keypoints"], batch["visible"], size, self.thresholds
        )
        share = 100 * right.sum(axis=1) / jnp.maximum(counted.sum(axis=1), 1)[:, None]
        return {
            **{title: share[:, i] for i, title in enumerate(self._titles)},
            "right": right,
            "counted": counted,
            "images": counted.any(axis=1).astype(jnp.int32),
        }

    def trivial(self, record: Record) -> Float[np.ndarray, "h w k"]:
        """One hot pixel for every keypoint, at the mean place of the image's visible ones."""
        height, width = record["rgb"].shape[:2]
        visible = np.asarray(record["visible"])
        if visible.any():
            x, y = np.asarray(record["keypoints"])[visible].mean(axis=0).round().astype(int)
        else:
            x, y = width // 2, height // 2
        heat = np.zeros((height, width, visible.size), np.float32)
        heat[np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)] = 1
        return heat

    def summarise(self, total: Row) -> dict[str, float]:
        count_images(total)
        right, counted = total["right"], total["counted"]  # [k, t] and [k]
        overall = 100 * right.sum(axis=0) / counted.sum()
        result = dict(zip(self._titles, overall.tolist(), strict=True))
        with np.errstate(invalid="ignore"):
            single = 100 * right / counted[:, None]
        for title, column in zip(self._titles, single.T, strict=True):
            for name, value in zip(self.keypoint_names or (), column.tolist(), strict=False):
                result[f"{title}/{name}"] = value
        return result
