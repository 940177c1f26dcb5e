"""Matting errors on the host, per image: SAD, MSE, MAD, Grad and Conn in three published variants.

They differ in region and scale, so that their numbers cannot be compared with each other:

| variant | pixels | SAD | MSE, MAD | Grad | Conn |
|---|---|---|---|---|---|
| `whole` | all | / 1000 | mean | / 10 | / 1000 |
| `filled` | all; known ones set to 0 or 1 | / 1000 | sum / unknown pixels | | |
| `unknown` | unknown | / 1000 | mean | / 1000 | / 1000 |

`whole` and `filled` are P3M's (`core/evaluate.py`), `unknown` that of Composition-1k (DIM, GCA
`utils/evaluate.py`). Opacities are in [0, 1], shape [h, w], computed in float64. A trimap is 0
background, 128 unknown, 255 foreground.
"""

import dataclasses
import itertools

import numpy as np
from jaxtyping import Bool, Float, Num, Shaped
from scipy import ndimage

from jaxpercept.errors import UserError
from jaxpercept.metrics.protocol import MetricProtocol, Record, Row

VARIANTS = ("whole", "filled", "unknown")

_SIGMA = 1.4
# By division: 153 of 255 reaches 0.6 but not 6 * 0.1.
_THRESHOLDS = np.arange(11) / 10
# Differences to the level of connection smaller than this are forgiven.
_TOLERANCE = 0.15

Opacity = Num[np.ndarray, "h w"]


def whole_image_errors(pred: Opacity, alpha: Opacity) -> dict[str, float]:
    """P3M's sad, mse, mad, grad and conn over the whole image.

    Grad: Σ(‖∇p‖ − ‖∇α‖)² / 10, with scipy's first-order Gaussian derivatives, σ 1.4.
    """
    pred, alpha = _float64(pred, alpha)
    everywhere = np.ones(alpha.shape, bool)
    slope = _gradient_gaussian(pred) - _gradient_gaussian(alpha)
    return {
        **_differences(pred, alpha, everywhere, alpha.size),
        "grad": float((slope**2).sum() / 10),
        "conn": float(connectivity_error(pred, alpha).sum() / 1000),
    }


def filled_errors(
    pred: Opacity, alpha: Opacity, trimap: Num[np.ndarray, "h w"]
) -> dict[str, float]:
    """P3M's sad, mse and mad with the trimap's known pixels of the prediction set to 0 and 1."""
    pred, alpha = _float64(pred, alpha)
    pred = np.where(trimap == 255, 1.0, np.where(trimap == 0, 0.0, pred))
    return _differences(pred, alpha, np.ones(alpha.shape, bool), unknown(trimap).sum())


def unknown_region_errors(
    pred: Opacity, alpha: Opacity, trimap: Num[np.ndarray, "h w"]
) -> dict[str, float]:
    """Composition-1k's sad, mse, mad, grad and conn over the trimap's unknown pixels.

    Grad: Σ(‖∇p‖ − ‖∇α‖)² / 1000 with derivative kernels 9 x 9, σ 1.4, of unit Euclidean norm.
    Gradients and connected regions are those of the whole image; only the sums are restricted. By
    its authors, the published Python Grad is within 0.1 % of the MATLAB code that papers report,
    and its Conn, which may take the background for the largest region, about 5 % below; here it is
    never taken.
    """
    pred, alpha = _float64(pred, alpha)
    region = unknown(trimap)
    slope = _gradient_kernels(pred) - _gradient_kernels(alpha)
    return {
        **_differences(pred, alpha, region, region.sum()),
        "grad": float((slope**2)[region].sum() / 1000),
        "conn": float(connectivity_error(pred, alpha)[region].sum() / 1000),
    }


def unknown(trimap: Num[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Where the trimap is 128; if it is so nowhere, where it is neither 0 nor 255."""
    open_ = trimap == 128
    return open_ if open_.any() else (trimap != 0) & (trimap != 255)


def connectivity_error(
    pred: Float[np.ndarray, "h w"], alpha: Float[np.ndarray, "h w"]
) -> Float[np.ndarray, "h w"]:
    """|φ(p) − φ(α)| of each pixel, after Rhemann et al. (CVPR 2009).

    For τ = 0.1, 0.2, ..., 1, Ω is the largest 4-connected region of (p ≥ τ) ∧ (α ≥ τ), the first of
    equals. A pixel's level l is the τ before the first at which it is outside Ω, or 1 if it never
    is; an empty intersection changes no level. φ(x) = 1 − d·[d ≥ 0.15] with d = x − l.
    """
    level = np.ones(alpha.shape)
    undecided = np.ones(alpha.shape, bool)
    for before, threshold in itertools.pairwise(_THRESHOLDS):
        regions, count = ndimage.label((pred >= threshold) & (alpha >= threshold))
        if count == 0:
            continue
        largest = np.bincount(regions.ravel())[1:].argmax() + 1
        left = undecided & (regions != largest)
        level[left] = before
        undecided &= ~left

    def phi(x):
        d = x - level
        return 1 - d * (d >= _TOLERANCE)

    return np.abs(phi(pred) - phi(alpha))


def _differences(pred, alpha, region, pixels) -> dict[str, float]:
    error = np.abs(pred - alpha)[region]
    pixels = max(int(pixels), 1)
    return {
        "sad": float(error.sum() / 1000),
        "mse": float((error**2).sum() / pixels),
        "mad": float(error.sum() / pixels),
    }


def _float64(*maps: np.ndarray) -> list[np.ndarray]:
    return [x.astype(np.float64) for x in maps]


def _gradient_gaussian(x: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    return np.hypot(*(ndimage.gaussian_filter(x, _SIGMA, order=o) for o in ((1, 0), (0, 1))))


def _gradient_kernels(x: Float[np.ndarray, "h w"]) -> Float[np.ndarray, "h w"]:
    # The size at which a Gaussian of this width has fallen to 0.01.
    half = int(np.ceil(_SIGMA * np.sqrt(-2 * np.log(np.sqrt(2 * np.pi) * _SIGMA * 0.01))))
    at = np.arange(-half, half + 1)
    bell = np.exp(-(at**2) / (2 * _SIGMA**2))
    slope = -at * bell
    bell, slope = bell / np.linalg.norm(bell), slope / np.linalg.norm(slope)

    def along(axis):
        smooth = ndimage.convolve1d(x, bell, axis=1 - axis, mode="nearest")
        return ndimage.convolve1d(smooth, slope, axis=axis, mode="nearest")

    return np.hypot(along(0), along(1))


@dataclasses.dataclass(frozen=True)
class MattingProtocol(MetricProtocol):
    """Evaluation of alpha mattes [h, w, 1]; images without an unknown pixel are left out.

    Attributes:
      variant: "whole", "filled" or "unknown", as above.
      field: the record's alpha in [0, 1], [h, w, 1]. The last two also read its `trimap`, integers
        [h, w, 1].
    """

    variant: str = "whole"
    field: str = "alpha"

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise UserError(
                f"the matting variant {self.variant!r} is unknown: use {', '.join(VARIANTS)}."
            )

    @property
    def names(self) -> tuple[str, ...]:
        differences = ("sad", "mse", "mad")
        return differences if self.variant == "filled" else (*differences, "grad", "conn")

    @property
    def fields(self) -> tuple[str, ...]:
        trimap = () if self.variant == "whole" else ("trimap",)
        return (self.field, "valid", *trimap)

    def check(self, record: Record) -> None:
        """Raises UserError if a pixel is not valid: gradients and regions need whole images."""
        if not np.all(record["valid"]):
            raise UserError(
                f"the matte of {record.get('name', 'an image')} has pixels without truth: matting "
                "errors are of whole images only."
            )

    def per_image(self, prediction: Shaped[np.ndarray, "h w 1"], record: Record) -> Row:
        self.check(record)
        maps = (np.asarray(prediction)[..., 0], np.asarray(record[self.field])[..., 0])
        if self.variant == "whole":
            return whole_image_errors(*maps) | {"images": 1}
        trimap = np.asarray(record["trimap"])[..., 0]
        measure = filled_errors if self.variant == "filled" else unknown_region_errors
        if not unknown(trimap).any():
            return dict.fromkeys(self.names, 0.0) | {"images": 0}
        return measure(*maps, trimap) | {"images": 1}

    def trivial(self, record: Record) -> Float[np.ndarray, "h w 1"]:
        """The mean of alpha over what is measured, everywhere."""
        alpha = np.asarray(record[self.field], np.float32)
        region = np.ones(alpha.shape, bool)
        if self.variant != "whole" and unknown(record["trimap"][..., 0]).any():
            region = unknown(record["trimap"][..., 0])[..., None]
        return np.full_like(alpha, alpha[region].mean())
