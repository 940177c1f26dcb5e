"""TFDS reads what is prepared, and what TFDS prepares is read and prepared: without TensorFlow."""

import json
import subprocess
import sys

import numpy as np
import pytest
import refcoco_copies
import tensorflow_datasets as tfds
from layout_cases import CASES, write_copy
from preparing import assert_same_records, folder_of

from jaxpercept.data.datasets import open_dataset
from jaxpercept.data.prepared import read_header
from jaxpercept.preparation.pipeline import prepare

# ---- what is prepared, read by TFDS --------------------------------------------------------------


def test_tfds_reads_depth(tmp_path, rng):
    folder_of(tmp_path / "raw", rng)
    folder = prepare("folder", tmp_path / "raw", tmp_path / "to", shard_size=3, name="mine")
    rows = tfds.data_source("mine", split="all", data_dir=tmp_path / "to")
    raw = open_dataset("folder", data_dir=tmp_path / "raw")
    assert len(rows) == len(raw) == 7
    for index in range(7):
        assert rows[index]["name"].decode() == raw[index]["name"]
        np.testing.assert_array_equal(rows[index]["depth"] / np.float32(1000), raw[index]["depth"])
        if raw[index]["name"] in "0246":  # decoders of JPEG differ by a grey value or two
            np.testing.assert_array_equal(rows[index]["rgb"], raw[index]["rgb"])
    builder = tfds.builder("mine", data_dir=tmp_path / "to")
    assert builder.info.metadata["row"]["depth_scale"] == 1000
    assert builder.info.metadata["fields"] == read_header(folder)["fields"]
    assert builder.info.splits["train"].shard_lengths == [3, 3, 1]


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("hypersim-train-normals-val", 1),
        ("camvid-test-classes-test", 1),
        ("p3m10k-np-alpha-P3M-10k", 255),
        ("scannet-test-depth-scene0568_00", 1000),
    ],
)
def test_tfds_builds_from_the_folder(tmp_path, rng, name, unit):
    case = next(case for case in CASES if str(case) == name)
    write_copy(tmp_path / "raw", case, rng)
    (target,) = case.targets
    folder = prepare(case.dataset, tmp_path / "raw", tmp_path / "to", splits=[case.split],
                     targets=case.targets)  # fmt: skip
    builder = tfds.builder_from_directory(folder)
    raw = open_dataset(case.dataset, split=case.split, data_dir=tmp_path / "raw", targets=[target])
    from_name = tfds.data_source(case.dataset, split=case.split, data_dir=tmp_path / "to")
    for rows in (builder.as_data_source(split=case.split), from_name):
        assert len(rows) == len(raw) == 3
        for row, record in zip(rows, raw, strict=True):
            assert row["name"].decode() == record["name"]
            np.testing.assert_array_equal(row["rgb"], record["rgb"])
            found = row[target] / np.float32(unit) if unit > 1 else row[target]
            np.testing.assert_array_equal(found, record[target])
    header = dict(builder.info.metadata)
    assert header == read_header(folder)
    if target == "classes":
        sky = header["class_names"].index("sky")
        assert header["palette"][sky] == [128, 128, 128]
        assert (row["classes"] == header["conventions"]["classes"]["void"]).any()


def test_tfds_reads_phrases(tmp_path, rng):
    (tmp_path / "raw").mkdir()
    refcoco_copies.write_refer(tmp_path / "raw", refcoco_copies.world(rng))
    folder = prepare("refcoco", tmp_path / "raw", tmp_path / "to")
    rows = tfds.builder_from_directory(folder).as_data_source(split="train")
    raw = open_dataset("refcoco", split="train", data_dir=tmp_path / "raw")
    assert len(rows) == len(raw) == 4
    for row, record in zip(rows, raw, strict=True):
        np.testing.assert_array_equal(row["instance"], record["instance"])
        texts = [text.decode() for text in row["phrases"]["text"]]
        assert [*zip(texts, row["phrases"]["instance"], strict=True)] == record["phrases"]
        assert tuple(kind.decode() for kind in row["kinds"]) == record["kinds"]


# ---- what TFDS prepares --------------------------------------------------------------------------


def write_nyu_depth(root, rng, counts, size=(480, 640)):
    """TFDS's `nyu_depth_v2`, prepared by TFDS itself, with the features of its own builder."""
    made = {
        split: [
            {
                "image": rng.integers(0, 256, (*size, 3), dtype=np.uint8),
                "depth": rng.uniform(0.5, 12, size).astype(np.float16),
            }
            for _ in range(count)
        ]
        for split, count in counts.items()
    }
    for examples in made.values():
        examples[0]["depth"][:2, :3] = 0

    class NyuDepthV2(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "nyu_depth_v2"
        VERSION = tfds.core.Version("0.0.1")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {
                        "image": tfds.features.Image(shape=(*size, 3)),
                        "depth": tfds.features.Tensor(shape=size, dtype=np.float16),
                    }
                ),
            )

        def _split_generators(self, manager):
            return {split: self._generate_examples(split) for split in made}

        def _generate_examples(self, split):
            for key, example in enumerate(made[split]):
                # TFDS leaves the encoding of arrays to TensorFlow.
                yield key, example | {"image": refcoco_copies.encoded(example["image"])}

    builder = NyuDepthV2(data_dir=str(root), file_format="array_record")
    builder.download_and_prepare()
    # TFDS shuffles by hashed keys.
    return {
        split: sorted(examples, key=lambda e: e["image"].tobytes())
        for split, examples in made.items()
    }


NYU = {"builder": "nyu_depth_v2", "min_depth": 1e-3, "max_depth": 10, "eval_crop": "nyu"}


def test_nyu_depth_of_tfds(tmp_path, rng):
    """Read, and prepared again: images, and depth of half precision in metres."""
    made = write_nyu_depth(tmp_path / "raw", rng, {"train": 2, "validation": 1})
    folder = prepare("tfds", tmp_path / "raw", tmp_path / "to", options=NYU, name="nyu")
    assert read_header(folder)["splits"]["train"]["source_sha256_of"] == "records"
    assert read_header(folder)["fields"]["depth"] == "float32"
    for split, examples in made.items():
        raw, prepared = (
            open_dataset("tfds", split=split, data_dir=data_dir, evaluation=True, **options)
            for data_dir, options in ((tmp_path / "raw", NYU), (folder, {}))
        )
        assert len(raw) == len(prepared) == len(examples)
        records = sorted((raw[i] for i in range(len(raw))), key=lambda r: r["rgb"].tobytes())
        again = sorted((prepared[i] for i in range(len(raw))), key=lambda r: r["rgb"].tobytes())
        inside = np.zeros((480, 640), bool)
        inside[45:471, 41:601] = True
        for record, other, example in zip(records, again, examples, strict=True):
            stored = example["depth"].astype(np.float64)
            metres = [[v if 1e-3 < v < 10 else 0.0 for v in row] for row in stored.tolist()]
            np.testing.assert_array_equal(record["rgb"], example["image"])
            np.testing.assert_array_equal(record["depth"][..., 0], np.float32(metres))
            np.testing.assert_array_equal(record["valid"][..., 0], inside & (np.array(metres) > 0))
            for key in ("name", "rgb", "depth", "valid"):
                np.testing.assert_array_equal(other[key], record[key])


def test_ref_coco_of_tfds_is_prepared(tmp_path, rng, monkeypatch):
    refcoco_copies.write_tfds(tmp_path / "raw", refcoco_copies.world(rng), monkeypatch)
    prepare("refcoco", tmp_path / "raw", tmp_path / "to", shard_size=2)
    for split in ("train", "val", "testA", "testB"):
        opened = {"split": split, "evaluation": split != "train"}
        raw = open_dataset("refcoco", data_dir=tmp_path / "raw", **opened)
        assert_same_records(open_dataset("refcoco", data_dir=tmp_path / "to", **opened), raw)


def test_nothing_needs_tensorflow(tmp_path, rng):
    write_nyu_depth(tmp_path / "raw", rng, {"train": 1})
    prepare("tfds", tmp_path / "raw", tmp_path / "to", splits=["train"], options=NYU)
    code = (
        "import sys, json\n"
        "from jaxpercept.data.datasets import open_dataset\n"
        f"options = {NYU!r}\n"
        f"folder = {str(tmp_path)!r}\n"
        "raw = open_dataset('tfds', split='train', data_dir=f'{folder}/raw', **options)\n"
        "to = open_dataset('tfds', split='train', data_dir=f'{folder}/to')\n"
        "print(json.dumps([float(raw[0]['depth'].sum()), float(to[0]['depth'].sum()),\n"
        "                  'tensorflow' in sys.modules]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    raw, prepared, tensorflow = json.loads(done.stdout)
    assert raw == prepared > 0
    assert not tensorflow
