"""Ground truth made worse on purpose."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpercept.data.augment import Augment
from jaxpercept.data.degrade import degrade_depth
from jaxpercept.data.transforms import prepare

SIZE = (24, 32)


def record(rng):
    depth = rng.uniform(1, 9, (*SIZE, 1)).astype(np.float32)
    valid = rng.random((*SIZE, 1)) < 0.8
    rgb = rng.integers(0, 256, (*SIZE, 3)).astype(np.uint8)
    return {"rgb": rgb, "depth": np.where(valid, depth, np.float32(0)), "valid": valid}


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), blur=st.floats(0, 4), error=st.floats(0, 0.5))
def test_valid_depth_stays_positive_and_the_rest_is_zero(seed, blur, error):
    before = record(np.random.default_rng(seed))
    after = degrade_depth(before, np.random.default_rng(seed), blur=blur, error=error)
    depth, valid = after["depth"], after["valid"]
    assert depth.dtype == np.float32
    np.testing.assert_array_equal(depth[~valid], 0)
    assert (depth[valid] > 0).all()
    if blur and not error:  # a mean of valid depths
        inside = before["depth"][valid]
        assert inside.min() * 0.999 <= depth[valid].min()
        assert depth[valid].max() <= inside.max() * 1.001
    np.testing.assert_array_equal(after["rgb"], before["rgb"])


def test_blur_is_a_mean_over_valid_neighbours(rng):
    depth = np.where(np.arange(32)[None, :, None] < 16, np.float32(2), np.float32(6))
    depth = np.broadcast_to(depth, (*SIZE, 1)).copy()
    valid = np.ones_like(depth, bool)
    valid[:, :16] = False
    step = {"depth": np.where(valid, depth, 0), "valid": valid}
    blurred = degrade_depth(step, rng, blur=2.0, error=0.0)["depth"]
    np.testing.assert_allclose(blurred[valid], 6, rtol=1e-5)  # the invalid half takes no part
    whole = {"depth": depth, "valid": np.ones_like(valid)}
    blurred = degrade_depth(whole, rng, blur=2.0, error=0.0)["depth"][0, :, 0]
    assert 2 < blurred[15] < blurred[16] < 6
    np.testing.assert_allclose(blurred[15] + blurred[16], 8, rtol=1e-5)


def test_errors_are_smooth_and_as_large_as_asked(rng):
    ones = {"depth": np.ones((96, 128, 1), np.float32), "valid": np.ones((96, 128, 1), bool)}
    logs = [np.log(degrade_depth(ones, rng, blur=0.0, error=0.2)["depth"]) for _ in range(40)]
    corners = np.stack([x[[0, 0, -1, -1], [0, -1, 0, -1]] for x in logs])
    assert 0.15 < corners.std() < 0.25
    assert np.abs(np.diff(logs[0], axis=1)).max() < 0.1


def test_only_the_truth_changes_and_only_if_asked(rng):
    example = record(rng)
    plain, worse, again = (
        prepare(example, np.random.default_rng(5), Augment(**options), SIZE)
        for options in ({}, {"depth_blur": 1.0, "depth_error": 0.1}, {})
    )
    np.testing.assert_array_equal(plain["rgb"], worse["rgb"])
    np.testing.assert_array_equal(plain["depth"], again["depth"])
    assert (plain["depth"] != worse["depth"])[plain["valid"]].mean() > 0.9
    # It is normalised by its own range: nobody who has poor truth knows the better one's.
    values = worse["depth"][worse["valid"]]
    np.testing.assert_allclose(worse["depth_range"], np.quantile(values, (0.02, 0.98)), rtol=1e-5)
    np.testing.assert_allclose(worse["disparity_range"][3], 1 / values.min(), rtol=1e-5)
