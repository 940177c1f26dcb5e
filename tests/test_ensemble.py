"""Against diffusers' static methods, and the closed-form alignment against plain float64 NumPy.

diffusers' alignment amplifies rounding errors (see `ensemble_depth`). It is compared where it does
not: torch on one thread with correctly rounded square roots, which MKL's are not; or where the
search changes nothing.
"""

import functools
import itertools
import platform
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import torch
from diffusers import MarigoldDepthPipeline, MarigoldIntrinsicsPipeline, MarigoldNormalsPipeline
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpercept.errors import UserError
from jaxpercept.inference.ensemble import (
    ENSEMBLES,
    ensemble,
    ensemble_depth,
    ensemble_intrinsics,
    ensemble_normals,
    procrustes,
)
from jaxpercept.inference.ensemble_search import torch_sum

pytestmark = pytest.mark.usefixtures("one_thread")
on_x86 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="torch sums in another order there"
)
REDUCTIONS = ["median", "mean"]
# Rounding errors of 1e-7 in a cosine near 1, as fractions of π.
ANGLES = 3e-4
closed_form = functools.partial(ensemble_depth, alignment="closed_form")


@pytest.fixture(scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def exact_roots(monkeypatch):
    monkeypatch.setattr(
        torch.Tensor, "sqrt", lambda x: torch.from_numpy(np.asarray(np.sqrt(x.numpy())))
    )


def surface(rng, h, w):
    """Smooth with a few edges, in [0, 1]."""
    y, x = np.mgrid[0:h, 0:w] / np.reshape([h, w], (2, 1, 1))
    z = 0.6 * y
    for _ in range(4):
        a, b, phase = rng.uniform(-6, 6, 3)
        z = z + 0.2 * np.sin(a * x + b * y + phase)
        centre, radius = rng.random(2), rng.uniform(0.05, 0.25)
        z = z - 0.3 * rng.random() * (np.hypot(x - centre[0], y - centre[1]) < radius)
    return (z - z.min()) / np.ptp(z)


def members(rng, e=4, h=24, w=40, *, spread=0.1, outliers=1e-3, bad=False):
    """[1, e, h, w, 1] in [0, 1]: one surface, each with its scale, shift, errors and outliers.

    A bad member is another surface.
    """
    truth = surface(rng, h, w)
    maps = np.stack([truth + spread * (surface(rng, h, w) - 0.5) for _ in range(e)])
    scale, shift = rng.normal(0.9, spread, (e, 1, 1)), rng.normal(0.05, spread / 2, (e, 1, 1))
    maps = scale * maps + shift + rng.normal(0, spread / 5, maps.shape)
    maps = np.where(rng.random(maps.shape) < outliers, rng.random(maps.shape), maps)
    if bad:
        maps[-1] = surface(rng, h, w)
    return np.clip(maps, 0, 1).astype(np.float32)[None, ..., None]


def theirs(maps, **options):
    """diffusers' result for each image."""
    results = []
    for image in maps:
        x = torch.from_numpy(image.transpose(0, 3, 1, 2).copy())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            result = MarigoldDepthPipeline.ensemble_depth(x, output_uncertainty=True, **options)
        results.append([x.numpy().transpose(0, 2, 3, 1) for x in result])
    return [np.concatenate(parts) for parts in zip(*results, strict=True)]


def assert_close(ours, expected, atol):
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == np.float32
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=atol)


# ---- depth as diffusers --------------------------------------------------------------------------


@on_x86
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("e", [2, 3, 4, 10])
def test_search_equals_diffusers(rng, exact_roots, e, reduction):
    maps = np.concatenate([members(rng, e), members(rng, e, bad=True)])
    assert_close(ensemble_depth(maps, reduction=reduction), theirs(maps, reduction=reduction), 2e-6)


@pytest.fixture
def searches(monkeypatch):
    """SciPy's searches: (keyword arguments, result)."""
    done, minimize = [], scipy.optimize.minimize

    def recorded(*args, **kwargs):
        done.append((kwargs, minimize(*args, **kwargs)))
        return done[-1][1]

    monkeypatch.setattr(scipy.optimize, "minimize", recorded)
    return done


@on_x86
def test_search_options(rng, exact_roots, searches):
    options = {"regularizer_strength": 0.3, "max_iter": 4, "tol": 1e-2, "max_res": 33}
    changed = dict.fromkeys(("regularizer_strength", "max_res"), 0.0)
    for _ in range(4):  # a search may stay where it starts, whatever the options
        searches.clear()
        maps = members(rng, 4, 30, 50)
        ours = ensemble_depth(maps, **options)
        assert_close(ours, theirs(maps, **options), 2e-6)
        assert searches[0][0] == searches[1][0]
        assert searches[0][0]["options"]["maxiter"] == 4
        for name in changed:
            others = ensemble_depth(maps, **{k: v for k, v in options.items() if k != name})
            changed[name] = max(changed[name], np.abs(others[0] - ours[0]).max())
    assert min(changed.values()) > 1e-5


@on_x86
def test_sum_has_torchs_bits(rng):
    for size in (8, 31, 64, 1000, 12_345, 32_767, 70_001):
        x = rng.standard_normal(size, np.float32) ** 2
        assert float(torch_sum(x)) == torch.from_numpy(x).sum().item(), size


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_start_equals_diffusers(rng, reduction):
    maps = members(rng, 5, 30, 50)
    for options in ({"max_iter": 0}, {"max_iter": 0, "max_res": 20}, {"shift_invariant": False}):
        # Scales alone never move: see `ensemble_depth`.
        ours = ensemble_depth(maps, reduction=reduction, **options)
        assert_close(ours, theirs(maps, reduction=reduction, **options), 2e-6)


def test_mean_hides_the_search(rng):
    """Shifts, all that moves, change the mean by a constant: equal whatever the rounding."""
    maps = members(rng, 4)
    ours, expected = (f(maps, reduction="mean")[0] for f in (ensemble_depth, theirs))
    assert_close([ours], [expected], 2e-6)


@pytest.fixture
def optimised():
    """Compilers that contract products and sums, as they do by default."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.parametrize("shift_invariant", [True, False])
def test_constant_members(rng, optimised, shift_invariant):
    one = members(rng, 4, 25, 41)
    one[:, 2] = rng.uniform(0.1, 1)
    # Each scale is 1e6.
    different = np.full_like(one, 1) * rng.uniform(0.1, 1, (4, 1, 1, 1)).astype(np.float32)
    for maps in (one, different, np.zeros_like(one)):
        options = {"shift_invariant": shift_invariant, "max_iter": 0}
        assert_close(ensemble_depth(maps, **options), theirs(maps, **options), 2e-6)
        ours = closed_form(maps, shift_invariant=shift_invariant)
        assert all(np.isfinite(x).all() for x in ours)
    if shift_invariant:
        np.testing.assert_array_equal(ours_jitted(one)[0] > 0, [[True, True, False, True]])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_neither_invariance_only_merges(rng, reduction):
    maps = members(rng, 4) / 2
    ours = ensemble_depth(maps, scale_invariant=False, shift_invariant=False, reduction=reduction)
    assert_close(ours, ensemble_intrinsics(maps, reduction=reduction), 0)
    assert np.ptp(ours[0]) < 1


# ---- depth in closed form ------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="shift_invariant")
def ours_jitted(maps, shift_invariant=True):
    return procrustes(maps, shift_invariant=shift_invariant)


@pytest.mark.parametrize("shift_invariant", [True, False])
@pytest.mark.parametrize("e", [2, 5])
def test_procrustes_equals_numpy(rng, e, shift_invariant):
    maps = np.concatenate([members(rng, e), members(rng, e, spread=0.3)])
    scale, centre = ours_jitted(maps, shift_invariant=shift_invariant)
    for i, x in enumerate(maps.reshape(2, e, -1).astype(np.float64)):
        mean = x.mean(1) if shift_invariant else np.zeros(e)
        x = x - mean[:, None]
        spread = np.sqrt((x**2).mean(1))
        correlation = (x / spread[:, None]) @ (x / spread[:, None]).T / x.shape[1]
        weight = np.abs(np.linalg.eigh(correlation)[1][:, -1])
        np.testing.assert_allclose(scale[i], weight / weight.max() / spread, rtol=1e-5)
        np.testing.assert_allclose(centre[i], mean, atol=1e-6)
        aligned = (weight / spread)[:, None] * x

        def disagreement(s, x=x):
            y = s[:, None] * x
            pairs = itertools.combinations(y, 2)
            return sum(((a - b) ** 2).sum() for a, b in pairs) / (y**2).sum()

        least = disagreement(weight / spread)
        for _ in range(20):
            other = weight / spread * np.exp(rng.normal(0, 0.05, e))
            assert disagreement(other) >= least * (1 - 1e-9)
        expected = np.sort(aligned, axis=0)[(e - 1) // 2]
        expected = expected - expected.min() if shift_invariant else expected
        prediction = closed_form(maps[i : i + 1], shift_invariant=shift_invariant)[0]
        np.testing.assert_allclose(prediction.ravel(), expected / expected.max(), atol=1e-5)


def costs(aligned):
    """(raw, normalised) cost of aligned maps [e, pixels] merged by their lower median."""
    merged = np.sort(aligned, axis=0)[(len(aligned) - 1) // 2]
    pairs = sum(np.sqrt(((a - b) ** 2).mean()) for a, b in itertools.combinations(aligned, 2))
    raw = pairs + 0.02 * (abs(merged.min()) + abs(1 - merged.max()))
    return raw, pairs / np.ptp(merged)


@pytest.mark.parametrize("bad", [False, True])
def test_closed_form_agrees_better_than_diffusers(rng, searches, bad):
    """Lower cost, raw and normalised: on average, not always."""
    ratios = []
    for e, spread in itertools.product((3, 4, 6), (0.02, 0.1, 0.2)):
        maps = members(rng, e, spread=spread, bad=bad)
        pixels = maps.reshape(e, -1).astype(np.float64)
        theirs(maps)
        s, t = np.split(searches[-1][1].x, 2)
        raw, normalised = costs(s[:, None] * pixels + t[:, None])
        scale, centre = (np.asarray(x[0], np.float64)[:, None] for x in ours_jitted(maps))
        ours = costs(scale * (pixels - centre))[1]
        # Stretched so that the merged map spans [0, 1], ours has one cost.
        ratios.append((ours / raw, ours / normalised))
    ratios = np.array(ratios)
    assert (ratios.mean(axis=0) < 0.97).all(), ratios
    assert (ratios[:, 1] < 1.2).all(), ratios


@pytest.mark.parametrize("shift_invariant", [True, False])
def test_affine_changes_change_nothing(rng, shift_invariant):
    maps = members(rng, 5)
    shape = (1, 5, 1, 1, 1)
    scale = rng.uniform(0.2, 5, shape)
    shift = rng.uniform(-2, 2, shape) * shift_invariant
    changed = (scale * maps + shift).astype(np.float32)
    options = {"shift_invariant": shift_invariant}
    assert_close(closed_form(changed, **options), closed_form(maps, **options), 2e-5)


def test_small_errors_stay_small(rng):
    """Unlike diffusers', whose prediction moves by 1e-3 at least."""
    maps = members(rng, 4)
    noisy = (maps + rng.uniform(-1e-6, 1e-6, maps.shape)).astype(np.float32)
    assert_close(closed_form(noisy), closed_form(maps), 1e-5)


def test_never_upside_down(rng):
    maps = members(rng, 4)
    maps[:, 1] = 1 - maps[:, 1]
    scale, _ = ours_jitted(maps)
    assert (scale > 0).all()
    prediction, _ = closed_form(maps)
    assert np.corrcoef(prediction.ravel(), maps[0, 0].ravel())[0, 1] > 0.9
    opposed = np.concatenate([maps[:, :1], 1 - maps[:, :1]], axis=1)
    assert (ours_jitted(opposed)[0] > 0).all()


def test_equal_members_stay(rng):
    maps = members(rng, 1).repeat(4, axis=1)
    low, high = maps.min(), maps.max()
    prediction, uncertainty = closed_form(maps)
    np.testing.assert_allclose(prediction, (maps[:, 0] - low) / (high - low), atol=1e-6)
    np.testing.assert_allclose(uncertainty, 0, atol=1e-6)


# ---- normals and intrinsic images ----------------------------------------------------------------


def normals(rng, n=2, e=4, h=24, w=40, spread=0.3):
    """Unit normals, of which one is closest to the mean by more than rounding decides."""
    x = rng.standard_normal((n, 1, h, w, 3)) + spread * rng.standard_normal((n, e, h, w, 3))
    x = (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)
    mean = x.astype(np.float64).mean(1, keepdims=True)
    cosine = np.sort(
        (x * mean).sum(-1, keepdims=True) / np.linalg.norm(mean, axis=-1)[..., None], 1
    )
    tied = (cosine[:, -1:] - cosine[:, -2:-1] < 1e-6) & (e > 2)
    assert tied.mean() < 0.01
    away = np.eye(3, dtype=np.float32)[np.arange(e) % 3][:, None, None] * [1, 0.8, 0.6]
    away = (away + 0.5).astype(np.float32)
    return np.where(tied, away / np.linalg.norm(away, axis=-1, keepdims=True), x)


@pytest.mark.parametrize(
    ("e", "reduction"), [(2, "mean"), (5, "mean"), (3, "closest"), (5, "closest")]
)
def test_normals_equal_diffusers(rng, e, reduction):
    maps = normals(rng, e=e)
    ours = ensemble_normals(maps, reduction=reduction)
    expected = [
        MarigoldNormalsPipeline.ensemble_normals(
            torch.from_numpy(image.transpose(0, 3, 1, 2).copy()), True, reduction
        )
        for image in maps
    ]
    expected = [
        np.concatenate([y.permute(0, 2, 3, 1).numpy() for y in parts])
        for parts in zip(*expected, strict=True)
    ]
    assert_close(ours[:1], expected[:1], 1e-5)
    assert_close(ours[1:], expected[1:], ANGLES)
    # The arc cosine amplifies rounding where a member is very close to the mean.
    mean = maps.astype(np.float64).mean(1, keepdims=True)
    cosine = (maps * mean).sum(-1, keepdims=True) / np.linalg.norm(mean, axis=-1)[..., None]
    apart = (cosine < 1 - 1e-3).all(axis=1)
    assert apart.mean() > 0.3
    assert np.abs(ours[1] - expected[1])[apart].max() < 1e-5


def test_normals_of_no_length():
    prediction, uncertainty = ensemble_normals(jnp.zeros((1, 3, 2, 2, 3)), reduction="mean")
    np.testing.assert_array_equal(prediction, 0)
    np.testing.assert_allclose(uncertainty, 0.5, rtol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("e", [*range(2, 10), 17])
def test_intrinsics_equal_diffusers(rng, e, reduction):
    maps = rng.random((1, e, 9, 7, 6), np.float32)
    x = torch.from_numpy(maps[0].reshape(e, 9, 7, 2, 3).transpose(0, 3, 4, 1, 2).copy())
    expected = [
        y.permute(2, 3, 0, 1).reshape(1, 9, 7, 6).numpy()
        for y in MarigoldIntrinsicsPipeline.ensemble_intrinsics(x, True, reduction)
    ]
    ours = ensemble_intrinsics(maps, reduction=reduction)
    assert_close(ours, expected, 0 if reduction == "median" else 1e-6)


# ---- all -----------------------------------------------------------------------------------------

EVERY = [
    pytest.param(kind, options, id="-".join([kind, *map(str, options.values())]))
    for kind, options in (
        ("affine", {"alignment": "closed_form", "reduction": "median"}),
        ("affine", {"alignment": "closed_form", "reduction": "mean"}),
        ("affine", {"alignment": "diffusers", "max_iter": 0}),
        ("normals", {"reduction": "closest"}),
        ("average", {"reduction": "median"}),
    )
]


def inputs(rng, kind, n):
    if kind == "normals":
        return normals(rng, n=n)
    return np.concatenate([members(rng) for _ in range(n)])


def assert_same(kind, ours, expected):
    assert_close(ours[:1], expected[:1], 1e-5)
    assert_close(ours[1:], expected[1:], ANGLES if kind == "normals" else 1e-5)


@pytest.mark.parametrize(("kind", "options"), EVERY)
def test_order_of_members_and_images(rng, kind, options):
    maps = inputs(rng, kind, 3)
    expected = ensemble(kind, maps, **options)
    shuffled = maps[:, rng.permutation(maps.shape[1])]
    assert_same(kind, ensemble(kind, shuffled, **options), expected)
    turned = ensemble(kind, maps[::-1], **options)
    assert_same(kind, [x[::-1] for x in turned], expected)


@pytest.mark.parametrize(("kind", "options"), EVERY)
def test_sharding_changes_nothing(rng, kind, options):
    """Images over two devices, rows of pixels over four."""
    mesh = jax.make_mesh((2, 4), ("data", "rows"), axis_types=(AxisType.Auto,) * 2)
    maps = inputs(rng, kind, 4)
    sharded = jax.device_put(maps, NamedSharding(mesh, P("data", None, "rows")))
    ours = ensemble(kind, sharded, **options)
    assert len(ours[0].sharding.device_set) == 8
    assert not ours[0].is_fully_replicated
    assert_same(kind, ours, ensemble(kind, maps, **options))


@pytest.mark.parametrize(("kind", "options"), EVERY)
def test_traceable_but_for_the_search(rng, kind, options):
    maps = inputs(rng, kind, 3)
    function = jax.jit(functools.partial(ensemble, kind, **options))
    if options.get("alignment") == "diffusers":
        with pytest.raises(jax.errors.TracerArrayConversionError):
            function(maps)
    else:
        assert_same(kind, function(maps), ensemble(kind, maps, **options))


def test_half_precision_counts_as_float32(rng):
    maps = jnp.asarray(members(rng), jnp.bfloat16)
    for alignment in ("diffusers", "closed_form"):
        options = {"alignment": alignment, "max_iter": 0}
        expected = ensemble_depth(maps.astype(jnp.float32), **options)
        assert_close(ensemble_depth(maps, **options), expected, 1e-6)


def test_errors(rng):
    maps = members(rng, 3)
    for kind in ENSEMBLES:
        with pytest.raises(UserError, match="reduction 'sum' is unknown: use"):
            ensemble(kind, inputs(rng, kind, 1), reduction="sum")
        with pytest.raises(ValueError, match="at least two members, not 1"):
            ensemble(kind, inputs(rng, kind, 1)[:, :1])
    with pytest.raises(UserError, match="'disparity' is unknown: use affine, normals, average"):
        ensemble("disparity", maps)
    with pytest.raises(UserError, match="option 'max_iter' is unknown: use reduction"):
        ensemble("average", maps, max_iter=3)
    with pytest.raises(UserError, match="alignment 'bfgs' is unknown: use"):
        ensemble_depth(maps, alignment="bfgs")
    with pytest.raises(UserError, match="shifts alone: set scale_invariant"):
        ensemble_depth(maps, scale_invariant=False)
