"""Miniature copies of RefCOCO: the same objects and sentences in every layout it is found in."""

import io
import json
import pickle
import pickletools
import warnings

import numpy as np
import pytest
from PIL import Image

coco = pytest.importorskip("pycocotools.mask")
CATEGORIES = {1: "person", 17: "cat", 44: "bottle"}
UNC = ("train", "val", "testA", "testB")
SPLITS = {"refcoco": UNC, "refcoco+": UNC, "refcocog": ("train", "val", "test")}


def file_name(image):
    return f"COCO_train2014_{image:012}.jpg"


def polygon(rng, size):
    """A triangle somewhere in the image, well seen."""
    height, width = size
    corners = np.array([[0.1, 0.2], [0.9, 0.3], [0.4, 0.9]]) * rng.uniform(0.5, 0.9)
    corners += rng.uniform(0, 0.1, 2)
    return (corners * (width, height)).round(2).ravel().tolist()


def run_lengths(rng, size, compressed):
    """Of a rectangle with a hole."""
    mask = np.zeros(size, np.uint8)
    top, left = rng.integers(2, 8, 2)
    mask[top : top + 20, left : left + 25] = 1
    mask[top + 5 : top + 9, left + 5 : left + 9] = 0
    if compressed:
        found = coco.encode(np.asfortranarray(mask))
        return {"size": list(size), "counts": found["counts"].decode()}
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    return {"size": list(size), "counts": [0, *runs] if flat[0] else runs}


def world(rng):
    """Images, annotations of every kind of mask, and who refers to them in which split.

    Image 581857 has three objects in the training split, 11 two in val, 222 one in each of the test
    splits, 3333 one in train and one in val (as splits by objects have it).
    """
    sizes = {581857: (40, 60), 11: (52, 44), 222: (48, 64), 3333: (45, 45)}
    images = {
        number: {"id": number, "file_name": file_name(number), "height": h, "width": w}
        for number, (h, w) in sizes.items()
    }
    annotations, refs = {}, []
    plan = [
        (581857, 1, "train", "polygon", ["the lady", " lady in blue ", "left woman"]),
        (581857, 17, "train", "polygons", ["cat on the left"]),
        (581857, 1, "train", "runs", ["right man", "the man"]),
        (11, 44, "val", "compressed", ["bottle", "the RIGHT bottle"]),
        (11, 17, "val", "polygon", ["a cat", "the cat", "cat"]),
        (222, 1, "testA", "polygons", ["guy", "man"]),
        (222, 44, "testB", "runs", ["green bottle"]),
        (3333, 1, "train", "polygon", ["kid"]),
        (3333, 17, "val", "compressed", ["white cat"]),
    ]
    for number, (image, category, split, kind, sentences) in enumerate(plan):
        size = sizes[image]
        segmentation = {
            "polygon": lambda size=size: [polygon(rng, size)],
            "polygons": lambda size=size: [polygon(rng, size), polygon(rng, size)],
            "runs": lambda size=size: run_lengths(rng, size, False),
            "compressed": lambda size=size: run_lengths(rng, size, True),
        }[kind]()
        annotations[100 + number] = {
            "id": 100 + number, "image_id": image, "category_id": category, "iscrowd": 0,
            "segmentation": segmentation, "bbox": [1.0, 2.0, 30.0, 30.0], "area": 9.5,
        }  # fmt: skip
        refs.append({
            "ref_id": 7 * number, "ann_id": 100 + number, "image_id": image, "split": split,
            "category_id": category, "file_name": f"COCO_train2014_{image:012}_{number}.jpg",
            "sent_ids": list(range(len(sentences))),
            "sentences": [
                {"raw": s.upper(), "sent": s, "sent_id": 10 * number + k, "tokens": s.split()}
                for k, s in enumerate(sentences)
            ],
        })  # fmt: skip
    pixels = {n: rng.integers(0, 256, (*size, 3), dtype=np.uint8) for n, size in sizes.items()}
    return {"images": images, "annotations": annotations, "refs": refs, "pixels": pixels}


def mask_of(world, annotation):
    """As pycocotools has it."""
    entry = world["annotations"][annotation]
    image = world["images"][entry["image_id"]]
    segmentation = entry["segmentation"]
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], str):
        return decode(segmentation) > 0
    runs = coco.frPyObjects(segmentation, image["height"], image["width"])
    return decode(coco.merge(runs) if isinstance(runs, list) else runs) > 0


def decode(runs):
    """pycocotools' decode without its warning of NumPy 2."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return coco.decode(runs)


def with_splits(world, name):
    """The world with the splits that a dataset has: RefCOCOg has one test split."""
    if name != "refcocog":
        return world
    split = {"testA": "test", "testB": "test"}
    refs = [ref | {"split": split.get(ref["split"], ref["split"])} for ref in world["refs"]]
    return world | {"refs": refs}


# ---- writing -------------------------------------------------------------------------------------


def write_images(folder, world):
    """As PNG under the names of JPEG files, so that nothing is lost."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, pixels in world["pixels"].items():
        Image.fromarray(pixels).save(folder / file_name(number), "png")


def write_refer(root, world, name="refcoco", split_by="unc", protocol=0,
                images="images/mscoco/images/train2014"):  # fmt: skip
    world = with_splits(world, name)
    write_images(root / images, world)
    (root / name).mkdir(exist_ok=True)
    instances = {
        "images": list(world["images"].values()),
        "annotations": list(world["annotations"].values()),
        "categories": [{"id": k, "name": n} for k, n in CATEGORIES.items()],
    }
    (root / name / "instances.json").write_text(json.dumps(instances))
    (root / name / f"refs({split_by}).p").write_bytes(python2(world["refs"], protocol))


def write_cris(root, world, name="refcoco", folder="refcoco"):
    world = with_splits(world, name)
    write_images(root / "images/train2014", world)
    (root / "anns" / folder).mkdir(parents=True)
    (root / "masks" / folder).mkdir(parents=True)
    lists = {split: [] for split in SPLITS[name]}
    for ref in world["refs"]:
        entry = world["annotations"][ref["ann_id"]]
        image = world["images"][ref["image_id"]]
        mask = mask_of(world, ref["ann_id"]).astype(np.uint8) * 255
        if isinstance(entry["segmentation"], list) and len(entry["segmentation"]) > 1:
            # CRIS adds the parts and multiplies by 255: where they overlap, 254 is left.
            parts = coco.frPyObjects(entry["segmentation"], image["height"], image["width"])
            mask = decode(parts).sum(-1).astype(np.uint8) * 255
        Image.fromarray(mask).save(root / "masks" / folder / f"{ref['ref_id']}.png")
        sentences = [
            {"idx": k, "sent_id": s["sent_id"], "sent": s["sent"].strip()}
            for k, s in enumerate(ref["sentences"])
        ]
        lists[ref["split"]].append({
            "bbox": [1, 2, 31, 32], "cat": ref["category_id"] - 1, "segment_id": ref["ref_id"],
            "img_name": image["file_name"], "sentences": sentences,
            "sentences_num": len(sentences),
        })  # fmt: skip
    for split, entries in lists.items():
        (root / "anns" / folder / f"{split}.json").write_text(json.dumps(entries))


def write_tfds(root, world, monkeypatch, name="refcoco", config="refcoco_unc"):
    """Prepared by TFDS itself, with the features of its `ref_coco` 1.1.0."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.features import feature

    world = with_splits(world, name)
    features = tfds.features
    # To write nested sequences TFDS asks TensorFlow for a type that NumPy knows too.
    monkeypatch.setattr(feature.TensorInfo, "dtype", property(lambda info: info.np_dtype))

    class RefCoco(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = "ref_coco"
        VERSION = tfds.core.Version("1.1.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)]  # noqa: RUF012

        def _info(self):
            box = {"id": np.int64, "area": np.int64, "bbox": features.BBoxFeature(),
                   "label": np.int64}  # fmt: skip
            sentence = {"refexp_id": np.int64, "raw": features.Text()}
            return tfds.core.DatasetInfo(
                builder=self,
                features=features.FeaturesDict({
                    "image": features.Image(encoding_format="jpeg"),
                    "image/id": np.int64,
                    "objects": features.Sequence(box | {
                        "gt_box_index": np.int64,
                        "mask": features.Image(encoding_format="png"),
                        "refexp": features.Sequence(sentence),
                    }),
                    "coco_annotations": features.Sequence(box),
                }),
            )  # fmt: skip

        def _split_generators(self, manager):
            splits = {s: "validation" if s == "val" else s for s in SPLITS[name]}
            return {tfds_name: self._generate_examples(s) for s, tfds_name in splits.items()}

        def _generate_examples(self, split):
            refs = [ref for ref in world["refs"] if ref["split"] == split]
            for image in sorted({ref["image_id"] for ref in refs}):
                objects = []
                for ref in (ref for ref in refs if ref["image_id"] == image):
                    objects.append({
                        "id": ref["ann_id"], "area": 9, "bbox": features.BBox(0.0, 0.0, 0.5, 0.5),
                        "label": ref["category_id"], "gt_box_index": 0,
                        "mask": encoded(mask_of(world, ref["ann_id"])),
                        "refexp": [
                            {"refexp_id": s["sent_id"], "raw": s["sent"]} for s in ref["sentences"]
                        ],
                    })  # fmt: skip
                yield image, {
                    "image": encoded(world["pixels"][image]), "image/id": image,
                    "objects": objects, "coco_annotations": [],
                }  # fmt: skip

    builder = RefCoco(data_dir=str(root), config=config, file_format="array_record")
    builder.download_and_prepare()


def encoded(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    buffer.seek(0)
    return buffer


def python2(data, protocol):
    """The pickle of `data` as Python 2 wrote it: strings are bytes."""
    written = pickle.dumps(data, protocol)
    steps = list(pickletools.genops(written))
    ends = [position for _, _, position in steps[1:]] + [len(written)]
    parts = []
    for (code, argument, start), end in zip(steps, ends, strict=True):
        if code.name == "UNICODE":
            parts.append(b"S" + repr(argument).encode() + b"\n")
        elif code.name == "BINUNICODE":
            text = argument.encode("latin1")
            parts.append(b"U" + bytes([len(text)]) + text)
        else:
            parts.append(written[start:end])
    assert any(part[:1] in b"SU" for part in parts)
    return b"".join(parts)
