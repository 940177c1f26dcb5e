"""The course of predictions over timesteps: against loops by hand, and of perfect models."""

import dataclasses
import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analysis_cases import (  # noqa: F401
    COURSE,
    STEPS,
    checkpoint_of_module,
    data_of_module,
    description,
    params_of_module,
    weights,
)
from PIL import Image
from test_evaluator import reference
from test_stepwise import TEXT, tokenize
from tiny_model import one_device

from jaxpercept import analyze
from jaxpercept.diffusion.noise import per_example
from jaxpercept.inference.analysis import Analysis, find
from jaxpercept.inference.evaluation import Model, open_model
from jaxpercept.inference.evaluator import Evaluator
from jaxpercept.inference.options import Options
from jaxpercept.inference.predictor import Predictor
from jaxpercept.methods import Perception, build_perception
from jaxpercept.metrics.depth import METRICS
from jaxpercept.tasks.base import to_signed
from jaxpercept.training.sharding import make_mesh, put_tree, tree_shardings

ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
LATENT = (8, 12, 4)
TIMES = [831, 665, 499, 333, 167, 1]


def examples(folder):
    """(rgb, metres) of each image, with the files' names as the order."""
    for path in sorted((folder / "rgb").iterdir()):
        depth = np.asarray(Image.open(folder / "depth" / path.name))
        yield np.asarray(Image.open(path)), depth / 1000


def targets(folder):
    """The images [-1, 1] of the truth, from its quantiles, and where it is valid."""
    images, masks = [], []
    for _, depth in examples(folder):
        low, high = np.quantile(depth[depth > 0].astype(np.float32), [0.02, 0.98])
        scaled = np.clip((depth - low) / (high - low) * 2 - 1, -1, 1)
        images.append(np.repeat(scaled[..., None], 3, axis=-1).astype(np.float32))
        masks.append(depth > 0)
    return np.stack(images), np.stack(masks)


def cells(masks):
    """Latent cells whose pixels are all valid."""
    b, h, w = masks.shape
    return masks.reshape(b, h // 2, 2, w // 2, 2).all(axis=(2, 4))[..., None]


def noise_of(seed: int, count: int):
    start, _ = jax.random.split(jax.random.key(np.uint32(seed)))
    return per_example(start, jnp.arange(count), lambda k: jax.random.normal(k, LATENT))


def analysis_of(model, data, **changes):
    options = {"processing_resolution": 0, "batch_size": 3, **COURSE, **changes}
    return Analysis(model, "folder", data_dir=data, **options)


class Smooth(Perception):
    """Its network is quick to compile."""

    def network(self, params, image, text=None, mixture=None):
        return lambda x, t: jnp.tanh(0.7 * x + image) * (1 + t / 2000)[:, None, None, None]


class Told(Perception):
    """Its network goes by the text."""

    def network(self, params, image, text=None, mixture=None):
        wanted = text.wanted.mean(axis=(1, 2))[:, None, None, None]
        return lambda x, t: jnp.tanh(0.7 * x + image + wanted)


class Oracle(Perception):
    """Its network puts out what training asks for; the truth is among the weights."""

    def network(self, params, image, text=None, mixture=None):
        schedule, latent = self.solver.schedule, params["truth"]["latent"]

        def exact(x, t):
            t = t.astype(jnp.int32)
            return schedule.target(latent, schedule.noise_between(x, latent, t), t)

        return exact


def model_of(kind, params, mesh=None, **changes) -> Model:
    described, mesh = description("gaussian", **changes), mesh or one_device()
    plain = build_perception(described)
    perception = kind(*(getattr(plain, f.name) for f in dataclasses.fields(plain)))
    return Model(
        checkpoint=kind.__name__,
        description=described,
        perception=perception,
        weights=put_tree(params, tree_shardings(params, mesh)),
        mesh=mesh,
        predictor=Predictor(perception, mesh),
        options=Options(),
        facts={},
        identity={},
        tokenize=tokenize if perception.task.reads_text else None,
    )


@pytest.fixture(scope="module")
def model(params):
    return model_of(Smooth, params)


@pytest.fixture(scope="module")
def schedule(model):
    return model.perception.solver.schedule


@pytest.fixture(scope="module")
def course(model, data):
    return analysis_of(model, data).run(5)


# ---- against loops by hand -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_hand(model, data):
    """`(z_0, cells, ε)` of the three images; an estimate of x_0 at x and t, and its map."""
    perception, params = model.perception, model.weights
    rgb = jnp.stack([rgb for rgb, _ in examples(data)])
    encode = jax.jit(perception.encode)
    images, masks = targets(data)
    image, latent = encode(params, to_signed(rgb)), encode(params, jnp.asarray(images))

    @jax.jit
    def estimate(params, image, x, t):
        output = perception.network(params, image)(x, t.astype(jnp.float32))
        return perception.solver.schedule.to_x0(output, x, t)

    @jax.jit
    def shown(params, latent):
        return perception.to_prediction(perception.decode(params, latent))

    return (
        *(latent, cells(masks), noise_of(5, 3)),
        *(functools.partial(estimate, params, image), functools.partial(shown, params)),
    )


def scores(data, maps):
    found = [reference_of(m, depth) for m, (_, depth) in zip(maps, examples(data), strict=True)]
    return {name: np.mean([row[name] for row in found]) for name in found[0]}


def reference_of(prediction, depth):
    """The protocol in double precision; it takes the prediction as the grey of an image."""
    return reference(np.asarray(prediction, np.float64) * 255, depth)


def ddim(schedule, estimate, x, times):
    """(t, x, x̂_0) at each of the times."""
    for time, following in zip(times, [*times[1:], 0], strict=True):
        t = jnp.full(3, time)
        x0 = estimate(x, t)
        yield t, x, x0
        x = schedule.add_noise(x0, schedule.noise_between(x, x0, t), jnp.full(3, following))


def test_each_step_s_estimate_is_scored_as_a_prediction(course, by_hand, data, schedule):
    latent, mask, noise, estimate, shown = by_hand
    for step, (t, x, x0) in enumerate(ddim(schedule, estimate, noise, TIMES)):
        expected = scores(data, shown(x0))
        for name in ("abs_rel", "delta1", "rmse"):
            found = course.trajectory[name][step]
            assert found == pytest.approx(expected[name], rel=1e-3, abs=1e-5), (step, name)
        training = schedule.add_noise(latent, noise, t)
        for value, difference in ((course.drift, x - training), (course.x0_error, x0 - latent)):
            squares = np.where(mask, np.asarray(difference, np.float64) ** 2, 0)
            rms = np.sqrt(squares.sum() / (mask.sum() * 4))
            assert value[step] == pytest.approx(rms, rel=1e-3), step
    ceiling = scores(data, shown(latent))
    assert course.ceiling["abs_rel"] == pytest.approx(ceiling["abs_rel"], rel=1e-3)
    assert course.covered == pytest.approx(mask.mean(), rel=1e-6)
    assert 0.5 < course.covered < 1


def test_finishing_begins_at_the_noised_truth(course, by_hand, data, schedule):
    latent, _, noise, estimate, shown = by_hand
    for place, first in enumerate((0, 2, 5)):
        x = schedule.add_noise(latent, noise, jnp.full(3, TIMES[first]))
        *_, (_, _, last) = ddim(schedule, estimate, x, TIMES[first:])
        expected = scores(data, shown(last))["abs_rel"]
        assert course.finished["abs_rel"][place] == pytest.approx(expected, rel=1e-3), first


def test_devices_change_nothing(params, course, data):
    """Three images on two devices: one row is there to fill them up."""
    mesh = make_mesh(data=2, devices=jax.devices()[:2])
    other = analysis_of(model_of(Smooth, params, mesh), data, starts=0).run(5)
    assert other.trajectory.keys() == course.trajectory.keys() == set(METRICS)
    for name, curve in course.trajectory.items():
        np.testing.assert_allclose(other.trajectory[name], curve, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(other.drift, course.drift, rtol=1e-4)
    np.testing.assert_allclose(other.x0_error, course.x0_error, rtol=1e-4)
    assert other.covered == course.covered


def test_the_last_estimate_is_what_the_evaluator_finds(checkpoint, data, tmp_path):
    """With a real network, on all devices, at another resolution, with padding."""
    resolution = {"processing_resolution": 34}
    options = {**resolution, **COURSE, "starts": 0, "batch_size": 2}
    given = {"data_dir": data, "seeds": [3], "output": tmp_path, **options}
    findings = analyze.analyze(str(checkpoint), "folder", **given)
    course = json.loads((tmp_path / "seeds/3.json").read_text())
    model = open_model(str(checkpoint))
    evaluator = Evaluator(
        model.perception,
        "folder",
        mesh=one_device(),
        resolution=model.resolution,
        data_dir=data,
        options=Options(num_steps=STEPS, seed=3),
        pictures=0,
        **resolution,
    )
    result = evaluator.run(jax.device_get(model.weights))
    for name, value in result.means.items():
        assert course["trajectory"][name][-1] == pytest.approx(value, rel=1e-3, abs=1e-5), name
        assert course["baseline"][name] == pytest.approx(result.baseline[name], rel=1e-5)
    assert findings.trajectory.mean[-1] == course["trajectory"]["delta1"][-1]
    assert findings.trivial == course["baseline"]["delta1"]


def test_texts_and_what_is_measured_of_the_raw_map(rng):
    """The image painted as a phrase says, by both protocols of what is referred to."""
    method = {"family": "instruct_pix2pix"}
    changes = {"method": method, "task": "referring", "components": {"text_encoder": TEXT}}
    params = weights(description("gaussian", **changes), rng)
    model = model_of(Told, params, **changes)
    options = {"batch_size": 2, "processing_resolution": 16}
    course = Analysis(model, "referring", limit=2, **COURSE, **options).run(2)
    evaluator = Evaluator(
        model.perception,
        "referring",
        mesh=model.mesh,
        resolution=model.resolution,
        options=Options(num_steps=STEPS, seed=2),
        tokenize=tokenize,
        limit=2,
        **options,
    )
    result = evaluator.run(model.weights)
    assert {"oiou", "miou", "addp_oiou"} <= result.means.keys() == course.trajectory.keys()
    for name, value in result.means.items():
        assert course.trajectory[name][-1] == pytest.approx(value, rel=1e-5), name
        assert len(course.finished[name]) == 3
    assert course.ceiling.keys() == course.baseline.keys() == result.means.keys()


# ---- perfect models ------------------------------------------------------------------------------


def oracle(model, data, scheduler):
    """A model that knows the three images' truth, and that."""
    images, _ = targets(data)
    latent = jax.jit(model.perception.encode)(model.weights, jnp.asarray(images))
    params = {**jax.device_get(model.weights), "truth": {"latent": np.asarray(latent)}}
    return model_of(Oracle, params, scheduler=scheduler), latent


@pytest.mark.parametrize(("scheduler", "starts"), [("DDIMScheduler", 3), ("DDPMScheduler", 0)])
def test_a_perfect_model_does_not_drift_and_knows_all_at_once(model, data, scheduler, starts):
    """Noise that a solver adds is no drift."""
    perfect, _ = oracle(model, data, {**ZERO_SNR, "_class_name": scheduler})
    analysis = analysis_of(perfect, data, starts=starts)
    course = analysis.run(1)
    # float32, through 1 / √(1 − ᾱ) of the last step.
    assert max(course.drift) < 1e-4
    assert max(course.x0_error) < 1e-4
    for name in ("abs_rel", "delta1"):
        for curve in (course.trajectory[name], course.finished.get(name, [])):
            np.testing.assert_allclose(curve, course.ceiling[name], rtol=1e-3, atol=1e-5)
    findings = find(analysis, [course], "delta1", 0.01)
    if findings.gains.mean[-1] > 0:
        assert findings.table.weights[-1] == pytest.approx(98, abs=0.1)
    assert findings.gains.mean.sum() == pytest.approx(
        course.ceiling["delta1"] - course.baseline["delta1"], abs=1e-3
    )
    errors = find(analysis, [course], "abs_rel", 0.01)
    assert (errors.quality, errors.ceiling) == ("-abs_rel", -course.ceiling["abs_rel"])
    assert errors.gains.mean.sum() == pytest.approx(
        course.baseline["abs_rel"] - course.ceiling["abs_rel"], rel=0.01
    )


def test_a_first_sample_without_a_trace_of_the_image_is_drift(model, data):
    """With ᾱ_T > 0 sampling begins elsewhere than training, as even a perfect model shows.

    From there it keeps the noise ε' = (ε − √ᾱ_T z_0) / √(1 − ᾱ_T), not ε.
    """
    perfect, latent = oracle(model, data, {})
    course = analysis_of(perfect, data, starts=0).run(1)
    alphas = perfect.perception.solver.schedule.alphas_cumprod[TIMES]
    z, noise = np.asarray(latent, np.float64), np.asarray(noise_of(1, 3), np.float64)
    kept = (noise - np.sqrt(alphas[0]) * z) / np.sqrt(1 - alphas[0])
    mask = cells(targets(data)[1])
    rms = np.sqrt(np.where(mask, (kept - noise) ** 2, 0).sum() / (mask.sum() * 4))
    np.testing.assert_allclose(course.drift, np.sqrt(1 - alphas) * rms, rtol=1e-2)
    assert max(course.x0_error) < 1e-4


def test_errors_are_known_from_other_metrics():
    names = {
        1: "delta1 oiou addp_oiou p@0.5 max_f mean_f isnet_max_f miou mean_accuracy pooled_a5 "
        "per_image_a11.25 pck@0.1 weighted_f s",
        -1: "abs_rel silog mae isnet_mae pooled_mean per_image_median rmse sad unknown_mse "
        "filled_grad conn mad hce",
    }
    parts = ["", "isnet", "addp", "pooled", "per_image", "unknown", "filled"]
    analysis = types.SimpleNamespace(protocol={"parts": parts})
    for sign, metrics in names.items():
        assert {Analysis.sign(analysis, metric) for metric in metrics.split()} == {sign}
