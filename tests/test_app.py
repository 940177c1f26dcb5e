"""The web page without a browser: uploads, examples, rounds, and the command."""

import dataclasses
import json
import socket
import sys
import zipfile

import numpy as np
import pytest
import tiny_model
import uploads
from commands import door, restore_logging  # noqa: F401
from PIL import Image

from jaxpercept import app
from jaxpercept.data.rows.own import TEST_SCENES
from jaxpercept.data.scenes.alike import KINDS
from jaxpercept.errors import UserError
from jaxpercept.inference.correction import Session
from jaxpercept.inference.outputs import save_prediction
from jaxpercept.webpage.drawing import draw, marked, overlay, value_at
from jaxpercept.webpage.examples import REFERRING, SIZE, Scene, furnished_scenes, referring_scenes
from jaxpercept.webpage.models import open_models, warm_up
from jaxpercept.webpage.uploads import Limits, Picture, read_upload
from jaxpercept.webpage.visit import Visit

pytestmark = pytest.mark.usefixtures("restore_logging")

# ---- uploads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", uploads.GOOD)
def test_pictures_of_every_kind_are_seen_upright(name, tmp_path, rng):
    expected, note = uploads.GOOD[name](tmp_path / name, uploads.photo(rng))
    picture = read_upload(tmp_path / name, Limits())
    assert picture.rgb.shape == expected.shape
    # JPEG is not exact, and CMYK even less so.
    atol = 12 if name.endswith("jpg") else 0
    np.testing.assert_allclose(picture.rgb.astype(int), expected, rtol=0, atol=atol)
    assert note in Visit().show(picture)
    assert note or not picture.notes


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(orientation, tmp_path, rng):
    upright = uploads.photo(rng)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "photo.png", exif=exif)
    picture = read_upload(tmp_path / "photo.png", Limits())
    np.testing.assert_array_equal(picture.rgb, upright)
    assert picture.notes == (() if orientation == 1 else ("turned upright",))


@pytest.mark.parametrize("name", uploads.BAD)
def test_what_is_no_picture_is_refused_in_a_sentence(name, tmp_path, rng):
    write, words = uploads.BAD[name]
    write(tmp_path / name, uploads.photo(rng))
    with pytest.raises(UserError) as caught:
        read_upload(tmp_path / name, Limits())
    sentence = str(caught.value)
    assert words in sentence
    assert sentence.startswith(name)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert str(tmp_path) not in sentence


def test_files_are_bounded(tmp_path, rng):
    noise = rng.integers(0, 256, (100, 100, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "photo.png")
    megabytes = (tmp_path / "photo.png").stat().st_size / 1e6
    read_upload(tmp_path / "photo.png", Limits(megabytes=megabytes + 1e-5))
    with pytest.raises(UserError, match=r"at most 0\.02 are accepted"):
        read_upload(tmp_path / "photo.png", Limits(megabytes=0.02))
    read_upload(tmp_path / "photo.png", Limits(megapixels=0.01))
    with pytest.raises(UserError, match="100 x 100 pixels"):
        read_upload(tmp_path / "photo.png", Limits(megapixels=0.0099))
    for name in ("megabytes", "megapixels"):
        with pytest.raises(UserError, match="max_upload"):
            Limits(**{name: 0.0})


def test_large_pictures_are_reduced(tmp_path, rng):
    rgb = uploads.photo(rng, 30, 3000)
    Image.fromarray(rgb).save(tmp_path / "wide.png")
    picture = read_upload(tmp_path / "wide.png", Limits())
    assert picture.rgb.shape == (10, 1024, 3)
    assert picture.notes == ("reduced from 3000 x 30",)
    assert abs(picture.rgb.mean() - rgb.mean()) < 1


def test_names_are_shortened(tmp_path, rng):
    path = tmp_path / ("x" * 200 + ".png")
    Image.fromarray(uploads.photo(rng)).save(path)
    assert len(read_upload(path, Limits()).name) < 70


# ---- examples ------------------------------------------------------------------------------------


def test_examples_name_one_thing_of_several():
    scenes = referring_scenes()
    assert len(scenes) == len(REFERRING)
    for scene, (index, phrase) in zip(scenes, REFERRING, strict=True):
        assert scene.rgb.shape == (*SIZE, 3)
        thing = scene.thing(f" {phrase.upper()}  ")
        assert thing, f"scene {TEST_SCENES[index]} has no {phrase!r}"
        rows, columns = np.nonzero(scene.instance == thing)
        assert rows.size > 0.005 * scene.instance.size
        y, x = int(rows[rows.size // 2]), int(columns[rows.size // 2])
        assert phrase in scene.names(x, y)
        (noun,) = set(phrase.split()) & set(KINDS)
        others = {other for text, other in scene.phrases if f" {noun}" in text} - {thing}
        assert others, f"{phrase!r} could only be one thing"
    floor = np.argwhere(scenes[0].instance == 0)[-1]
    assert scenes[0].names(int(floor[1]), int(floor[0])) == []
    assert scenes[0].thing("the elephant") == 0


def test_rooms_need_no_words():
    rooms = furnished_scenes()
    assert {room.phrase for room in rooms} == {""}
    assert {room.rgb.shape for room in rooms} == {(*SIZE, 3)}


# ---- pictures ------------------------------------------------------------------------------------


def test_masks_are_laid_over_the_picture(rng):
    rgb = uploads.photo(rng)
    mask = np.zeros((*rgb.shape[:2], 1), np.float32)
    mask[:, :30] = 1
    drawn = overlay(rgb, mask).astype(int)
    pale = np.rint(rgb * 0.65 + 255 * 0.35)
    np.testing.assert_array_equal(drawn[:, 30:], pale[:, 30:])
    red, green, blue = np.moveaxis(drawn[:, :30], -1, 0)
    assert (red > green + 20).mean() > 0.9
    assert (red > blue + 20).mean() > 0.9
    np.testing.assert_array_equal(draw("mask", mask, rgb, {}), drawn)
    half = overlay(rgb, mask / 2).astype(int)[:, :30]
    np.testing.assert_allclose(half, (drawn + pale)[:, :30] / 2, atol=1)


def test_a_point_is_marked_around_it(rng):
    rgb = uploads.photo(rng)
    before = rgb.copy()
    drawn = marked(rgb, 20, 30)
    np.testing.assert_array_equal(rgb, before)
    rows, columns = np.nonzero((drawn != rgb).any(-1))
    assert rows.size
    assert abs(rows.mean() - 30) < 1.5
    assert abs(columns.mean() - 20) < 1.5
    np.testing.assert_array_equal(drawn[30, 20], rgb[30, 20])  # what is pointed at stays visible
    marked(rgb, 0, 0)


def test_values_in_words():
    depth = np.full((4, 5, 1), 0.25, np.float32)
    assert value_at("affine_depth", depth, 3, 2, {}) == "0.250"
    normal = np.broadcast_to(np.array([0, 0.6, 0.8], np.float32), (4, 5, 3))
    assert value_at("normals", normal, 3, 2, {}) == "0.000, 0.600, 0.800"
    classes = np.zeros((4, 5, 1), np.float32)
    assert value_at("classes", classes, 0, 0, {"palette": "scenes"}).isalpha()
    assert value_at("classes", classes + 250, 0, 0, {"palette": "scenes"}) == "no class"


# ---- models --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model that looks for what a text names, in six steps, and one of depth, in one."""
    folder, rng = tmp_path_factory.mktemp("models"), np.random.default_rng()
    return (
        str(tiny_model.save_referring(folder / "referring", rng)),
        str(tiny_model.save(folder / "depth", rng)),
    )


@pytest.fixture(scope="module")
def models(folders):
    return open_models(folders)


@pytest.fixture
def referring(models):
    return models[0]


@pytest.fixture
def depth(models):
    return models[1]


def test_models_are_told_apart(models, folders):
    assert [model.label for model in models] == [
        f"referring ({folders[0]})",
        f"depth ({folders[1]})",
    ]
    assert [model.reads_text for model in models] == [True, False]
    assert [model.takes_steps for model in models] == [True, False]
    assert [model.num_steps for model in models] == [6, 1]
    with pytest.raises(UserError, match="the same model twice"):
        open_models([folders[0], folders[0]])
    with pytest.raises(UserError, match="not a multiple"):
        open_models(folders[1:], resolution=13)
    (few,) = open_models(folders[:1], num_steps=3)
    assert few.num_steps == 3


def programs(model):
    """How many versions of each network have been compiled."""
    predictor = model.pipe._predictor
    step = predictor.stepwise
    return [f._cache_size() for f in (step._take, step._decode, predictor._network)]


def test_most_pictures_share_three_sizes(referring, depth):
    for model in (referring, depth):
        # Trained at 32 x 48, so that 16 pixels are the multiple: lying, upright and square.
        sizes = model.sizes(SIZE)
        assert sizes[0] == SIZE
        seen = [model.pipe.network_size(size) for size in sizes]
        assert seen == [(48, 48), (32, 48), (48, 32)]
        for height, width in ((300, 400), (300, 450), (400, 300), (333, 333), (720, 1280), (9, 10)):
            assert model.pipe.network_size((height, width)) in seen


def test_visitors_wait_for_no_compilation(referring, rng, monkeypatch):
    monkeypatch.setattr(type(referring), "sizes", lambda self, shown: [(30, 40), (48, 32)])
    messages = list(warm_up(referring, SIZE))
    assert messages[0] == f"compiling {referring.label} for 40x30 (1 of 2)"
    before = programs(referring)
    for height, width in ((240, 320), (300, 400), (450, 300)):
        visit = Visit()
        visit.show(Picture(uploads.photo(rng, height, width), "photo.png"))
        list(visit.find(referring, "the ball", num_steps=4))
        list(visit.correct("a box"))
        visit.close()
    assert programs(referring) == before


# ---- rounds --------------------------------------------------------------------------------------


@pytest.fixture
def visit(rng):
    visit = Visit()
    visit.show(Picture(uploads.photo(rng), "my photo.png"))
    yield visit
    visit.close()


def test_a_first_round_and_a_corrected_one(visit, referring):
    shown = list(visit.find(referring, " the red  ball ", seed=3))
    assert [each.done for each in shown[-2:]] == [False, True]
    assert shown[0].message == "Looking for 'the red ball' ..."
    assert [each.message for each in shown[1:-1]] == [f"Step {n} of 6 ..." for n in range(1, 6)]
    assert shown[-1].message.startswith("Round 0: 6 steps, ")
    assert all(each.image.shape == visit.picture.rgb.shape for each in shown[1:])
    assert np.abs(shown[1].image.astype(int) - shown[-1].image).max() > 0
    options = {"num_inference_steps": 6, "seed": 3}
    alone = Session(referring.pipe, visit.picture.rgb, "the red ball", **options)
    for unwanted in ("", "a box"):
        list(alone.watch(unwanted))
    first, second = alone.rounds
    *_, last = visit.correct("a box")
    assert last.message.startswith("Round 1: 3 steps, ")
    for done, expected in zip(visit.session.rounds, (first, second), strict=True):
        np.testing.assert_allclose(done.prediction, expected.prediction, rtol=0, atol=1e-3)
    assert np.abs(first.prediction - second.prediction).max() > 1e-3
    (one, caption), (two, corrected) = visit.gallery()
    np.testing.assert_array_equal(one, shown[-1].image)
    np.testing.assert_array_equal(two, last.image)
    assert caption.endswith("The red ball")
    assert corrected.endswith("The red ball, not a box")


def test_the_strength_of_corrections_matters(visit, referring):
    maps = []
    for strength in (0.0, 1.0, 4.0):
        list(visit.find(referring, "the ball", correction=strength))
        list(visit.correct("a box"))
        maps.append([done.prediction for done in visit.session.rounds])
    (first, none), (_, some), (_, more) = maps
    np.testing.assert_allclose(none, first, rtol=0, atol=1e-4)
    assert np.abs(some - first).max() > 1e-3
    assert np.abs(more - first).mean() > np.abs(some - first).mean()


def test_what_cannot_be_done_yet_is_said(visit, referring, depth, monkeypatch):
    empty = Visit()
    with pytest.raises(UserError, match="no picture yet"):
        next(empty.find(referring, "the ball"))
    empty.close()
    with pytest.raises(UserError, match="Say what to look for"):
        next(visit.find(referring, "  "))
    with pytest.raises(UserError, match="300 characters"):
        next(visit.find(referring, "x" * 300))
    with pytest.raises(UserError, match="nothing to correct yet"):
        next(visit.correct("a box"))
    with pytest.raises(UserError, match="no prediction yet"):
        visit.click(3, 4)
    list(visit.find(referring, "the ball"))
    with pytest.raises(UserError, match="Say what was marked"):
        next(visit.correct(" "))
    list(visit.correct("a box"))
    with pytest.raises(UserError, match="'a box' is among the corrections"):
        next(visit.correct(" a  box"))
    monkeypatch.setattr("jaxpercept.webpage.visit._MOST_ROUNDS", 2)
    with pytest.raises(UserError, match="2 rounds are kept"):
        next(visit.correct("a lamp"))
    assert len(visit.session.rounds) == 2  # nothing of all that was a round
    list(visit.find(depth))
    with pytest.raises(UserError, match="reads no text"):
        next(visit.correct("a box"))


def test_models_that_look_for_nothing_predict_at_once(visit, depth):
    shown = list(visit.find(depth, "whatever stands in the box of another model", num_steps=7))
    assert [each.done for each in shown] == [False, True]
    expected = depth.pipe(visit.picture.rgb).prediction[0]
    np.testing.assert_allclose(visit.session.rounds[0].prediction, expected, rtol=0, atol=1e-4)
    at = visit.click(10, 20)
    assert at.message == f"At (10, 20): {expected[20, 10, 0]:.3f}."
    assert at.suggestion is None
    assert "foreground" not in visit.log()[0]


def test_another_picture_ends_what_was_begun(visit, referring, rng):
    rounds = visit.find(referring, "the ball")
    for _ in range(3):
        next(rounds)
    visit.show(Picture(uploads.photo(rng, 33, 44), "other.png"))
    assert [each.done for each in rounds] == []
    assert visit.gallery() == []
    *_, last = visit.find(referring, "the ball")
    assert last.image.shape == (33, 44, 3)


@pytest.fixture
def scene():
    """Two red balls, the room, and something without a name."""
    instance = np.zeros((60, 80), np.int32)
    instance[10:20, 10:20], instance[10:20, 50:60], instance[40:50, 10:20] = 1, 2, 3
    phrases = [
        *(("the ball on the left", 1), ("the red ball on the left", 1)),
        ("the ball on the right", 2),
    ]
    return Scene("scene", np.full((60, 80, 3), 90, np.uint8), instance, phrases, "the ball")


def test_clicks_on_an_example_suggest_words(visit, scene, referring):
    visit.show_scene(scene)
    list(visit.find(referring, "The ball on the right"))
    wrong = visit.click(15, 15)
    assert wrong.suggestion == "the ball on the left"
    assert (wrong.image != visit.gallery()[0][0]).any()
    itself = visit.click(55, 15)
    assert itself.suggestion is None
    assert "That is 'The ball on the right' itself" in itself.message
    for x, y in ((70, 55), (15, 45), (-5, 900)):
        nameless = visit.click(x, y)
        assert nameless.suggestion is None
        assert "say it in words" in nameless.message
    list(visit.correct("the ball on the left"))
    assert visit.click(15, 15).suggestion == "the red ball on the left"
    list(visit.correct("the red ball on the left"))
    assert "use other words" in visit.click(15, 15).message
    # Words that are no phrase of the scene name nothing there.
    list(visit.find(referring, "the round thing"))
    assert visit.click(55, 15).suggestion == "the ball on the right"


def test_clicks_elsewhere_ask_for_words(visit, referring):
    list(visit.find(referring, "the ball"))
    click = visit.click(30, 20)
    assert click.suggestion is None
    assert "Say it in words" in click.message
    list(visit.correct("a box"))
    list(visit.correct("a lamp"))
    assert [record["clicked"] for record in visit.log()] == [None, (30, 20), None]


def test_joints_and_boxes_are_drawn_over_the_photograph(visit, referring, monkeypatch):
    drawn = []

    def save(*arguments, image, **options):
        drawn.append(image)
        return save_prediction(*arguments, image=image, **options)

    monkeypatch.setattr("jaxpercept.webpage.visit.save_prediction", save)
    list(visit.find(referring, "the ball", num_steps=2))
    visit.files()
    (image,) = drawn
    np.testing.assert_array_equal(image, visit.picture.rgb)


def test_what_is_kept_of_the_rounds(visit, referring, tmp_path):
    visit.show(dataclasses.replace(visit.picture, name="../my photo: 1.png"))
    list(visit.find(referring, "the ball", num_steps=4, seed=9))
    list(visit.correct("a box"))
    together, log = visit.files()
    assert (together.name, log.name) == ("my_photo_1_maps.zip", "my_photo_1_rounds.jsonl")
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["number"] for record in records] == [0, 1]
    assert [record["unwanted"] for record in records] == [[], ["a box"]]
    assert [record["steps"] for record in records] == [4, 2]
    for record in records:
        assert record["prompt"] == "the ball"
        assert (record["seed"], record["task"]) == (9, "referring")
        assert record["seconds"] > 0
        assert 0 <= record["foreground"] <= 1
    with zipfile.ZipFile(together) as archive:
        archive.extractall(tmp_path)
    stems = [f"my_photo_1_round{number}" for number in (0, 1)]
    endings = (".npy", ".png", "_mask.png", ".json")
    expected = {log.name, *(stem + ending for stem in stems for ending in endings)}
    assert {path.name for path in tmp_path.iterdir()} == expected
    for stem, done in zip(stems, visit.session.rounds, strict=True):
        np.testing.assert_array_equal(np.load(tmp_path / f"{stem}.npy"), done.prediction[..., 0])
        facts = json.loads((tmp_path / f"{stem}.json").read_text())
        assert facts["kind"] == "mask"
        assert facts["unwanted"] == list(done.unwanted)
        assert facts["source"] == "../my photo: 1.png"
    folder = together.parent
    visit.close()
    assert not folder.exists()


# ---- the command ---------------------------------------------------------------------------------


def test_help_teaches(capsys):
    assert door(app, "--help") == 0
    text = capsys.readouterr().out
    assert "python -m jaxpercept.app --checkpoint=" in text
    assert "--host: Address to serve at. (default: 127.0.0.1)" in text
    for name in app.OWN_FLAGS:
        assert f"--{name}: " in text


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "--checkpoint is required"),
        (["--checkpoint=a,b", "--task=depth"], "--task speaks of one checkpoint"),
        (["--checkpoint=a", "--checkpoint=b", "--lora=c"], "--lora speaks of one checkpoint"),
        (["--checkpoint=a", "--max_upload_mb=0"], "--max_upload_mb is 0.0"),
        (["--checkpoint=a", "--host=203.0.113.7", "--port=0"], "cannot serve at 203.0.113.7"),
        (["--checkpoint=a", "--port=99999"], "--port=99999"),
    ],
)
def test_wrong_flags_get_one_line(arguments, complaint, capsys):
    assert door(app, *arguments) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert complaint in line


def test_a_port_that_is_taken_is_named(capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert door(app, "--checkpoint=a", f"--port={port}") == 1
    assert f"port {port} (Address already in use)" in capsys.readouterr().err


def test_the_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in ("server", "page"):
        monkeypatch.delitem(sys.modules, f"jaxpercept.webpage.{name}", raising=False)
    assert door(app, "--checkpoint=a", "--port=0") == 1
    assert "pip install 'jaxpercept[app]'" in capsys.readouterr().err
