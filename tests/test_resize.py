import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from jaxpercept.resize import nearest_index, resize

CASES = [
    (method, antialias, align)
    for method in ("bilinear", "bicubic")
    for antialias, align in ((False, False), (True, False), (False, True))
] + [("nearest", False, False), ("nearest-exact", False, False), ("area", False, False)]


def torch_resize(x, size, method, antialias, align):
    kwargs = {"antialias": antialias, "align_corners": align} if method.startswith("bi") else {}
    y = F.interpolate(torch.from_numpy(x).permute(0, 3, 1, 2), size, mode=method, **kwargs)
    return y.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(("method", "antialias", "align"), CASES)
def test_equals_torch(rng, method, antialias, align):
    # Fixed sizes from the models and protocols, and arbitrary ones.
    sizes = [((8, 30), (15, 60)), ((96, 128), (480, 640)), ((7, 5), (1, 1))]
    sizes += [tuple(map(tuple, rng.integers(1, 90, (2, 2)).tolist())) for _ in range(2)]
    for (h, w), size in sizes:
        x = rng.uniform(-1, 1, (2, h, w, 3)).astype(np.float32)
        ours = resize(jnp.asarray(x), size, method, antialias=antialias, align_corners=align)
        theirs = torch_resize(x, size, method, antialias, align)
        np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=f"{(h, w)} -> {size}")


@pytest.mark.parametrize("method", ["nearest", "nearest-exact"])
def test_nearest_indices_equal_torch_for_every_size(method):
    for size_in in (1, 2, 3, 8, 29, 64, 480, 756, 4032):
        ramp = np.arange(size_in, dtype=np.float32)
        for size_out in (*range(1, 70), 127, 480, 600, 1024, 1333):
            theirs = F.interpolate(torch.from_numpy(ramp)[None, None], size_out, mode=method)
            np.testing.assert_array_equal(
                ramp[nearest_index(size_in, size_out, method)], theirs[0, 0]
            )


def test_nearest_keeps_any_dtype(rng):
    for x in (rng.random((1, 5, 7, 1)) < 0.5, rng.integers(0, 255, (1, 5, 7, 3), np.uint8)):
        y = resize(jnp.asarray(x), (10, 14), "nearest")
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(y, x.repeat(2, 1).repeat(2, 2))


def test_same_size_is_the_identity(rng):
    x = jnp.asarray(rng.normal(size=(1, 6, 9, 2)).astype(np.float32))
    for method, antialias, align in CASES:
        same = resize(x, (6, 9), method, antialias=antialias, align_corners=align)
        np.testing.assert_array_equal(same, x)


def test_bfloat16_is_resized_in_float32(rng):
    x = jnp.asarray(rng.normal(size=(1, 16, 16, 1)), jnp.bfloat16)
    y = resize(x, (8, 8), "area")
    assert y.dtype == jnp.bfloat16
    full = resize(x.astype(jnp.float32), (8, 8), "area")
    np.testing.assert_array_equal(y, full.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"method": "nearest", "antialias": True},
        {"method": "area", "align_corners": True},
        {"antialias": True, "align_corners": True},
    ],
)
def test_contradictory_options(kwargs):
    with pytest.raises(ValueError, match="resize"):
        resize(jnp.ones((1, 4, 4, 1)), (2, 2), **kwargs)
