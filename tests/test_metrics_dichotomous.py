"""Against PySODMetrics, the reference by which papers are measured, to 1e-6."""

import functools
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from scipy import ndimage

import jaxpercept
from jaxpercept.errors import UserError
from jaxpercept.metrics import dichotomous as metrics
from jaxpercept.metrics.dichotomous import DichotomousProtocol
from jaxpercept.metrics.protocol import add

SOD = Path(jaxpercept.__file__).parents[1] / "../shared/data/sod"
TOLERANCE = 1e-6


@functools.cache
def oracle():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import py_sod_metrics
    return py_sod_metrics


def reference(pairs, hce=False):
    """PySODMetrics' results over pairs of uint8 predictions and truths."""
    pysod = oracle()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its F-measure says that it will be renamed
        f, e, w, s, mae = (
            getattr(pysod, name)()
            for name in ("Fmeasure", "Emeasure", "WeightedFmeasure", "Smeasure", "MAE")
        )
        effort = pysod.HumanCorrectionEffortMeasure()
        for pair in pairs:
            for measure in (f, e, w, s, mae, *([effort] if hce else [])):
                measure.step(*pair)
        fm, em = f.get_results()["fm"], e.get_results()["em"]
        result = {
            "max_f": fm["curve"].max(),
            "mean_f": fm["curve"].mean(),
            "adaptive_f": fm["adp"],
            "weighted_f": w.get_results()["wfm"],
            "s": s.get_results()["sm"],
            "max_e": em["curve"].max(),
            "mean_e": em["curve"].mean(),
            "adaptive_e": em["adp"],
            "mae": mae.get_results()["mae"],
        }
        return result | ({"hce": effort.get_results()["hce"]} if hce else {})


def record_of(truth):
    return {"mask": truth[..., None], "valid": np.ones((*truth.shape, 1), bool)}


def ours(pairs, definition="pysod", hce=False):
    protocol = DichotomousProtocol(definition, hce=hce)
    rows = [protocol.per_image(pred[..., None], record_of(truth)) for pred, truth in pairs]
    result = protocol.summarise(add(rows))
    assert tuple(result) == protocol.names
    return result


def blobs(rng, shape, scale=0.15):
    """A truth of smooth regions with thin parts, and an 8-bit prediction that errs as nets do."""
    noise = ndimage.gaussian_filter(rng.normal(size=shape), max(1, scale * min(shape)))
    mask = noise > np.quantile(noise, rng.uniform(0.3, 0.8))
    for _ in range(3):
        row, column = rng.integers(shape[0]), rng.integers(shape[1])
        mask[row, : column + 1] ^= True
    soft = ndimage.gaussian_filter(mask.astype(float), rng.uniform(0.5, 3))
    soft += 0.35 * ndimage.gaussian_filter(rng.normal(size=shape), 3) * 6
    return np.uint8(np.clip(soft, 0, 1) * 255), np.uint8(mask * 255)


def case(rng, name):
    shape = (37, 53)
    pred, truth = blobs(rng, shape)
    if name == "random":
        pred = rng.integers(0, 256, shape).astype(np.uint8)
        truth = rng.integers(0, 256, shape).astype(np.uint8)
    elif name == "narrow range":
        pred = 90 + pred // 8
    elif name.startswith("constant"):
        pred[:] = int(name.split()[1])
    elif name.startswith("truth"):
        truth[:] = {"empty": 0, "full": 255}[name.split()[1]]
    elif name == "perfect":
        pred = truth
    elif name == "inverted":
        pred = 255 - truth
    elif name == "binary prediction":
        pred = np.uint8(255 * (pred > 128))
    elif name == "one pixel":
        truth[:] = 0
        truth[11, 17] = 255
    elif name == "grey truth":  # 128 is background, 129 foreground
        truth = rng.choice([0, 128, 129, 255], shape).astype(np.uint8)
    return pred, truth


CASES = (
    *("random", "blobs", "narrow range", "constant 0", "constant 100", "constant 255"),
    *("truth empty", "truth full", "perfect", "inverted", "binary prediction", "one pixel"),
    *("grey truth",),
)


@pytest.mark.parametrize("name", CASES)
def test_equals_pysodmetrics(rng, name):
    pairs = [case(rng, name)]
    expected = reference(pairs, hce=True)
    assert ours(pairs, hce=True) == pytest.approx(expected, abs=TOLERANCE, rel=0)


def test_equals_pysodmetrics_over_a_dataset(rng):
    """Sizes differ; one truth is empty; the maxima are of the averaged curves."""
    pairs = [blobs(rng, shape) for shape in ((31, 47), (64, 64), (101, 75))]
    pairs.append(case(rng, "truth empty"))
    result = ours(pairs, hce=True)
    assert result == pytest.approx(reference(pairs, hce=True), abs=TOLERANCE, rel=0)
    single = [ours([pair])["max_f"] for pair in pairs]
    assert result["max_f"] < np.mean(single)


@settings(max_examples=300, deadline=None)
@given(st.data(), arrays.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=7))
def test_equals_pysodmetrics_on_tiny_masks(data, shape):
    few = st.sampled_from([0, 1, 60, 127, 128, 129, 200, 254, 255])
    pred, truth = (data.draw(arrays.arrays(np.uint8, shape, elements=few)) for _ in range(2))
    expected, result = reference([(pred, truth)], hce=True), ours([(pred, truth)], hce=True)
    if np.isnan(expected["s"]):  # the foreground's centroid is in the last row or column
        assert 0 <= result.pop("s") <= 1
        del expected["s"]
    assert result == pytest.approx(expected, abs=TOLERANCE, rel=0)


@pytest.mark.skipif(not SOD.is_dir(), reason="needs ../shared/data/sod")
def test_equals_pysodmetrics_on_real_masks(rng):
    names = sorted(path.stem for path in (SOD / "mask").iterdir())
    pairs = []
    for name in rng.choice(names, 4, replace=False):
        truth = np.array(Image.open(SOD / "mask" / f"{name}.png").convert("L"))
        grey = np.array(Image.open(SOD / "image" / f"{name}.jpg").convert("L"))
        pairs.append((np.uint8(0.3 * grey + 0.7 * ndimage.gaussian_filter(truth, 4)), truth))
    expected = reference(pairs, hce=True)
    assert ours(pairs, hce=True) == pytest.approx(expected, abs=TOLERANCE, rel=0)


def test_an_empty_quadrant_counts_as_nothing(rng):
    """Foreground in the last row only; the quadrants below do not exist."""
    pred, truth = blobs(rng, (20, 30))
    truth[:] = 0
    truth[-1, 5:16] = 255
    assert np.isnan(reference([(pred, truth)])["s"])
    pair = metrics.compare(pred, truth)
    soft, mask, column = pair.soft, pair.mask, 11
    objects = sum(
        len(x) / mask.size * 2 * x.mean() / (x.mean() ** 2 + 1 + x.std(ddof=1))
        for x in (soft[mask], 1 - soft[~mask])
    )
    regions = 0
    for part in (slice(0, column), slice(column, None)):
        p, g = soft[:, part].ravel(), mask[:, part].ravel().astype(float)
        (vp, cov), (_, vg) = np.cov(p, g)
        ssim = 4 * p.mean() * g.mean() * cov / ((p.mean() ** 2 + g.mean() ** 2) * (vp + vg))
        regions += ssim * p.size / mask.size
    expected = max(0, (objects + regions) / 2)
    assert metrics.s_measure(pair) == pytest.approx(expected, abs=1e-9)


def reference_isnet(pairs):
    """IS-Net's evaluation written out threshold by threshold."""
    curves, maes = [], []
    for pred, truth in pairs:
        p = pred.astype(float)
        p = (p - p.min()) / (p.max() - p.min()) * 255
        curve = []
        for threshold in range(255):
            found = p >= threshold
            hits = (found & (truth > 128)).sum()
            precision = hits / (found.sum() + 1e-4)
            recall = hits / ((truth > 128).sum() + 1e-4)
            f = 1.3 * precision * recall / (0.3 * precision + recall + 1e-4)
            curve.append((precision, recall, f))
        curves.append(curve)
        maes.append(np.abs(p - truth).sum() / (p.size * 255 + 1e-4))
    precision, recall, f = np.moveaxis(np.mean(curves, axis=0), 1, 0)
    return {
        "max_f": (1.3 * precision * recall / (0.3 * precision + recall + 1e-8)).max(),
        "max_mean_f": f.max(),
        "mae": np.mean(maes),
    }


def test_isnet_definition(rng):
    pairs = [blobs(rng, shape) for shape in ((31, 47), (64, 64), (101, 75))]
    # One sure and timid prediction and one that finds everything: averages of P and R, or of F?
    timid, bold = np.zeros((2, 40, 40), np.uint8)
    truth = np.zeros((40, 40), np.uint8)
    truth[10:20, 10:30], timid[12:14, 12:16], bold[1:] = 255, 255, 255
    pairs += [(timid, truth), (bold, truth)]
    result = ours(pairs, "isnet")
    assert result == pytest.approx(reference_isnet(pairs), abs=TOLERANCE, rel=0)
    assert result["max_f"] > result["max_mean_f"] + 0.01
    assert result["max_mean_f"] != pytest.approx(ours(pairs)["max_f"], abs=1e-8)


def test_isnet_counts_effort_above_128(rng):
    """Of the stretched prediction, in the 8 bits of IS-Net's files."""
    pred, truth = blobs(rng, (64, 64))
    pred = 140 + pred // 4
    low, high = int(pred.min()), int(pred.max())
    found = (pred.astype(int) - low) * 255 // (high - low) > 128
    expected = reference([(np.uint8(255 * found), truth)], hce=True)["hce"]
    assert ours([(pred, truth)], "isnet", hce=True)["hce"] == expected


def test_floats_and_bools_are_as_in_a_file(rng):
    pred, truth = blobs(rng, (40, 40))
    soft = pred.astype(np.float32) / 255
    for other in (truth > 128, (truth > 128).astype(np.float32)):
        assert ours([(soft, other)]) == ours([(pred, truth)])
    nudged = np.clip(soft + rng.uniform(-0.4, 0.4, soft.shape) / 255, 0, 1)
    assert ours([(nudged, truth)]) == ours([(pred, truth)])
    np.testing.assert_array_equal(metrics.to_uint8(np.array([[-1.0, 0.2, 3.0]])), [[0, 51, 255]])


def test_effort_needs_its_packages(rng, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    pred, truth = blobs(rng, (20, 20))
    with pytest.raises(UserError, match=r"pip install 'jaxpercept\[hce\]'"):
        DichotomousProtocol(hce=True).check(record_of(truth))
    ours([(pred, truth)])


def test_refusals_and_the_trivial_prediction(rng):
    _, truth = blobs(rng, (20, 30))
    protocol, record = DichotomousProtocol(), record_of(truth) | {"name": "bike.png"}
    trivial = protocol.trivial(record)
    assert trivial.shape == (20, 30, 1)
    assert np.count_nonzero(trivial == 1) == trivial.sum() == np.count_nonzero(truth)
    # In the middle, of the image's proportions.
    rows, columns = (np.flatnonzero(trivial[..., 0].any(axis=axis)) for axis in (1, 0))
    assert abs(rows.mean() - 9.5) <= 0.5
    assert abs(columns.mean() - 14.5) <= 0.5
    assert abs(len(columns) / len(rows) - 1.5) < 0.3
    record["valid"][3, 4] = False
    with pytest.raises(UserError, match=r"bike\.png has pixels without truth"):
        protocol.per_image(truth[..., None], record)
    with pytest.raises(UserError, match="definition 'dis' is unknown"):
        DichotomousProtocol("dis")
