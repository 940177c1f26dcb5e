"""Rounds of prediction and correction, and who says what is wrong."""

import dataclasses
import json

import families
import jax
import numpy as np
import pytest
from families_torch import quiet
from tiny_model import one_device

from jaxpercept import PerceptionPipeline
from jaxpercept.diffusion.guidance import Guidance
from jaxpercept.errors import UserError
from jaxpercept.inference.correction import Person, Questions, Round, Script, Session, read_scripts
from jaxpercept.inference.opening import open_perception, open_tokenizer
from jaxpercept.tasks.referring import RED, closeness

EULER = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "linspace"}
EULER |= {key: families.SCHEDULER[key] for key in ("beta_start", "beta_end", "beta_schedule")}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    """An InstructPix2Pix model of random weights whose steps draw noise; it paints masks, which
    random colours never are."""
    folder = tmp_path_factory.mktemp("instruct")
    with quiet():
        families.instruct_pix2pix(folder, 3, EULER)
    description, params = open_perception(str(folder), task="referring")
    description = dataclasses.replace(description, task_options={"paint": False})
    tokenize = open_tokenizer(str(folder), description)
    return PerceptionPipeline(description, params, mesh=one_device(), tokenize=tokenize)


@pytest.fixture
def image(rng):
    return rng.integers(0, 256, (32, 48, 3)).astype(np.uint8)


OPTIONS = {"num_inference_steps": 6, "processing_resolution": 48, "seed": 5}


def test_a_prompt_is_asked_for_and_read(pipe, image):
    with pytest.raises(UserError, match="give a prompt"):
        pipe(image, **OPTIONS)
    first, second = (pipe(image, prompt=text, **OPTIONS) for text in ("the ball", "a box"))
    assert first.kind == "mask"
    assert first.prediction.shape == (1, 32, 48, 1)
    assert np.abs(first.latent - second.latent).max() > 1e-2
    both = pipe([image, image], prompt=["the ball", "a box"], **OPTIONS)
    np.testing.assert_allclose(both.latent[:1], first.latent, rtol=0, atol=2e-4)
    with pytest.raises(UserError, match="2 texts were given for 1"):
        pipe(image, prompt=["a", "b"], **OPTIONS)
    with pytest.raises(UserError, match="leave flip out"):
        pipe(image, prompt="a ball", flip=True, **OPTIONS)


def test_guidance_and_corrections_change_what_is_predicted(pipe, image):
    plain = pipe(image, prompt="the ball", **OPTIONS)
    own = pipe(image, prompt="the ball", guidance=Guidance(3.0, 1.5), **OPTIONS)
    np.testing.assert_array_equal(plain.latent, own.latent)  # the recipe's
    none = pipe(image, prompt="the ball", guidance=Guidance(), **OPTIONS)
    wrong = pipe(image, prompt="the ball", unwanted="a box", **OPTIONS)
    assert np.abs(none.latent - plain.latent).max() > 1e-2
    assert np.abs(wrong.latent - plain.latent).max() > 1e-2
    # Away from the thing itself: nothing is left of the correction, whatever its strength.
    same = pipe(image, prompt="the ball", unwanted="the ball", **OPTIONS)
    np.testing.assert_allclose(same.latent, plain.latent, rtol=0, atol=1e-3)


def test_members_of_an_ensemble_read_their_images_text(pipe, image, rng):
    images = np.stack([image, image[::-1]])
    noise = rng.standard_normal((4, 16, 24, 4)).astype(np.float32)
    told = {"prompt": ["the ball", "a box"], "latents": noise}
    out = pipe(images, ensemble_size=2, **told, **OPTIONS)
    assert out.latent.shape == (4, 16, 24, 4)
    # Noise between the steps belongs to a member's number, which images cannot share.
    assert np.abs(out.latent[0] - out.latent[1]).max() > 1e-2


def test_a_round_goes_on_from_a_latent_half_way(pipe, image):
    session = Session(pipe, image, "the ball", resume=0.5, **OPTIONS)
    first = session.predict()
    whole = pipe(image, prompt="the ball", **OPTIONS)
    np.testing.assert_allclose(first.prediction, whole.prediction[0], rtol=0, atol=1e-3)
    assert (first.number, first.unwanted, first.steps) == (0, (), 6)
    second = session.predict("a box")
    third = session.predict("the lamp")
    assert (second.unwanted, second.steps) == (("a box",), 3)
    assert third.unwanted == ("a box", "the lamp")
    assert np.abs(second.prediction - first.prediction).max() > 1e-4
    # The steps they share are those without correction: another rest, another prediction.
    anew = pipe(image, prompt="the ball", unwanted="a box", **OPTIONS)
    assert np.abs(second.prediction - anew.prediction[0]).max() > 1e-3
    from_start = Session(pipe, image, "the ball", resume=0.0, **OPTIONS)
    from_start.predict()
    again = from_start.predict("a box")
    assert again.steps == 6
    np.testing.assert_allclose(again.prediction, anew.prediction[0], rtol=0, atol=1e-3)
    for wrong in (-0.1, 1.0):
        with pytest.raises(UserError, match="resume"):
            Session(pipe, image, "the ball", resume=wrong)


def test_rounds_end_when_the_corrector_is_content(pipe, image, tmp_path):
    log = tmp_path / "rounds.jsonl"
    session = Session(pipe, image, "the ball", **OPTIONS)
    rounds = list(session.run(Script(["a box", "a lamp"]), image, rounds=5, log=log))
    assert [r.unwanted for r in rounds] == [(), ("a box",), ("a box", "a lamp")]
    logged = [json.loads(line) for line in log.read_text().splitlines()]
    assert [entry["unwanted"] for entry in logged] == [[], ["a box"], ["a box", "a lamp"]]
    assert all(entry["prompt"] == "the ball" and entry["seconds"] > 0 for entry in logged)
    few = Session(pipe, image, "the ball", **OPTIONS)
    assert len(list(few.run(Script(["a box", "a lamp"]), image, rounds=1))) == 2


def rounds_of(*unwanted):
    empty = np.zeros((2, 3, 1), np.float32)
    return [Round(i, "the red ball", unwanted[:i], empty, 1, 0.1) for i in range(len(unwanted) + 1)]


def test_who_says_what_is_wrong(image, tmp_path):
    asked = []

    def answer(question, *shown):
        asked.append(question)
        return " the lamp\n"

    assert Person(answer)(image, rounds_of()) == "the lamp"
    assert "'the red ball'" in asked[-1]
    assert Questions(answer)(image, rounds_of()) == "the lamp"
    assert asked[-1].endswith("What might confuse the segmentation of the red ball?")
    Questions(answer, caption=lambda shown: f"{shown.shape[1]} columns")(image, rounds_of())
    assert asked[-1].startswith("This is an image of 48 columns.")
    script = Script(["a", "b"])
    assert [script(image, rounds_of(*"ab"[:n])) for n in range(3)] == ["a", "b", ""]
    path = tmp_path / "corrections.json"
    path.write_text(json.dumps({"room": ["the lamp", "the box"], "hall": []}))
    scripts = read_scripts(path)
    assert scripts["room"](image, rounds_of("the lamp")) == "the box"
    assert scripts["hall"](image, rounds_of()) == ""
    for content in ('{"room": "the lamp"}', '{"room": [1]}', "no JSON", "[]"):
        path.write_text(content)
        with pytest.raises(UserError, match=r"corrections\.json"):
            read_scripts(path)


def test_the_map_is_the_distance_to_red(rng):
    colours = rng.uniform(0, 1, (1, 4, 5, 3)).astype(np.float32)
    found = np.asarray(closeness(jax.numpy.asarray(colours), RED)) > 0.5
    distance = np.linalg.norm(255 * colours - [255, 0, 0], axis=-1, keepdims=True)
    np.testing.assert_array_equal(found, distance < 50)
