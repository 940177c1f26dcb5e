"""Real copies of data sets, where JAXPERCEPT_DATA names a folder that holds them."""

import logging
import os

import numpy as np
import pytest

from jaxpercept.data.datasets import DATASETS, open_dataset

data_root = os.environ.get("JAXPERCEPT_DATA", "")
needs_data = pytest.mark.skipif(not data_root, reason="JAXPERCEPT_DATA names no data folder")


@needs_data
@pytest.mark.parametrize(("split", "count"), [("train", 795), ("test", 654)])
def test_real_nyuv2_labels(rng, split, count, caplog):
    folder = f"{data_root}/nyuv2"
    with caplog.at_level(logging.WARNING):
        records = open_dataset(
            "nyuv2", data_dir=folder, split=split, targets=["depth", "classes"], evaluation=True
        )
    assert len(records) == count
    assert not caplog.messages
    seen = np.zeros(256, int)
    for index in rng.choice(count, 25, replace=False).tolist():
        record = records[index]
        seen += np.bincount(record["classes"].ravel(), minlength=256)
        assert (record["classes"][record["valid"]] < 40).all()
        assert not record["valid"][:22].any()  # the crop of depth evaluation
    wall, floor, ceiling = (
        DATASETS["nyuv2"].class_names.index(n) for n in ("wall", "floor", "ceiling")
    )
    assert seen[:40].argmax() == wall
    # Floors lie below, ceilings above.
    heights = {floor: [], ceiling: []}
    for index in range(0, count, count // 25):
        classes = records[index]["classes"][..., 0]
        for label, rows in heights.items():
            if (classes == label).sum() > 200:
                rows.append(np.nonzero(classes == label)[0].mean())
    assert np.mean(heights[floor]) > 150
    assert np.mean(heights[ceiling]) < 70


@needs_data
def test_real_camvid():
    for split, count in (("train", 367), ("val", 101), ("test", 233)):
        records = open_dataset(
            "camvid", data_dir=f"{data_root}/camvid", split=split, evaluation=True
        )
        assert len(records) == count == DATASETS["camvid"].expected[split]
    record = records[0]
    assert record["rgb"].shape == (180, 240, 3)
    sky, road = (DATASETS["camvid"].class_names.index(name) for name in ("sky", "road"))
    rows = {label: np.nonzero(record["classes"][..., 0] == label)[0] for label in (sky, road)}
    assert rows[sky].mean() < 60 < 120 < rows[road].mean()
    assert 0 < (record["classes"] == 255).sum() < record["classes"].size / 4


@needs_data
def test_real_masks_and_mattes():
    masks = open_dataset("masks", data_dir=f"{data_root}/sod")
    assert len(masks) == 200
    assert masks.targets == ("alpha",)
    assert set(np.unique(masks[0]["alpha"])) == {0.0, 1.0}
    mattes = open_dataset("alphamatting", data_dir=f"{data_root}/alphamatting")
    assert len(mattes) == 20
    for record in mattes:
        assert max(record["rgb"].shape) == 480
        sure = record["trimap"] != 128
        difference = np.abs(record["alpha"][sure] - record["trimap"][sure] / 255)
        assert (difference < 0.02).mean() > 0.999
        assert (record["alpha"] * (1 - record["alpha"])).max() > 0.2
