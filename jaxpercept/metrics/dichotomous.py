"""Masks of one object against its background: the measures of salient-object detection and DIS.

On the host, one image at a time. Two published definitions, which give different numbers:

- `pysod`: PySODMetrics (`py_sod_metrics/sod_metrics.py`), by which most papers are measured. A
  prediction is 8-bit and stretched to [0, 1] by its own minimum and maximum. F is averaged over
  images at each of 256 thresholds; its maximum and mean over thresholds are reported.
- `isnet`: the DIS paper's code (`basics.py`, `train_valid_inference_main.py`). A prediction is
  stretched likewise but not rounded; 255 thresholds; a 1e-4 in every denominator. Precision and
  recall are averaged over images and F is taken of the averages.

In both, F has β² = 0.3 and a truth above 128 of 255 is foreground. The measures are defined on
whole images, without a mask of valid pixels. Predictions and truths are [h, w], uint8 of 0..255,
bool, or float in [0, 1], which is multiplied by 255 and rounded as in a PNG.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from scipy import ndimage

from jaxpercept.errors import UserError
from jaxpercept.metrics.hce import human_correction_effort, import_tools
from jaxpercept.metrics.protocol import MetricProtocol, Record, Row, count_images

PYSOD_METRICS = (
    *("max_f", "mean_f", "adaptive_f", "weighted_f", "s"),
    *("max_e", "mean_e", "adaptive_e", "mae"),
)
ISNET_METRICS = ("max_f", "max_mean_f", "mae")

_BETA2 = 0.3
_EPS = np.spacing(1)
_ISNET_EPS = 1e-4


def to_uint8(image: Shaped[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w"]:
    """The image as it would stand in an 8-bit file."""
    if image.dtype == np.uint8:
        return image
    if image.dtype == bool:
        return image.astype(np.uint8) * 255
    return np.rint(np.clip(image, 0, 1) * 255.0).astype(np.uint8)


def to_mask(truth: Shaped[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Foreground: above 128 of 255."""
    return to_uint8(truth) > 128


class Comparison(NamedTuple):
    """A prediction and a truth as all `pysod` measures take them."""

    soft: Float[np.ndarray, "h w"]
    mask: Bool[np.ndarray, "h w"]
    hits: Int[np.ndarray, "256"]
    alarms: Int[np.ndarray, "256"]

    @property
    def positives(self) -> int:
        return int(np.count_nonzero(self.mask))


def compare(pred: Shaped[np.ndarray, "h w"], truth: Shaped[np.ndarray, "h w"]) -> Comparison:
    """The stretched prediction, and what each threshold finds.

    Returns:
      soft: (p − min p) / (max p − min p); p itself where that is constant.
      mask: the foreground.
      hits, alarms: how many pixels of the foreground and of the background have
        floor(255 · soft) >= 0, 1, ..., 255.
    """
    pred, mask = to_uint8(pred), to_mask(truth)
    levels = np.arange(256) / 255
    low, high = levels[pred.min()], levels[pred.max()]
    if high > low:
        levels = (levels - low) / (high - low)
    threshold = (np.clip(levels, 0, 1) * 255).astype(np.int64)

    def reached(values):
        counts = np.zeros(256, np.int64)
        np.add.at(counts, threshold, np.bincount(values, minlength=256))
        return counts[::-1].cumsum()[::-1]

    hits = reached(pred[mask])
    return Comparison(levels[pred], mask, hits, reached(pred.ravel()) - hits)


def f_curve(pair: Comparison) -> Float[np.ndarray, "256"]:
    """F = (1 + β²)PR / (β²P + R) at each threshold, 0 where it finds no foreground."""
    return _f(pair.hits, pair.hits + pair.alarms, pair.positives)


def e_curve(pair: Comparison) -> Float[np.ndarray, "256"]:
    """The E-measure of Fan et al. (IJCAI 2018) at each threshold."""
    return _alignment(pair.hits, pair.alarms, pair.positives, pair.mask.size)


def adaptive_measures(pair: Comparison) -> tuple[float, float]:
    """F and E at twice the prediction's mean, at most 1."""
    found = pair.soft >= min(2 * pair.soft.mean(), 1)
    hits = np.count_nonzero(found & pair.mask)
    count = np.count_nonzero(found)
    e = _alignment(hits, count - hits, pair.positives, pair.mask.size)
    return float(_f(hits, count, pair.positives)), float(e)


def mean_absolute_error(pair: Comparison) -> float:
    """mean |p − g|."""
    return float(np.abs(pair.soft - pair.mask).mean())


def _f(hits, found, positives):
    precision, recall = hits / np.maximum(found, 1), hits / max(positives, 1)
    below = _BETA2 * precision + recall
    return (1 + _BETA2) * precision * recall / np.where(below > 0, below, 1)


def _alignment(hits, alarms, positives: int, size: int):
    """Σ (1 + ξ)² / 4 / (N − 1) with ξ = 2ab / (a² + b²) of the deviations a, b from the means.

    They take one value in each cell of the 2 x 2 table of prediction and truth.
    """
    found = hits + alarms
    if positives == 0:
        total = size - found
    elif positives == size:
        total = found
    else:
        p, g = found / size, positives / size
        misses = positives - hits
        cells = (
            (hits, 1 - p, 1 - g),
            (alarms, 1 - p, -g),
            (misses, -p, 1 - g),
            (size - found - misses, -p, -g),
        )
        total = sum(n * (2 * a * b / (a**2 + b**2 + _EPS) + 1) ** 2 / 4 for n, a, b in cells)
    return total / (size - 1 + _EPS)


def weighted_f(pair: Comparison) -> float:
    """The weighted F-measure, β = 1, of Margolin et al. (CVPR 2014); 0 without foreground.

    Errors inside the object are smoothed (7 x 7 Gaussian, σ 5, zeros around the image; a background
    pixel has the error of the nearest foreground pixel) and count where the smoothed one is
    smaller; background errors weigh 2 − 0.5^(distance / 5).
    """
    soft, mask = pair.soft, pair.mask
    if not mask.any():
        return 0.0
    distance, (row, column) = ndimage.distance_transform_edt(~mask, return_indices=True)
    error = np.abs(soft - mask)
    window = np.exp(-(np.arange(-3, 4) ** 2) / (2 * 5**2))
    smooth = error[row, column]
    for axis in (0, 1):
        smooth = ndimage.correlate1d(smooth, window / window.sum(), axis, mode="constant")
    inside = np.minimum(error, smooth)[mask]
    outside = (error * (2 - np.exp(np.log(0.5) / 5 * distance)))[~mask].sum()
    hits = inside.size - inside.sum()
    recall, precision = 1 - inside.mean(), hits / (hits + outside + _EPS)
    return float(2 * recall * precision / (recall + precision + _EPS))


def s_measure(pair: Comparison) -> float:
    """The S-measure, α = 0.5, of Fan et al. (ICCV 2017).

    Half object and half region similarity. A truth without foreground gives 1 − mean p, one without
    background mean p. An empty quadrant counts as nothing, where PySODMetrics has NaN.
    """
    soft, mask = pair.soft, pair.mask
    share = pair.positives / mask.size
    if share == 0:
        return float(1 - soft.mean())
    if share == 1:
        return float(soft.mean())
    objects = share * _object(soft[mask]) + (1 - share) * _object(1 - soft[~mask])
    return float(max(0, (objects + _regions(soft, mask)) / 2))


def _object(x: Float[np.ndarray, " n"]) -> float:
    mean = x.mean()
    deviation = x.std(ddof=1) if x.size > 1 else 0
    return 2 * mean / (mean**2 + 1 + deviation + _EPS)


def _regions(soft: Float[np.ndarray, "h w"], mask: Bool[np.ndarray, "h w"]) -> float:
    """SSIM of the four quadrants around the foreground's centroid, weighted by their areas."""
    height, width = mask.shape
    rows, columns = mask.sum(axis=1), mask.sum(axis=0)
    y = int(np.round(rows @ np.arange(height) / rows.sum())) + 1
    x = int(np.round(columns @ np.arange(width) / columns.sum())) + 1
    score = 0.0
    for vertical in (slice(0, y), slice(y, height)):
        for horizontal in (slice(0, x), slice(x, width)):
            p, g = soft[vertical, horizontal], mask[vertical, horizontal]
            if p.size:
                score += _ssim(p, g) * p.size / mask.size
    return score


def _ssim(p: Float[np.ndarray, "h w"], g: Bool[np.ndarray, "h w"]) -> float:
    n = max(p.size - 1, 1)
    mean_p, mean_g = p.mean(), g.mean()
    deviation_p, deviation_g = p - mean_p, g - mean_g
    spread = ((deviation_p**2).sum() + (deviation_g**2).sum()) / n
    above = 4 * mean_p * mean_g * (deviation_p * deviation_g).sum() / n
    below = (mean_p**2 + mean_g**2) * spread
    if above != 0:
        return above / (below + _EPS)
    return float(below == 0)


def stretch(pred: Shaped[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    """The prediction from 0 to 255 by its minimum and maximum, not rounded."""
    p = 255.0 * pred if pred.dtype.kind == "f" else to_uint8(pred).astype(np.float64)
    low, high = p.min(), p.max()
    return 255 * ((p - low) / (high - low)) if high > low else p


def isnet_measures(
    pred: Shaped[np.ndarray, "h w"], truth: Shaped[np.ndarray, "h w"]
) -> dict[str, float | Float[np.ndarray, "255"]]:
    """IS-Net's precision, recall and F at its 255 thresholds 0..254, and its MAE.

    The two highest of 256 levels share a threshold. The MAE is to the truth's grey values. A
    constant prediction, for which IS-Net has NaN, is taken as it is.
    """
    p = stretch(pred)
    grey, mask = to_uint8(truth).astype(np.float64), to_mask(truth)
    bins = np.minimum(p, 254).astype(np.int64)

    def reached(values):
        return np.bincount(values, minlength=255)[::-1].cumsum()[::-1]

    hits, found = reached(bins[mask]), reached(bins.ravel())
    precision = hits / (found + _ISNET_EPS)
    recall = hits / (np.count_nonzero(mask) + _ISNET_EPS)
    above = (1 + _BETA2) * precision * recall
    return {
        "precision": precision,
        "recall": recall,
        "f": above / (_BETA2 * precision + recall + _ISNET_EPS),
        "mae": float(np.abs(p - grey).sum() / (255 * p.size + _ISNET_EPS)),
    }


def centred_ellipse(mask: Bool[np.ndarray, "h w"]) -> Float[np.ndarray, "h w 1"]:
    """1 inside an ellipse of the mask's area in the middle, of the image's proportions."""
    y, x = (np.abs((np.arange(n) + 0.5) / n - 0.5) for n in mask.shape)
    order = np.argsort((y[:, None] ** 2 + x**2).ravel(), kind="stable")
    ellipse = np.zeros(mask.size, np.float32)
    ellipse[order[: mask.sum()]] = 1
    return ellipse.reshape(*mask.shape, 1)


@dataclasses.dataclass(frozen=True)
class DichotomousProtocol(MetricProtocol):
    """Evaluation of masks [h, w, 1].

    A row's `max_f` and `max_e` are the image's own maxima. A dataset's are taken over thresholds
    after averaging over images, and are smaller.

    Attributes:
      definition: "pysod" (`PYSOD_METRICS`) or "isnet" (`ISNET_METRICS`: `max_f` of averaged
        precision and recall, `max_mean_f` of averaged F).
      hce: measure `hce` too, which is slow and needs the extra `hce`.
      field: the record's mask, [h, w, 1].
    """

    definition: str = "pysod"
    hce: bool = False
    field: str = "mask"

    def __post_init__(self):
        if self.definition not in ("pysod", "isnet"):
            raise UserError(f"the definition {self.definition!r} is unknown: use pysod or isnet.")

    @property
    def names(self) -> tuple[str, ...]:
        names = PYSOD_METRICS if self.definition == "pysod" else ISNET_METRICS
        return (*names, "hce") if self.hce else names

    @property
    def fields(self) -> tuple[str, ...]:
        return (self.field, "valid")

    def check(self, record: Record) -> None:
        """Raises UserError if a pixel is not valid, or HCE is wanted and cannot be computed."""
        if not np.all(record["valid"]):
            raise UserError(
                f"the mask of {record.get('name', 'an image')} has pixels without truth: these "
                "measures are of whole images only."
            )
        if self.hce:
            import_tools()

    def per_image(self, prediction: Shaped[np.ndarray, "h w 1"], record: Record) -> Row:
        self.check(record)
        pred, truth = np.asarray(prediction)[..., 0], np.asarray(record[self.field])[..., 0]
        if self.definition == "pysod":
            pair = compare(pred, truth)
            found = pair.soft > 0.5
            f, e = f_curve(pair), e_curve(pair)
            adaptive_f, adaptive_e = adaptive_measures(pair)
            row = {
                "max_f": float(f.max()),
                "mean_f": float(f.mean()),
                "adaptive_f": adaptive_f,
                "weighted_f": weighted_f(pair),
                "s": s_measure(pair),
                "max_e": float(e.max()),
                "mean_e": float(e.mean()),
                "adaptive_e": adaptive_e,
                "mae": mean_absolute_error(pair),
                "f_curve": f,
                "e_curve": e,
            }
        else:
            curves = isnet_measures(pred, truth)
            found = np.floor(stretch(pred)) > 128  # as of the 8-bit files that IS-Net writes
            best = float(curves["f"].max())
            row = {"max_f": best, "max_mean_f": best, **curves}
        if self.hce:
            row["hce"] = human_correction_effort(found, to_mask(truth))
        return row | {"images": 1}

    def trivial(self, record: Record) -> Float[np.ndarray, "h w 1"]:
        """An ellipse of the foreground's area in the middle, of the image's proportions.

        Salient objects tend to be there: harder to beat than any constant.
        """
        return centred_ellipse(to_mask(np.asarray(record[self.field])[..., 0]))

    def summarise(self, total: Row) -> dict[str, float]:
        images = count_images(total)
        result = super().summarise(total)
        if self.definition == "pysod":
            return result | {
                "max_f": float(total["f_curve"].max() / images),
                "max_e": float(total["e_curve"].max() / images),
            }
        precision, recall = total["precision"] / images, total["recall"] / images
        f = (1 + _BETA2) * precision * recall / (_BETA2 * precision + recall + 1e-8)
        return result | {
            "max_f": float(f.max()),
            "max_mean_f": float(total["f"].max() / images),
        }
