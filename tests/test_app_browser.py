"""The web page in a real browser, from an empty profile.

    pip install -e '.[test,browser]'; apt-get install chromium
    pytest -m slow tests/test_app_browser.py

Not among the tests of every change: it wants a browser.
"""

import importlib.util
import io
import json
import re
import zipfile

import numpy as np
import pytest
import tiny_model
import uploads
from browser import CHROMIUM, Tab, browser, served
from PIL import Image

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs the program chromium"),
    *(
        pytest.mark.skipif(
            importlib.util.find_spec(name) is None, reason=f"needs {name}: the extra browser"
        )
        for name in ("gradio", "playwright")
    ),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Two models of random weights; files of 1 MB at most."""
    folder, rng = tmp_path_factory.mktemp("served"), np.random.default_rng()
    checkpoints = (
        tiny_model.save_referring(folder / "referring", rng),
        tiny_model.save(folder / "depth", rng),
    )
    arguments = [f"--checkpoint={path}" for path in checkpoints] + ["--max_upload_mb=1"]
    quick = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    with served(folder, arguments, **quick) as page:
        yield page
    assert page.status == 130
    assert page.beyond == ""
    assert "Traceback" not in page.log.read_text()


@pytest.fixture
def context(tmp_path):
    with browser(tmp_path / "profile") as context:
        yield context


@pytest.fixture
def tab(context, server):
    tab = Tab(context, server.url)
    yield tab
    assert tab.beyond == []
    assert tab.complaints == []


@pytest.fixture
def photo(tmp_path, rng):
    rgb = uploads.photo(rng, 120, 160)
    Image.fromarray(rgb).save(tmp_path / "my photo.png")
    return tmp_path / "my photo.png"


def decoded(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def test_a_first_visit(tab, photo, tmp_path):
    tab.page.wait_for_selector("text=Drop an image, say what to look for")
    tab.look_for("the red ball")
    tab.status("There is no picture yet", wrong=True)
    tab.upload(photo)
    tab.status("160 x 120 pixels")
    shown = decoded(tab.picture("#image"))
    np.testing.assert_allclose(shown, np.asarray(Image.open(photo)), atol=30)
    tab.page.press("#phrase textarea", "Enter")
    first = tab.status("Round 0: 6 steps")
    seconds = float(re.search(r"([\d.]+) s", first)[1])
    assert seconds < 20
    mask = decoded(tab.picture("#result"))
    assert mask.shape == (810, 1080, 3)  # enlarged
    assert np.abs(mask[::9, ::9].mean((0, 1)) - shown[::9, ::9].mean((0, 1))).max() > 10
    assert not tab.page.locator("#unwanted textarea").input_value()
    tab.correct("the box on the left")
    tab.status("Round 1: 3 steps")
    before, after = tab.rounds(2)
    assert "The red ball" in before
    assert "not the box on the left" in after
    log = tab.download("#log", tmp_path)
    assert log.name == "my_photo_rounds.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["unwanted"] for record in records] == [[], ["the box on the left"]]
    with zipfile.ZipFile(tab.download("#maps", tmp_path)) as archive:
        names = archive.namelist()
        maps = [
            np.load(io.BytesIO(archive.read(f"my_photo_round{number}.npy"))) for number in (0, 1)
        ]
    assert len(names) == 2 * 4 + 1
    assert maps[0].shape == (120, 160)
    assert np.abs(maps[0] - maps[1]).max() > 1e-3
    assert records[1]["foreground"] == pytest.approx((maps[1] > 0.5).mean(), abs=1e-6)


def test_bad_files_get_a_sentence_and_the_page_goes_on(tab, photo, tmp_path, rng):
    for name, (write, words) in uploads.BAD.items():
        write(tmp_path / name, uploads.photo(rng))
        tab.upload(tmp_path / name)
        sentence = tab.status(name, wrong=True)
        assert words in sentence
        assert tab.page.locator("#image").count() == 0 or not tab.page.is_visible("#image img")
    tab.upload(photo)
    tab.status("160 x 120 pixels")
    tab.look_for("the ball")
    tab.status("Round 0")
    # A picture that is refused leaves the one before.
    tab.upload(tmp_path / "cut.png")
    tab.status("is damaged", wrong=True)
    assert tab.page.is_visible("#result img")
    tab.correct("a box")
    tab.status("Round 1")


def test_large_files_are_refused_before_they_are_stored(context, server, photo, tmp_path, rng):
    tab = Tab(context, server.url)  # the browser's console says that the upload was refused
    large = tmp_path / "large.png"
    Image.fromarray(rng.integers(0, 256, (800, 700, 3)).astype(np.uint8)).save(large)
    assert large.stat().st_size > 1e6
    tab.upload(large)
    tab.page.locator("text=/maximum allowed size/").first.wait_for()
    tab.upload(photo)
    tab.status("160 x 120 pixels")
    tab.look_for("the ball")
    tab.status("Round 0")


@pytest.mark.parametrize("name", uploads.GOOD)
def test_pictures_of_every_kind_are_predicted_for(name, tab, tmp_path, rng):
    expected, note = uploads.GOOD[name](tmp_path / name, uploads.photo(rng))
    tab.upload(tmp_path / name)
    tab.status(note or name)
    shown = decoded(tab.picture("#image"))
    assert shown.shape == expected.shape
    assert np.abs(shown - expected).mean() < 10
    tab.look_for("the ball")
    tab.status("Round 0")
    height, width, _ = decoded(tab.picture("#result")).shape
    assert height / width == pytest.approx(expected.shape[0] / expected.shape[1], rel=0.01)


def test_names_of_files_are_text(tab, tmp_path):
    path = tmp_path / "<img src=x onerror=window.hacked=1> **bold**.png"
    path.write_bytes(b"no picture")
    tab.upload(path)
    tab.status("is no image", wrong=True)
    tab.look_for("<script>window.hacked=1</script>")
    assert tab.page.evaluate("window.hacked") is None
    assert tab.page.locator("#status img, #status script, #status strong").count() == 0


def test_clicks_on_an_example_say_what_is_there(tab):
    tab.page.locator("#examples button").nth(0).click()
    tab.status("Round 0")
    assert tab.page.input_value("#phrase textarea") == "the yellow cone"
    tab.click_at(0.29, 0.85)
    tab.status("That is 'the blue cone on the left'")
    assert tab.page.input_value("#unwanted textarea") == "the blue cone on the left"
    tab.page.click("#correct")
    tab.status("Round 1")
    assert "not the blue cone on the left" in tab.rounds(2)[1]
    tab.click_at(0.66, 0.8)
    tab.status("'the yellow cone' itself")
    tab.click_at(0.6, 0.1)
    tab.status("Nothing there has a name")


def test_clicks_on_a_photo_ask_for_words(tab, photo):
    tab.upload(photo)
    tab.status("160 x 120 pixels")
    tab.look_for("the ball")
    tab.status("Round 0")
    before = decoded(tab.picture("#result"))
    tab.click_at(0.25, 0.5)
    tab.status("Say it in words")
    tab.page.wait_for_timeout(500)
    changed = np.argwhere(np.abs(decoded(tab.picture("#result")) - before).max(-1) > 60)
    np.testing.assert_allclose(changed.mean(0), [0.5 * 810, 0.25 * 1080], atol=20)


def test_another_model_needs_no_words(tab, photo):
    tab.upload(photo)
    tab.status("160 x 120 pixels")
    tab.page.locator("#model label").nth(1).click()
    tab.status("Round 0: 1 step,")
    assert tab.page.inner_text("#find") == "Predict"
    assert not tab.page.is_visible("#phrase")
    assert not tab.page.is_visible("#correct")
    assert decoded(tab.picture("#result")).shape == (810, 1080, 3)
    tab.click_at(0.25, 0.75)
    x, y = re.search(r"At \((\d+), (\d+)\): [01]\.\d+", tab.status("At (")).groups()
    assert abs(int(x) - 40) <= 2
    assert abs(int(y) - 90) <= 2
    tab.page.locator("#examples button").nth(2).click()
    tab.status("Round 0")
    tab.page.locator("#model label").nth(0).click()
    tab.page.wait_for_selector("#phrase textarea")
    tab.look_for("the ball")
    tab.status("Round 0: 6 steps")


def test_tabs_do_not_mix(context, server, tab, photo, tmp_path, rng):
    tab.upload(photo)
    tab.status("160 x 120 pixels")
    tab.look_for("the ball")
    tab.status("Round 0")
    other = Tab(context, server.url)
    assert not other.page.is_visible("#correct")
    Image.fromarray(uploads.photo(rng, 50, 90)).save(tmp_path / "other.png")
    other.upload(tmp_path / "other.png")
    other.status("90 x 50 pixels")
    other.look_for("the lamp")
    other.status("Round 0")
    tab.correct("a box")
    tab.status("Round 1")
    assert "not a box" in tab.rounds(2)[1]
    assert len(other.rounds(1)) == 1
    assert decoded(other.picture("#result")).shape == (600, 1080, 3)
    assert other.complaints == []


def test_answers_allow_nothing_from_elsewhere(tab, server):
    answer = tab.page.request.get(server.url)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    assert tab.page.request.get(f"{server.url}/gradio_api/file=/etc/passwd").status in (403, 404)
    # What a script might ask for is stopped by the browser.
    stopped = tab.page.evaluate(
        "() => fetch('http://127.0.0.1:9/x').then(() => false, error => String(error))"
    )
    assert "Failed to fetch" in stopped
    tab.requests[:] = [address for address in tab.requests if not address.endswith(":9/x")]
    tab.complaints[:] = [text for text in tab.complaints if "Content Security Policy" not in text]
    tab.complaints[:] = [text for text in tab.complaints if ":9/x" not in text]
