"""Records about one phrase: which one, what it names, and what becomes of both in training."""

import collections
import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refcoco_copies import world as make_world
from refcoco_copies import write_refer

from jaxpercept.data import transforms
from jaxpercept.data.datasets import DATASETS, Records, open_dataset
from jaxpercept.data.pipeline import make_train_dataset
from jaxpercept.data.readers import EmptyMaskError
from jaxpercept.data.referring import refer
from jaxpercept.data.transforms import NO_AUGMENT, Augment, mirrored, prepare
from jaxpercept.errors import UserError

quick = settings(max_examples=40, deadline=None)


def record(rng=None, **changes):
    """Instances 1 to 3, of which 3 is not to be seen."""
    instance = np.zeros((12, 20, 1), np.int32)
    instance[2:8, 1:7] = 1
    instance[3:9, 11:18] = 2
    return {
        "name": "a", "rgb": np.zeros((12, 20, 3), np.uint8), "instance": instance,
        "valid": np.ones((12, 20, 1), bool), "kinds": ("ball", "box", "ball"),
        "phrases": [("ball on the left", 1), ("box", 2), ("a box", 2), ("hidden ball", 3)],
    } | changes  # fmt: skip


# ---- one phrase ----------------------------------------------------------------------------------


def test_one_phrase_of_what_is_to_be_seen():
    found = [refer(record(), place) for place in (0.0, 0.33, 0.34, 0.66, 0.67, 1 - 2**-53)]
    captions = [r["caption"] for r in found]
    assert captions == ["ball on the left"] * 2 + ["box"] * 2 + ["a box"] * 2
    for r in found:
        target = 1 if "ball" in r["caption"] else 2
        np.testing.assert_array_equal(r["referred"], r["instance"] == target)
        assert r["referred"].dtype == np.float32
    # The same kind first; never another phrase of the same thing.
    assert found[0]["distractors"] == ["hidden ball", "box", "a box"]
    assert found[3]["distractors"] == ["ball on the left", "hidden ball"]
    unkind = {k: v for k, v in record().items() if k != "kinds"}
    assert refer(unkind, 0.0)["distractors"] == ["box", "a box", "hidden ball"]


def test_what_another_thing_is_called_too_is_no_distractor():
    phrases = [("dog", 1), ("dog", 2), ("cat", 2)]
    assert refer(record(phrases=phrases), 0.0)["distractors"] == ["cat"]


@pytest.mark.parametrize("phrases", [[], [("hidden ball", 3)], [("hidden ball", 1)]])
def test_a_picture_in_which_nothing_is_named(phrases):
    instance = record()["instance"]
    instance[instance == 1] = 0
    with pytest.raises(EmptyMaskError, match="No phrase names anything that is to be seen of a"):
        refer(record(phrases=phrases, instance=instance), 0.5)


# ---- the mirror ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("left", "right"),
        ("the LEFT one", "the RIGHT one"),
        ("Left-hand man, on the right", "Right-hand man, on the left"),
        ("leftmost cup", "rightmost cup"),
        ("the RIGHTMOST", "the LEFTMOST"),
        ("Rightmost", "Leftmost"),
        ("red ball to the left of the box", "red ball to the right of the box"),
        ("topleft bottle", "topright bottle"),
        ("far-right, upper left", "far-left, upper right"),
        ("lefthand rightside", "righthand leftside"),
        ("2nd from left's left", "2nd from right's right"),
    ],
)
def test_left_and_right_change_places(text, other):
    assert mirrored(text) == other
    assert mirrored(other) == text


@pytest.mark.parametrize(
    "text",
    ["leftover bright upright copyright", "alright", "lefty", "cleft", "rightful", "Bright light",
     "lEFT", "in front of the box", "behind", "", "rights", "left_over"],
)  # fmt: skip
def test_other_words_stay(text):
    assert mirrored(text) == text


words = st.sampled_from(
    ["left", "Right", "LEFTMOST", "right-most", "leftover", "bright", "lEfT", "topleft", "-", "'s",
     "farRight", "the", "Upperleft", "RIGHThand", "_", "ball", "\n", "  ", "links", "ß"]
)  # fmt: skip


@quick
@given(st.lists(words), st.sampled_from(["", " "]), st.text())
def test_a_mirror_twice_is_none(parts, gap, text):
    for whole in (gap.join(parts), text, gap.join(parts) + text):
        assert mirrored(mirrored(whole)) == whole
        swapped = re.sub("(?i)left|right", "", mirrored(whole))
        assert swapped == re.sub("(?i)left|right", "", whole)


def test_flip_moves_mask_words_and_distractors_together():
    one = refer(record(), 0.0) | {"distractors": ["the rightmost ball", "bright box"]}
    flipped = transforms.flip_horizontal(one)
    np.testing.assert_array_equal(flipped["referred"], one["referred"][:, ::-1])
    assert flipped["caption"] == "ball on the right"
    assert flipped["distractors"] == ["the leftmost ball", "bright box"]
    assert flipped["phrases"][0] == ("ball on the right", 1)


# ---- augmentation --------------------------------------------------------------------------------


def painted(rng, size, count=4):
    """A record whose instances are told by their red."""
    instance = rng.integers(1, count, (5, 7))
    instance = np.kron(instance, np.ones((9, 9), int))[: size[0], : size[1], None].astype(np.int32)
    rgb = np.repeat(instance * 50, 3, -1).astype(np.uint8)
    phrases = [(f"thing {n} on the left", n) for n in range(1, count)]
    return record(rgb=rgb, instance=instance, phrases=phrases, valid=np.ones((*size, 1), bool),
                  kinds=("thing",) * (count - 1))  # fmt: skip


@quick
@given(
    st.integers(0, 2**32 - 1),
    st.tuples(st.integers(20, 45), st.integers(20, 63)),
    st.tuples(st.integers(4, 50), st.integers(4, 50)),
)
def test_mask_and_phrase_stay_together(seed, size, resolution):
    rng = np.random.default_rng(seed)
    opened = refer(painted(rng, size), 0.0)
    augment = Augment(scale=(0.3, 1.0), photometric=0.0, rgb_resize="nearest")
    done = prepare(opened, rng, augment, resolution)
    assert done["referred"].shape == (*resolution, 1)
    assert set(np.unique(done["referred"])) <= {0, 1}
    number = int(done["caption"].split()[1])
    np.testing.assert_array_equal(done["referred"], done["rgb"][..., :1] == number * 50)
    assert not {"phrases", "instance"} & done.keys()


def test_turned_masks_stay_masks(rng):
    opened = refer(painted(rng, (40, 60)), 0.0)
    done = prepare(opened, rng, Augment(flip=0.0, photometric=0.0, rotation=30.0), (40, 60))
    assert set(np.unique(done["referred"])) == {0, 1}
    number = int(done["caption"].split()[1])
    agree = (done["referred"] > 0) == (np.abs(done["rgb"][..., :1].astype(int) - 50 * number) < 20)
    assert agree.mean() > 0.8


def test_the_choice_leaves_the_other_draws_as_they_were(rng):
    strong = Augment(scale=(0.3, 0.9), rotation=9.0, photometric=1.0, brightness=0.4, noise=3.0)
    opened = refer(painted(rng, (40, 60)), 0.0)
    seed = int(rng.integers(2**32))
    done = prepare(opened, np.random.default_rng(seed), strong, (20, 30))
    fixed = {k: v for k, v in opened.items() if k != "phrases"}
    calm = prepare(fixed, np.random.default_rng(seed), strong, (20, 30))
    np.testing.assert_array_equal(done["rgb"], calm["rgb"])
    assert calm["caption"].endswith(("on the left", "on the right"))
    assert done["caption"].split()[2:] == calm["caption"].split()[2:]


def test_crops_are_what_they_were_before_there_were_phrases(rng):
    augment = Augment(flip=0.0, photometric=0.0, scale=(0.2, 0.9), rgb_resize="nearest")
    opened = painted(rng, (40, 60))
    opened["rgb"] = rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)
    seed = int(rng.integers(2**32))
    done = prepare(opened, np.random.default_rng(seed), augment, (20, 30))
    geometry = np.random.default_rng(seed).spawn(4)[0]
    geometry.random(2)  # the flip and the rotation
    window = transforms.random_window((40, 60), geometry, augment, (20, 30))
    expected = transforms.resize_nearest(transforms.crop(opened, *window)["rgb"], (20, 30))
    np.testing.assert_array_equal(done["rgb"], expected)


def test_training_draws_every_phrase(rng):
    opened = refer(painted(rng, (45, 63)), 0.0)
    drawn = collections.Counter(
        prepare(opened, np.random.default_rng(int(seed)), NO_AUGMENT, (9, 9))["caption"]
        for seed in rng.integers(2**32, size=600)
    )
    assert len(drawn) == 3
    assert min(drawn.values()) > 130


# ---- records and batches -------------------------------------------------------------------------

NAMES = ("scenes", "furnished", "referring")


@pytest.mark.parametrize("name", NAMES)
def test_scenes_are_about_a_phrase(name):
    options = {"targets": ("referred",), "resolution": (48, 64)}
    test = open_dataset(name, evaluation=True, **options)
    assert len(test) == 1000
    for index in (0, 7, 999):
        one, again = test[index], test[index]
        assert one["caption"] == again["caption"]
        assert "phrases" not in one
        assert one["valid"].all()
        np.testing.assert_array_equal(one["referred"], again["referred"])
        target = np.unique(one["instance"][one["referred"] > 0])
        assert target.shape == (1,)
        assert target > 0
        named = dict(test.source[index]["phrases"])
        assert named[one["caption"]] == target[0]
        assert one["caption"] not in one["distractors"]
        kinds = [one["kinds"][named[phrase] - 1] for phrase in one["distractors"]]
        same = [kind == one["kinds"][target[0] - 1] for kind in kinds]
        assert same == sorted(same, reverse=True)
    plain = open_dataset(name, evaluation=True, resolution=(48, 64))
    assert "referred" not in plain[0]
    assert plain[0]["caption"] != test[0]["caption"]


def test_different_scenes_take_different_places_in_their_lists():
    test = open_dataset("scenes", evaluation=True, targets=("referred",), resolution=(24, 32))
    from jaxpercept.data import scenes

    places = set()
    for index in range(40):
        one = test[index]
        listed = scenes.render(int(one["name"].split("_")[1]), height=24, width=32)["phrases"]
        captions = [text for text, _ in listed]
        places.add((captions.index(one["caption"]) * 4) // len(captions))
    assert places == {0, 1, 2, 3}


def test_scenes_without_phrases_are_replaced():
    """By others, that no other index shows: each time by the same."""
    from jaxpercept.data import scenes

    options = {"resolution": (24, 32), "evaluation": True}
    test = open_dataset("scenes", targets=("referred",), **options)
    unnamed = [
        i for i in range(120) if not scenes.render(2**30 + i, height=24, width=32)["phrases"]
    ]
    assert unnamed
    for i in unnamed:
        number = int(test[i]["name"].split("_")[1]) - 2**30
        assert number >= 1000
        assert number % 1000 == i
        assert test[i]["caption"]
        assert open_dataset("scenes", **options)[i]["name"] == f"scene_{2**30 + i:010d}"
    named = next(i for i in range(120) if i not in unnamed)
    assert test[named]["name"] == f"scene_{2**30 + named:010d}"


def tokenize(captions):
    return np.array([[len(c), *map(ord, f"{c:6}"[:6])] for c in captions], np.int64)


def batches(mixture, count, **changes):
    settings = {"resolution": (24, 32), "batch_size": 8, "seed": 3, "tokenize": tokenize,
                "fields": ("rgb", "referred", "valid", "input_ids", "index")}  # fmt: skip
    iterator = iter(make_train_dataset(mixture, **(settings | changes)))
    taken = list(itertools.islice(iterator, count))
    skipped = dict(iterator.skipped)
    iterator.close()
    return taken, skipped


@pytest.mark.parametrize("name", NAMES)
def test_batches_hold_phrase_and_mask(name):
    (batch,), _ = batches([(name, 1.0, {"resolution": (24, 32)})], 1)
    assert batch["referred"].shape == (8, 24, 32, 1)
    assert batch["referred"].dtype == np.float32
    assert batch["referred"].any(axis=(1, 2, 3)).all()
    assert (batch["referred"].mean(axis=(1, 2, 3)) < 0.9).all()
    # "the ": a phrase, not the scene's caption, which begins with "a ".
    assert (batch["input_ids"][:, 1:5] == [ord(c) for c in "the "]).all()


def test_batches_are_the_same_every_time():
    mixture = [("referring", 1.0, {"resolution": (24, 32), "size": 40})]
    one, two = (batches(mixture, 2, augment={"scale": (0.2, 0.6)})[0] for _ in range(2))
    for a, b in zip(one, two, strict=True):
        for field in a:
            np.testing.assert_array_equal(a[field], b[field])
    assert len({tuple(row) for batch in one for row in batch["input_ids"].tolist()}) > 8


def test_what_vanishes_in_few_pixels_is_skipped(tmp_path, rng):
    world = make_world(rng)
    small = [[1.0, 1.0, 5.0, 1.0, 5.0, 5.0, 1.0, 5.0]]
    shape = world["images"][3333]
    width, height = float(shape["width"]), float(shape["height"])
    large = [[0.0, 0.0, width, 0.0, width, 0.7 * height, 0.0, 0.7 * height]]
    for number, annotation in world["annotations"].items():
        annotation["segmentation"] = large if number == 107 else small
    write_refer(tmp_path, world)
    mixture = [("refcoco", 1.0, {"data_dir": str(tmp_path)})]
    (batch,), skipped = batches(mixture, 1, resolution=(4, 4))
    assert skipped
    assert batch["referred"].any(axis=(1, 2, 3)).all()


def test_who_has_no_phrases_is_left_out():
    with pytest.raises(UserError, match="Dataset people has no referred; leave it out"):
        batches([("people", 1.0, {})], 1)
    with pytest.raises(UserError, match="Dataset objects has no referred; it has depth"):
        open_dataset("objects", targets=("referred",))


def test_regions_that_nobody_knows_are_invalid():
    class Fake:
        names = ("a",)

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return {k: v for k, v in record().items() if k != "valid"} | {"mask": known}

    known = np.ones((12, 20, 1), bool)
    known[0] = False
    opened = Records(
        DATASETS["coco_phrases"], Fake(), split="x", targets=("referred",), evaluation=True
    )
    np.testing.assert_array_equal(opened[0]["valid"], known)
    known[:] = False
    with pytest.raises(EmptyMaskError, match="No pixel of a has valid referred"):
        opened[0]
