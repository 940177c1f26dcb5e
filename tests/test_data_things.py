"""The things of a COCO folder."""

import json

import numpy as np
import pytest
from test_data_phrases import SIZE, union, write_phrases

from jaxpercept.data.datasets import open_dataset
from jaxpercept.data.instructions import choose_kind
from jaxpercept.data.layouts import NoLayoutError
from jaxpercept.errors import UserError


@pytest.fixture
def masks(tmp_path, rng):
    """Two dogs, a person and a crowd of people in each of 40 images: their segmentations."""
    made = write_phrases(tmp_path, rng)
    path = tmp_path / "instances.json"
    data = json.loads(path.read_text())
    for annotation in data["annotations"]:
        annotation["area"] = int(union([annotation["segmentation"]]).sum())
    path.write_text(json.dumps(data))
    return made


def test_all_things_of_an_image(tmp_path, masks):
    options = {"data_dir": tmp_path, "targets": ("instances",)}
    train = open_dataset("coco_things", **options)
    test = open_dataset("coco_things", evaluation=True, **options)
    phrases = open_dataset("coco_phrases", data_dir=tmp_path, evaluation=True)
    assert not {*train.source.names} & {*test.source.names}
    assert len(train) + len(test) == 40
    assert len(test) == len(phrases.source.images)  # one split of the images for both
    for one in (train[i] for i in range(6)):
        number = int(one["name"].split("/")[1].split(".")[0])
        dogs, person, crowd = (
            union([masks[10 * number + k] for k in ids]) for ids in ((0, 1), (2,), (3,))
        )
        assert sorted(one["kinds"]) == ["dog", "dog", "person"]
        np.testing.assert_array_equal(one["instance"] > 0, dogs | person)
        # The smallest is over the others.
        of = [union([masks[10 * number + k]]) for k in range(3)]
        smallest = min(of, key=np.sum)
        np.testing.assert_array_equal(one["instance"] == 3, smallest)
        np.testing.assert_array_equal(one["valid"], ~crowd | dogs | person)
        assert one["rgb"].shape == (*SIZE, 3)
        asked = choose_kind(one, 0.0)
        assert asked["caption"] in ("dog", "person")


def test_what_is_wrong_is_named(tmp_path, masks):
    options = {"data_dir": tmp_path, "targets": ("instances",)}
    names = open_dataset("coco_things", **options).source.names
    (tmp_path / names[0]).unlink()
    with pytest.raises(UserError, match=names[0]):
        open_dataset("coco_things", **options)
    (tmp_path / "instances.json").write_text("{}")
    with pytest.raises(UserError, match=r"instances\.json is not an annotation file of COCO"):
        open_dataset("coco_things", **options)
    (tmp_path / "instances.json").unlink()
    with pytest.raises(NoLayoutError):
        open_dataset("coco_things", **options)
