"""Batches depend on seed and position alone: not on workers, hosts, interruptions or bad files."""

import itertools
import json
import logging
import os

import grain
import numpy as np
import pytest
from absl import flags
from PIL import Image

from jaxpercept.data.pipeline import DEPTH_FIELDS, TEXT_FIELDS, make_train_dataset
from jaxpercept.data.transforms import Augment
from jaxpercept.errors import UserError

AUGMENT = Augment(
    flip=0.5, scale=(0.3, 1.0), brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1, noise=3.0
)
RESOLUTION = (6, 8)


def write_dataset(folder, count, first=0, rng=None):
    """`count` files in the layout of the list datasets; the blue channel of file i is first + i."""
    for sub in ("rgb", "depth"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        rgb = np.full((12, 16, 3), first + i, np.uint8)
        depth = np.full((12, 16), 1000 + i, np.uint16)
        if rng is not None:
            rgb = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            depth = rng.integers(500, 9000, (12, 16), dtype=np.uint16)
        Image.fromarray(rgb).save(folder / "rgb" / f"{i}.png")
        Image.fromarray(depth).save(folder / "depth" / f"{i}.png")
        lines.append(f"rgb/{i}.png depth/{i}.png\n")
    for split in ("train", "test"):
        (folder / f"{split}.txt").write_text("".join(lines))
    return str(folder)


@pytest.fixture
def folder(tmp_path, rng):
    return write_dataset(tmp_path / "data", 7, rng=rng)


def make(folder, **changes):
    mixture = [("nyuv2", 1.0, {"data_dir": folder})]
    defaults = {"resolution": RESOLUTION, "batch_size": 4, "seed": 5, "augment": AUGMENT}
    return make_train_dataset(**({"mixture": mixture} | defaults | changes))


def take(dataset, count, state=None):
    """The next `count` batches and the state behind them; threads and workers are stopped."""
    iterator = iter(dataset)
    if state is not None:
        iterator.set_state(state)
    batches = list(itertools.islice(iterator, count))
    state = iterator.get_state()
    iterator.close()
    return batches, json.loads(json.dumps(state))


def assert_equal(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for field in batch:
            np.testing.assert_array_equal(batch[field], other[field], err_msg=field)


# ---- batches -------------------------------------------------------------------------------------


def test_batch_follows_the_contract(folder):
    (first, second), _ = take(make(folder), 2)
    assert set(first) == set(DEPTH_FIELDS)
    for field, shape, dtype in (
        ("rgb", (4, 6, 8, 3), np.uint8),
        ("depth", (4, 6, 8, 1), np.float32),
        ("valid", (4, 6, 8, 1), np.bool_),
        ("depth_range", (4, 2), np.float32),
        ("index", (4,), np.int32),
    ):
        assert first[field].shape == shape
        assert first[field].dtype == dtype
    np.testing.assert_array_equal(np.concatenate([first["index"], second["index"]]), range(8))


def test_every_epoch_shows_each_record_once_in_a_new_order(tmp_path):
    folder = write_dataset(tmp_path, 8)
    batches, _ = take(make(folder, augment={"flip": 0}), 6)
    seen = np.concatenate([batch["rgb"][:, 0, 0, 2] for batch in batches]).reshape(3, 8)
    for epoch in seen:
        np.testing.assert_array_equal(np.sort(epoch), range(8))
    assert (seen[0] != seen[1]).any()
    assert (seen[1] != seen[2]).any()


def test_the_seed_decides(folder):
    first, _ = take(make(folder), 3)
    assert_equal(first, take(make(folder), 3)[0])
    other, _ = take(make(folder, seed=6), 3)
    assert any((a["rgb"] != b["rgb"]).any() for a, b in zip(first, other, strict=True))


def test_the_same_record_is_augmented_anew_in_every_epoch(tmp_path, rng):
    folder = write_dataset(tmp_path, 1, rng=rng)
    batches, _ = take(make(folder, batch_size=1), 4)
    images = {batch["rgb"].tobytes() for batch in batches}
    assert len(images) == 4


# ---- workers, hosts, interruptions ---------------------------------------------------------------


def test_workers_and_resuming_do_not_change_the_stream(folder):
    expected, _ = take(make(folder), 8)
    _, state = take(make(folder), 3)
    assert state == {"next_example": 12}
    # Resuming crosses over: what 0 workers saved, 2 continue, and the other way round.
    two_workers, later = take(make(folder, num_workers=2), 3, state)
    assert_equal(two_workers, expected[3:6])
    assert_equal(take(make(folder), 2, later)[0], expected[6:])


def test_set_state_in_mid_stream(folder):
    expected, _ = take(make(folder), 6)
    iterator = iter(make(folder))
    for _ in range(4):
        next(iterator)
    iterator.set_state({"next_example": 8})
    assert_equal([next(iterator), next(iterator)], expected[2:4])
    assert iterator.get_state() == {"next_example": 16}
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


def test_union_of_processes_is_the_single_stream(folder):
    expected, _ = take(make(folder, batch_size=6), 4)
    shares = [
        take(make(folder, batch_size=6, process_index=i, process_count=3), 4)[0] for i in range(3)
    ]
    for single, *parts in zip(expected, *shares, strict=True):
        for field in single:
            joined = np.stack([part[field] for part in parts], axis=1)
            np.testing.assert_array_equal(joined.reshape(single[field].shape), single[field])


def test_resume_with_other_processes_and_batch_size(folder):
    expected, _ = take(make(folder, batch_size=4), 6)
    _, state = take(make(folder, batch_size=2, process_index=1, process_count=2), 4)
    assert state == {"next_example": 8}
    assert_equal(take(make(folder, batch_size=4), 2, state)[0], expected[2:4])
    with pytest.raises(UserError, match="stopped at example 8, which batch_size 6"):
        take(make(folder, batch_size=6), 1, state)


def test_grain_checkpoint_handler_takes_the_iterator(folder, tmp_path):
    expected, _ = take(make(folder), 4)
    handler = grain.checkpoint.CheckpointHandler()
    iterator = iter(make(folder))
    next(iterator), next(iterator)
    handler.save(grain_path(tmp_path), iterator)
    iterator.close()
    restored = handler.restore(grain_path(tmp_path), iter(make(folder)))
    assert_equal([next(restored), next(restored)], expected[2:])
    restored.close()


def grain_path(path):
    from etils import epath

    return epath.Path(path)


def test_workers_start_where_absl_flags_are_not_parsed(folder):
    flags.FLAGS.unparse_flags()
    try:
        batches, _ = take(make(folder, num_workers=1), 1)
    finally:
        flags.FLAGS(["pytest"])
    assert_equal(batches, take(make(folder), 1)[0])


# ---- mixtures ------------------------------------------------------------------------------------


def test_mixture_follows_its_weights(tmp_path):
    first = write_dataset(tmp_path / "a", 5)
    second = write_dataset(tmp_path / "b", 3, first=100)
    mixture = [("nyuv2", 3, {"data_dir": first}), ("folder", 1, {"data_dir": second})]
    batches, _ = take(make(None, mixture=mixture, augment={"flip": 0}), 10)
    blue = np.concatenate([batch["rgb"][:, 0, 0, 2] for batch in batches])
    assert (blue >= 100).sum() == 10
    assert set(blue[blue >= 100] - 100) == {0, 1, 2}
    np.testing.assert_array_equal(np.concatenate([b["index"] for b in batches]), range(40))


def tokenize(captions):
    return np.array([[len(c), *map(ord, c[-3:])] for c in captions], np.int64)


def test_captions_become_input_ids(tmp_path, rng):
    from test_data_sources import write_archive

    write_archive(tmp_path, rng, per_class=25)
    mixture = [("tiny_imagenet", 1.0, {"data_dir": str(tmp_path)})]
    dataset = make(None, mixture=mixture, fields=TEXT_FIELDS, tokenize=tokenize)
    (batch,), _ = take(dataset, 1)
    assert set(batch) == set(TEXT_FIELDS)
    assert batch["rgb"].shape == (4, *RESOLUTION, 3)
    assert batch["input_ids"].dtype == np.int32
    rows = {tuple(row) for row in batch["input_ids"].tolist()}
    names = ["a photo of a goldfish", "a photo of a tabby cat"]
    assert rows <= {tuple(row) for row in tokenize(names).tolist()}


# ---- bad records ---------------------------------------------------------------------------------


def break_records(folder):
    """Record 2 is truncated, record 5 has no depth at all."""
    path = f"{folder}/rgb/2.png"
    with open(path, "rb") as file:
        data = file.read()
    with open(path, "wb") as file:
        file.write(data[: len(data) // 2])
    Image.fromarray(np.zeros((12, 16), np.uint16)).save(f"{folder}/depth/5.png")


def test_training_replaces_bad_records_and_names_them_once(folder, caplog):
    break_records(folder)
    iterator = iter(make(folder, batch_size=7))
    with caplog.at_level(logging.WARNING, logger="absl"):
        batches = [next(iterator) for _ in range(3)]
    iterator.close()
    for name in ("rgb/2.png", "rgb/5.png"):
        assert iterator.skipped[name] == 3
        assert sum(f"Skipping {name}" in record.message for record in caplog.records) == 1
    for batch in batches:
        assert batch["valid"].any(axis=(1, 2, 3)).all()
    assert_equal(batches, take(make(folder, batch_size=7, num_workers=1), 3)[0])
    halves = [
        take(make(folder, batch_size=14, process_index=i, process_count=2), 1)[0][0]["rgb"]
        for i in range(2)
    ]
    union = np.stack(halves, 1).reshape(14, *RESOLUTION, 3)
    np.testing.assert_array_equal(union, np.concatenate([b["rgb"] for b in batches[:2]]))


def test_a_dataset_of_bad_records_is_a_user_error(folder):
    datasets = [make(folder, num_workers=num_workers) for num_workers in (0, 1)]
    for i in range(7):
        with open(f"{folder}/rgb/{i}.png", "wb"):
            pass
    message = r"None of 7 records .* nyuv2 .*rgb/\d\.png"
    for dataset in datasets:
        with pytest.raises(UserError, match=message):
            take(dataset, 1)
    with pytest.raises(UserError, match=message):
        make(folder)


# ---- wrong requests ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": (0, 8)}, "resolution must be positive"),
        ({"resolution": (6,)}, r"resolution must be \(height, width\)"),
        ({"batch_size": 0}, "batch_size must be a positive multiple"),
        ({"batch_size": 5, "process_count": 2}, "multiple of the 2 processes"),
        ({"mixture": []}, "names no dataset"),
        ({"fields": ("rgb", "flow")}, "Unknown batch field 'flow'"),
        ({"fields": TEXT_FIELDS}, "needs a tokenizer"),
        ({"fields": TEXT_FIELDS, "tokenize": tokenize}, "Dataset nyuv2 has no caption"),
        ({"augment": {"zoom": 2}}, r"Unknown key augment\.zoom"),
    ],
)
def test_wrong_requests_are_named(folder, changes, message):
    with pytest.raises(UserError, match=message):
        make(folder, **changes)


def test_weights_must_be_positive(folder):
    with pytest.raises(UserError, match="weight of dataset nyuv2 must be positive"):
        make(folder, mixture=[("nyuv2", 0.0, {"data_dir": folder})])


# ---- the real data, where this machine has it ----------------------------------------------------


@pytest.mark.skipif("JAXPERCEPT_DATA" not in os.environ, reason="no real data on this machine")
def test_real_images_make_batches():
    root = os.environ["JAXPERCEPT_DATA"]
    mixture = [
        ("nyuv2", 0.9, {"data_dir": f"{root}/nyuv2"}),
        ("folder", 0.1, {"data_dir": f"{root}/tum_cabinet"}),
    ]
    (batch,), _ = take(make(None, mixture=mixture, resolution=(96, 128), batch_size=20), 1)
    assert batch["valid"].mean() > 0.7
    near, far = batch["depth_range"].T
    assert (near > 0.2).all()
    assert (near < far).all()
    assert (far < 10).all()
