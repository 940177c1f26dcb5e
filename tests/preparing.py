"""What tests of prepared datasets share: a folder to prepare, and records that are the same."""

import numpy as np
from PIL import Image


def assert_same(found, expected):
    assert set(found) == set(expected)
    for key, value in expected.items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(found[key], value, strict=True, err_msg=key)
        else:
            assert found[key] == value, key


def assert_same_records(found, expected):
    assert len(found) == len(expected)
    assert found.names_sha256() == expected.names_sha256()
    for index in range(len(expected)):
        assert_same(found[index], expected[index])


def folder_of(root, rng, count=7, size=(12, 16)):
    """Images with depth of one's own; JPEG and PNG."""
    for name in ("rgb", "depth"):
        (root / name).mkdir(parents=True)
    for number in range(count):
        rgb = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(rgb).save(root / f"rgb/{number}.{'jpg' if number % 2 else 'png'}")
        depth = rng.integers(500, 9000, size).astype(np.uint16)
        Image.fromarray(depth).save(root / f"depth/{number}.png")
    return root
