"""Several predictions for one image become one, with an uncertainty.

Shapes are [n, e, h, w, c]: n images, e members each. The definitions are those of diffusers'
Marigold pipelines [`pipelines/marigold/pipeline_marigold_{depth,normals,intrinsics}.py`], one image
at a time there; a median of an even number of members is the lower of the middle two, as torch's.

Affine-invariant maps must be aligned before they are merged: member i becomes a_i = s_i·m_i + t_i.
diffusers minimises Σ_{i<j} RMS(a_i − a_j) + λ(|min R| + |1 − max R|), R the merged map, and then
stretches R to [0, 1]. So scale and shift common to all members do not show in the result, and the
cost alone has a minimum that is none: every a_i = 0 costs λ. What can be compared between results
is Σ_{i<j} RMS(a_i − a_j) / (max R − min R), below the *normalised cost*.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxpercept.errors import UserError
from jaxpercept.inference.ensemble_search import MIN_RANGE, search_alignment
from jaxpercept.inference.median import lower_median

Maps = Array | np.ndarray
_MIN_CORRELATION = 1e-3
# Below this relative spread a member is constant to float32 rounding.
_CONSTANT = 4 * float(np.finfo(np.float32).eps)
_POWER_ITERATIONS = 30


def ensemble(kind: str, maps: Float[Maps, "n e h w c"], **options: Any) -> tuple[Array, Array]:
    """`ENSEMBLES[kind](maps, **options)`: (prediction, uncertainty).

    Raises:
      UserError: unknown kind or option.
    """
    if kind not in ENSEMBLES:
        raise UserError(f"ensemble {kind!r} is unknown: use {', '.join(ENSEMBLES)}.")
    known = list(inspect.signature(ENSEMBLES[kind]).parameters)[1:]
    for name in options:
        if name not in known:
            raise UserError(f"ensembling option {name!r} is unknown: use {', '.join(known)}.")
    return ENSEMBLES[kind](maps, **options)


def ensemble_depth(
    maps: Float[Maps, "n e h w 1"],
    *,
    scale_invariant: bool = True,
    shift_invariant: bool = True,
    alignment: str = "diffusers",
    reduction: str = "median",
    regularizer_strength: float = 0.02,
    max_iter: int = 2,
    tol: float = 1e-3,
    max_res: int | None = 1024,
) -> tuple[Float[Array, "n h w 1"], Float[Array, "n h w 1"]]:
    """Aligns the members of depth or disparity ensembles and merges them.

    `alignment="diffusers"` searches as diffusers does, on the host: two steps of SciPy's BFGS with
    a numerical gradient. Its steps of 1.5e-8 are below float32's resolution: for maps in [0, 1] no
    scale ever moves, each member stays stretched to [0, 1], and the shifts follow rounding errors.
    Where its input changes by 1e-6, or torch's number of threads, diffusers' own prediction moves
    by 1e-3 (members nearly equal) to 0.3 (hardly alike), about as far as the whole search moves
    it; so this agrees with it no better. The cost has the bits of torch's on x86 (one thread, or
    fewer than 32,768 pixels) except for MKL's square root, which rounds 0.6 % of all values the
    other way.

    `alignment="closed_form"` needs neither search nor host, can be traced, and is as stable as its
    input: see `procrustes`. It does not minimise the normalised cost itself, but comes within 3 %
    of what long searches found, on average. For three to ten members and the median it was below
    diffusers' in 1249 of 1260 random ensembles, by 4 % (nearly equal members) to 33 % (one bad
    member) on average, and at most 8 % above; for two members in nine of ten. The cost that is not
    normalised is lower for diffusers more often, where its maps have shrunk. An affine change of a
    member changes nothing; constant members count as the mean. Only `reduction` and the invariances
    matter, the other options are the search's.

    Args:
      maps: e >= 2 members for each image, values usually in [0, 1].
      scale_invariant, shift_invariant: what differs between the members. Scale alone: t_i = 0, and
        the merged map is divided by its maximum. Neither: the members are merged as they are, in
        their own unit, as diffusers documents (it raises instead).
      alignment: "diffusers" or "closed_form".
      reduction: "median" or "mean" of the aligned members.
      regularizer_strength: λ.
      max_iter, tol: most BFGS steps, and the gradient's norm at which to stop.
      max_res: search on maps whose long side is at most this; None: on the maps as they are.

    Returns:
      The merged maps R in [0, 1], and their uncertainty in the same unit: the median of |a_i − R|,
      or for "mean" the standard deviation (of e − 1 degrees of freedom).

    Raises:
      UserError: shift invariance alone; an unknown alignment or reduction.
      ValueError: fewer than two members.
    """
    _check(maps, reduction, ("median", "mean"))
    if alignment not in ("diffusers", "closed_form"):
        raise UserError(f"alignment {alignment!r} is unknown: use diffusers or closed_form.")
    if shift_invariant and not scale_invariant:
        raise UserError("Maps cannot be aligned by shifts alone: set scale_invariant, too.")
    if not scale_invariant:
        return ensemble_intrinsics(maps, reduction=reduction)
    if alignment == "closed_form":
        return _merge_procrustes(maps, shift_invariant, reduction)
    parameters = [
        search_alignment(
            members[..., 0],
            shift_invariant=shift_invariant,
            reduction=reduction,
            regularizer_strength=regularizer_strength,
            max_iter=max_iter,
            tol=tol,
            max_res=max_res,
        )
        for members in np.asarray(maps, np.float32)
    ]
    scale, shift = (np.stack(values) for values in zip(*parameters, strict=True))
    # A program of its own: compiled with the sum, the product would not be rounded, as torch's is;
    # and a constant member has s = 1e6.
    scaled = jnp.asarray(maps, jnp.float32) * _per_member(scale)
    return _merge_shifted(scaled, shift, shift_invariant, reduction)


@functools.partial(jax.jit, static_argnames="reduction")
def ensemble_normals(
    maps: Float[Maps, "n e h w 3"], *, reduction: str = "closest"
) -> tuple[Float[Array, "n h w 3"], Float[Array, "n h w 1"]]:
    """Merges unit normals.

    Args:
      maps: e >= 2 members for each image.
      reduction: "closest", the member with the least angle to the normalised mean (the first such),
        pixel by pixel, or "mean", the normalised mean itself. Of two members both are equally
        close, and rounding decides.

    Returns:
      The merged normals, and the mean angle between members and mean, as a fraction of π.

    Raises:
      UserError: unknown reduction.
      ValueError: fewer than two members.
    """
    _check(maps, reduction, ("closest", "mean"))
    maps = maps.astype(jnp.float32)
    mean = maps.mean(axis=1)
    mean /= jnp.maximum(jnp.sqrt(_dot(mean, mean)), 1e-6)
    cosine = jnp.clip(_dot(mean[:, None], maps), -1, 1)
    uncertainty = jnp.arccos(cosine).mean(axis=1) / np.pi
    if reduction == "mean":
        return mean, uncertainty
    # Members in turns: gathering a member for each pixel is slow, and splits badly over devices.
    closest, highest = maps[:, 0], cosine[:, 0]
    for i in range(1, maps.shape[1]):
        closer = cosine[:, i] > highest
        closest = jnp.where(closer, maps[:, i], closest)
        highest = jnp.where(closer, cosine[:, i], highest)
    return closest, uncertainty


@functools.partial(jax.jit, static_argnames="reduction")
def ensemble_intrinsics(
    maps: Float[Maps, "n e h w c"], *, reduction: str = "median"
) -> tuple[Float[Array, "n h w c"], Float[Array, "n h w c"]]:
    """Merges maps as they are, pixel by pixel and channel by channel.

    Args:
      maps: e >= 2 members for each image.
      reduction: "median" or "mean".

    Returns:
      The merged maps R, and the median of |m_i − R|, or for "mean" the standard deviation (of e − 1
      degrees of freedom).

    Raises:
      UserError: unknown reduction.
      ValueError: fewer than two members.
    """
    _check(maps, reduction, ("median", "mean"))
    return _reduce(maps.astype(jnp.float32), reduction)


ENSEMBLES: dict[str, Callable[..., tuple[Array, Array]]] = {
    "affine": ensemble_depth,
    "normals": ensemble_normals,
    "average": ensemble_intrinsics,
}
"""How members become one, by a task's `merge`."""


def _check(maps: Maps, reduction: str, reductions: tuple[str, ...]) -> None:
    if maps.shape[1] < 2:
        raise ValueError(f"an ensemble has at least two members, not {maps.shape[1]}.")
    if reduction not in reductions:
        raise UserError(f"reduction {reduction!r} is unknown: use {' or '.join(reductions)}.")


# ---- merging, on the device ----------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("shift_invariant", "reduction"))
def _merge_procrustes(maps: Array, shift_invariant: bool, reduction: str) -> tuple[Array, Array]:
    scale, centre = procrustes(maps, shift_invariant=shift_invariant)
    # Not s·m + t: where a member's spread is small against its mean, float32 cannot hold t.
    aligned = _per_member(scale) * (maps.astype(jnp.float32) - _per_member(centre))
    return _normalise(*_reduce(aligned, reduction), shift_invariant)


@functools.partial(jax.jit, static_argnames=("shift_invariant", "reduction"))
def _merge_shifted(
    maps: Array, shift: Array, shift_invariant: bool, reduction: str
) -> tuple[Array, Array]:
    return _normalise(*_reduce(maps + _per_member(shift), reduction), shift_invariant)


def _dot(a: Array, b: Array) -> Array:
    # A sum over an axis of three is three times as slow on CPUs.
    return sum(a[..., i : i + 1] * b[..., i : i + 1] for i in range(3))


def _per_member(values: Maps) -> Maps:
    """[n, e] -> [n, e, 1, 1, 1]."""
    return values[:, :, None, None, None]


def _reduce(maps: Array, reduction: str) -> tuple[Array, Array]:
    if reduction == "mean":
        return maps.mean(axis=1), maps.std(axis=1, ddof=1)
    prediction = _median(maps)
    return prediction, _median(jnp.abs(maps - prediction[:, None]))


def _median(maps: Array) -> Array:
    members = [maps[:, i] for i in range(maps.shape[1])]
    return lower_median(members, jnp.minimum, jnp.maximum)


def _normalise(prediction: Array, uncertainty: Array, shift_invariant: bool) -> tuple[Array, Array]:
    """Stretches to [0, 1]; without shift invariance 0 stays 0."""
    axes = (1, 2, 3)
    low = prediction.min(axis=axes, keepdims=True) if shift_invariant else 0
    width = jnp.maximum(prediction.max(axis=axes, keepdims=True) - low, MIN_RANGE)
    return (prediction - low) / width, uncertainty / width


# ---- closed form ---------------------------------------------------------------------------------


def procrustes(
    maps: Float[Array, "n e h w 1"], *, shift_invariant: bool = True
) -> tuple[Float[Array, "n e"], Float[Array, "n e"]]:
    """Generalised Procrustes analysis: (scale, centre) of members that become s_i·(m_i − c_i).

    Among all scales with the same Σ_i ‖a_i‖² these have the least Σ_{i<j} ‖a_i − a_j‖²: centred on
    their means and divided by their standard deviations, the members are weighted by the leading
    eigenvector of their correlation matrix. Correlations below 1e-3 count as 1e-3, so that scales
    are positive: a member that agrees with none is flattened, never turned upside down.

    Up to a common factor. A constant member's scale is 0; without shift invariance centres are 0.
    """
    maps = maps.astype(jnp.float32)
    axes = (2, 3, 4)
    centre = jnp.zeros(maps.shape[:2])
    if shift_invariant:
        centre = maps.mean(axis=axes)
        # Once more, for the digits that a sum over many pixels loses.
        centre += (maps - _per_member(centre)).mean(axis=axes)
    deviation = maps - _per_member(centre)
    variance = (deviation**2).mean(axis=axes)
    constant = variance <= _CONSTANT**2 * (maps**2).mean(axis=axes)
    inverse = jnp.where(constant, 0, jax.lax.rsqrt(jnp.where(constant, 1, variance)))
    unit = _per_member(inverse) * deviation
    correlation = jnp.einsum("nehwc,nfhwc->nef", unit, unit, precision=jax.lax.Precision.HIGHEST)
    correlation = jnp.maximum(correlation / np.prod(maps.shape[2:]), _MIN_CORRELATION)
    # Power iteration from equal weights: all entries are positive, and so the weights stay.
    weight = jnp.ones_like(centre)
    for _ in range(_POWER_ITERATIONS):
        weight = jnp.einsum("nef,nf->ne", correlation, weight, precision=jax.lax.Precision.HIGHEST)
        weight /= weight.max(axis=1, keepdims=True)
    return weight * inverse, centre
