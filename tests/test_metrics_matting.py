"""Against the published definitions written out pixel by pixel: loops, padding, flood fill."""

import numpy as np
import pytest
from scipy import ndimage

from jaxpercept.errors import UserError
from jaxpercept.metrics import matting as metrics
from jaxpercept.metrics.matting import MattingProtocol
from jaxpercept.metrics.protocol import add

H, W = 23, 30


def mattes(rng, shape=(H, W)):
    """An alpha with solid and soft parts, a prediction near it, and a trimap around the edge."""
    alpha = ndimage.gaussian_filter((rng.random(shape) > 0.5).astype(float), 2.5)
    alpha = np.clip((alpha - alpha.mean()) * 6 + 0.5, 0, 1)
    pred = np.clip(alpha + 0.2 * ndimage.gaussian_filter(rng.normal(size=shape), 1), 0, 1)
    pred[pred > 0.97] = 1
    trimap = np.where(alpha > 0.95, 255, np.where(alpha < 0.05, 0, 128)).astype(np.uint8)
    # 8-bit, as files are: no value lies within rounding of a threshold.
    return *(np.round(255 * x) / 255 for x in (pred, alpha)), trimap


def filtered(image, kernel, pad_mode):
    """Correlation, one output pixel at a time."""
    r = len(kernel) // 2
    padded = np.pad(image, r, mode=pad_mode)
    out = np.empty_like(image)
    for i, j in np.ndindex(image.shape):
        out[i, j] = (padded[i : i + 2 * r + 1, j : j + 2 * r + 1] * kernel).sum()
    return out


def reference_grad_p3m(pred, alpha, sigma=1.4):
    """Σ(‖∇p‖ − ‖∇α‖)² / 10, Gaussians cut at 4 σ, mirrored at the border."""
    x = np.arange(-int(4 * sigma + 0.5), int(4 * sigma + 0.5) + 1)
    bell = np.exp(-(x**2) / (2 * sigma**2))
    bell /= bell.sum()
    kernel = np.outer(bell, x / sigma**2 * bell)
    size = [
        np.sqrt(sum(filtered(m, k, "symmetric") ** 2 for k in (kernel, kernel.T)))
        for m in (pred, alpha)
    ]
    return ((size[0] - size[1]) ** 2).sum() / 10


def reference_grad_gca(pred, alpha, region, sigma=1.4):
    """Σ(‖∇p‖ − ‖∇α‖)² / 1000 over the region, kernels 9 x 9 of unit norm, border repeated."""
    kernel = np.empty((9, 9))
    for i, j in np.ndindex(9, 9):
        y, x = i - 4, j - 4
        bell = np.exp(-(y**2) / (2 * sigma**2)) / (sigma * np.sqrt(2 * np.pi))
        slope = -x / sigma**2 * np.exp(-(x**2) / (2 * sigma**2)) / (sigma * np.sqrt(2 * np.pi))
        kernel[i, j] = bell * slope
    kernel /= np.sqrt((kernel**2).sum())
    size = [
        np.sqrt(sum(filtered(m, k, "edge") ** 2 for k in (kernel, kernel.T))) for m in (pred, alpha)
    ]
    return ((size[0] - size[1]) ** 2)[region].sum() / 1000


def largest_region(mask):
    """The pixels of the largest 4-connected region, by flood fill; the first of equals."""
    seen, best = np.zeros(mask.shape, bool), []
    for start in map(tuple, np.argwhere(mask)):
        if seen[start]:
            continue
        seen[start], todo, found = True, [start], []
        while todo:
            i, j = todo.pop()
            found.append((i, j))
            for n in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
                inside = 0 <= n[0] < mask.shape[0] and 0 <= n[1] < mask.shape[1]
                if inside and mask[n] and not seen[n]:
                    seen[n] = True
                    todo.append(n)
        if len(found) > len(best):
            best = found
    return set(best)


def reference_conn(pred, alpha):
    """|φ(p) − φ(α)| of every pixel."""
    levels = [round(0.1 * i, 1) for i in range(11)]
    regions = [largest_region((pred >= t) & (alpha >= t)) for t in levels]
    out = np.empty(alpha.shape)
    for place in np.ndindex(alpha.shape):
        level = 1.0
        for i in range(1, 11):
            if regions[i] and place not in regions[i]:
                level = levels[i - 1]
                break
        phi = []
        for value in (pred[place], alpha[place]):
            d = value - level
            phi.append(1 - (d if d >= 0.15 else 0))
        out[place] = abs(phi[0] - phi[1])
    return out


def reference_sums(pred, alpha, region):
    error = [abs(pred[i] - alpha[i]) for i in map(tuple, np.argwhere(region))]
    return sum(error), sum(e * e for e in error)


def test_whole_image_equals_p3m(rng):
    pred, alpha, _ = mattes(rng)
    sad, squares = reference_sums(pred, alpha, np.ones((H, W), bool))
    expected = {
        "sad": sad / 1000,
        "mse": squares / (H * W),
        "mad": sad / (H * W),
        "grad": reference_grad_p3m(pred, alpha),
        "conn": reference_conn(pred, alpha).sum() / 1000,
    }
    ours = metrics.whole_image_errors(pred, alpha)
    assert ours == pytest.approx(expected, rel=1e-9)
    assert min(ours.values()) > 0


def test_unknown_region_equals_composition_1k(rng):
    pred, alpha, trimap = mattes(rng)
    region = trimap == 128
    sad, squares = reference_sums(pred, alpha, region)
    expected = {
        "sad": sad / 1000,
        "mse": squares / region.sum(),
        "mad": sad / region.sum(),
        "grad": reference_grad_gca(pred, alpha, region),
        "conn": reference_conn(pred, alpha)[region].sum() / 1000,
    }
    assert metrics.unknown_region_errors(pred, alpha, trimap) == pytest.approx(expected, rel=1e-9)


def test_filled_equals_p3m_with_trimap(rng):
    """Errors of the truth against its own trimap count, and the sum is divided by the unknown."""
    pred, alpha, trimap = mattes(rng)
    filled = pred.copy()
    filled[trimap == 255], filled[trimap == 0] = 1, 0
    sad, squares = reference_sums(filled, alpha, np.ones((H, W), bool))
    unknown = (trimap == 128).sum()
    expected = {"sad": sad / 1000, "mse": squares / unknown, "mad": sad / unknown}
    assert metrics.filled_errors(pred, alpha, trimap) == pytest.approx(expected, rel=1e-9)


def test_a_trimap_without_128_is_unknown_between_its_ends():
    trimap = np.array([[0, 1, 127, 254, 255]], np.uint8)
    np.testing.assert_array_equal(metrics.unknown(trimap), [[0, 1, 1, 1, 0]])
    trimap[0, 1] = 128
    np.testing.assert_array_equal(metrics.unknown(trimap), [[0, 1, 0, 0, 0]])


@pytest.mark.parametrize("case", ["equal", "zeros", "ones", "half", "islands", "diagonal", "row"])
def test_connectivity_at_the_edges(rng, case):
    pred, alpha, _ = mattes(rng, (9, 11))
    if case == "equal":
        pred = alpha
    elif case in ("zeros", "ones", "half"):
        alpha = np.full_like(alpha, {"zeros": 0, "ones": 1, "half": 0.5}[case])
    elif case == "islands":  # equally large: the first stays
        alpha = np.zeros_like(alpha)
        alpha[1:4, 1:4] = alpha[5:8, 7:10] = 1
        pred = alpha * np.linspace(0.3, 1, 11)
    elif case == "diagonal":  # 8-connected, but not 4-connected
        alpha = np.eye(9, 11)
        alpha[8, 8:10] = 1
        pred = alpha * 0.8
    else:
        pred, alpha = pred[:1], alpha[:1]
    np.testing.assert_allclose(
        metrics.connectivity_error(pred, alpha), reference_conn(pred, alpha), atol=1e-12
    )
    if case == "equal":
        assert all(value == 0 for value in metrics.whole_image_errors(pred, alpha).values())


def test_cutting_a_matte_costs_and_fading_it_does_not():
    """Each of the cut's 20 pixels is wholly wrong; 0.9 for 1 is within the tolerance of 0.15."""
    alpha = np.zeros((20, 40))
    alpha[5:15, 5:35] = 1
    cut, faded = alpha.copy(), alpha.copy()
    cut[5:15, 24:26] = 0
    faded[5:15, 24:26] = 0.9
    conn = [metrics.whole_image_errors(pred, alpha)["conn"] for pred in (cut, faded)]
    assert conn == pytest.approx([0.02, 0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_8_bit_values_at_a_threshold_reach_it(dtype):
    """153 / 255 is 0.6 in either precision: the left half stays connected up to 0.6."""
    alpha = np.full((4, 8), 153 / 255)
    alpha[:, 4:] = 0.55
    alpha[0] = 1
    error = metrics.connectivity_error(*(x.astype(dtype) for x in (0 * alpha + 0.62, alpha)))
    np.testing.assert_allclose(error, reference_conn(0 * alpha + 0.62, alpha), atol=1e-6)


@pytest.mark.parametrize("variant", ["whole", "filled", "unknown"])
def test_protocol_averages_over_images(rng, variant):
    function = {
        "whole": lambda p, a, t: metrics.whole_image_errors(p, a),
        "filled": metrics.filled_errors,
        "unknown": metrics.unknown_region_errors,
    }[variant]
    protocol = MattingProtocol(variant)
    rows, expected = [], []
    for shape in ((H, W), (17, 40)):
        pred, alpha, trimap = mattes(rng, shape)
        record = {
            "alpha": alpha[..., None].astype(np.float32),
            "trimap": trimap[..., None],
            "valid": np.ones((*shape, 1), bool),
        }
        rows.append(protocol.per_image(pred[..., None].astype(np.float32), record))
        expected.append(function(pred, alpha, trimap))
    # Without an unknown pixel there is nothing to measure.
    known = record | {"trimap": np.zeros((*shape, 1), np.uint8)}
    rows += [] if variant == "whole" else [protocol.per_image(record["alpha"], known)]
    result = protocol.summarise(add(rows))
    assert tuple(result) == protocol.names
    means = {name: np.mean([one[name] for one in expected]) for name in protocol.names}
    assert result == pytest.approx(means, rel=1e-5)
    region = np.ones(shape, bool) if variant == "whole" else trimap == 128
    trivial = protocol.trivial(record)
    assert trivial.shape == (*shape, 1)
    np.testing.assert_allclose(trivial, alpha[region].mean(), rtol=1e-5)


def test_a_matte_with_holes_is_refused(rng):
    pred, alpha, _ = mattes(rng)
    record = {"alpha": alpha[..., None], "valid": np.ones((H, W, 1), bool), "name": "cat.png"}
    record["valid"][3, 4] = False
    with pytest.raises(UserError, match=r"cat\.png"):
        MattingProtocol().per_image(pred[..., None], record)
