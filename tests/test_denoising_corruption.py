"""Denoising of corrupted targets: what the network learns then, against torch and by algebra."""

import dataclasses
import functools

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_denoising import LATENT, ROWS, WIDE, encoded, inputs_of, latent, method, networks  # noqa: F401
from test_methods import nchw

from jaxpercept.diffusion.noise import per_example
from jaxpercept.diffusion.schedule import GENPERCEPT, NoiseSchedule
from jaxpercept.diffusion.timesteps import sample_timesteps
from jaxpercept.errors import UserError
from jaxpercept.methods.denoising import _CORRUPTION_KEY
from jaxpercept.methods.one_step import to_signed

LATENT_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULES = [
    NoiseSchedule(**LATENT_DIFFUSION),
    NoiseSchedule(**LATENT_DIFFUSION, rescale_betas_zero_snr=True),
    NoiseSchedule(beta_schedule="linear"),
    NoiseSchedule(beta_schedule="squaredcos_cap_v2", num_train_timesteps=50),
    GENPERCEPT,
]
TYPES = ("v_prediction", "epsilon", "sample")


# ---- what the network learns ---------------------------------------------------------------------


@functools.cache
def meanings(schedule):
    """The clean targets that right outputs mean, "released" and "consistent"."""

    @jax.jit
    def compute(clean, corrupted, noise, t):
        x = schedule.add_noise(corrupted, noise, t)
        between = schedule.noise_between(x, clean, t)
        again = schedule.add_noise(clean, between, t)
        meant = [schedule.to_x0(schedule.target(clean, n, t), x, t) for n in (noise, between)]
        return x, again, *meant

    return compute


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(SCHEDULES), st.sampled_from(TYPES))
def test_a_right_output_means_the_clean_target(seed, schedule, kind):
    """Exactly, if it is "consistent"; as released a v-prediction means a blend."""
    rng = np.random.default_rng(seed)
    schedule = dataclasses.replace(schedule, prediction_type=kind)
    t = rng.integers(0, schedule.num_train_timesteps, 4).astype(np.int32)
    clean, corrupted, noise = rng.normal(size=(3, 4, 3, 5, 2)).astype(np.float32)
    x, again, released, consistent = meanings(schedule)(clean, corrupted, noise, t)
    np.testing.assert_allclose(again, x, atol=1e-5)
    abar = schedule.alphas_cumprod[t].astype(np.float64)[:, None, None, None]
    expected = {
        "v_prediction": abar * corrupted + (1 - abar) * clean,
        "epsilon": corrupted,
        "sample": clean,
    }[kind]
    for row in range(4):
        if kind == "epsilon" and abar[row] == 0:
            continue  # the output says nothing about the target
        # A noise of 1e-6 is divided by the signal's part.
        tolerance = 1e-5 if kind != "epsilon" else 1e-5 + 2e-6 / float(abar[row].item()) ** 0.5
        np.testing.assert_allclose(consistent[row], clean[row], atol=tolerance)
        np.testing.assert_allclose(released[row], expected[row], atol=tolerance)


@pytest.mark.parametrize(("kind", "passes"), [(TYPES[0], 1), (TYPES[1], 0), (TYPES[2], 1)])
def test_what_it_costs(networks, rng, kind, passes):  # noqa: F811
    """A pass of the encoder where the clean latents are wanted as well: not with epsilon."""
    _, _, params = networks
    batch, key = inputs_of(rng)
    scheduler = {"prediction_type": kind}

    def operations(function, *args):
        return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]

    plain, m = (
        method("gaussian", timesteps="uniform", scheduler=scheduler, corruption=corruption)
        for corruption in ("none", "increasing")
    )
    inputs = (params[8], batch, key)
    more = operations(m.loss, *inputs) - operations(plain.loss, *inputs)
    t = jnp.zeros(ROWS, jnp.int32)
    alone = operations(lambda batch: m._corrupted(key, batch, t), batch)
    encoder = operations(m.perception.encode, params[8], to_signed(batch["rgb"]))
    assert (more - alone) / encoder == pytest.approx(passes, abs=0.1)


def test_without_noise_there_is_none_between(rng):
    """ᾱ = 1: finite, and with finite gradients."""
    schedule = NoiseSchedule(beta_start=0.0, prediction_type="v_prediction")
    clean, corrupted, noise = rng.normal(size=(3, 1, 2, 3, 1)).astype(np.float32)
    t = np.zeros(1, np.int32)
    x, _, _, meant = meanings(schedule)(clean, corrupted, noise, t)
    np.testing.assert_array_equal(x, corrupted)
    np.testing.assert_array_equal(meant, x)

    def total(x):
        return schedule.noise_between(x, jnp.asarray(clean), jnp.asarray(t)).sum()

    np.testing.assert_array_equal(jax.grad(total)(x), np.zeros_like(clean))


# ---- the loss ------------------------------------------------------------------------------------


def corruption_keys(key, index):
    return per_example(jax.random.fold_in(key, _CORRUPTION_KEY), index, lambda k: k)


def share_of(intensity, t):
    rises = (t + 1) / 1000
    return {"increasing": rises, "constant": 0 * t + 0.5005, "decreasing": 1.001 - rises}[intensity]


def blurred(batch, strength, keys):
    """The depth image of a batch, blurred by OpenCV."""
    batch = jax.tree.map(np.asarray, batch)
    near, far = (batch["depth_range"][:, i, None, None, None] for i in (0, 1))
    depth = np.clip((batch["depth"] - near) / (far - near), 0, 1)
    rows = []
    for image, s, key in zip(depth, strength, keys, strict=True):
        sigma = 10 * float(s) * float(jax.random.uniform(key))
        rows.append(cv2.GaussianBlur(image, (31, 31), sigma)[..., None])
    return np.stack(rows).repeat(3, -1) * 2 - 1


@pytest.mark.parametrize(
    ("kind", "wanted"), [("v_prediction", "released"), ("epsilon", "consistent")]
)
def test_the_loss_is_that_of_torch(networks, rng, kind, wanted):  # noqa: F811
    unets, vae, params = networks
    intensity = str(rng.choice(["increasing", "constant", "decreasing"]))
    options = {"corruption": intensity, "corruption_strength": 1.5, "corruption_target": wanted}
    # Where much of the target is left, the two objectives differ most.
    policy, scheduler = "weighted:0,1,1,1,0,0,0,0,0,0", {"prediction_type": kind}
    m = method("gaussian", scheduler=scheduler, timesteps=policy, **options)
    batch, key = inputs_of(rng)
    loss_fn = jax.jit(m.loss)
    loss, _ = loss_fn(params[8], batch, key)

    key_t, key_noise = jax.random.split(key)
    t = np.asarray(sample_timesteps(policy, key_t, batch["index"], m.solver.schedule))
    draw = functools.partial(jax.random.normal, shape=LATENT)
    noise = nchw(np.asarray(per_example(key_noise, batch["index"], draw)))
    keys = corruption_keys(key, batch["index"])
    with torch.no_grad():
        image, clean, cells = encoded(vae, batch)
        corrupted = latent(
            vae, blurred(batch, 1.5 * share_of(intensity, t), keys).astype(np.float32)
        )
        abar = torch.tensor(m.solver.schedule.alphas_cumprod[t]).double()[:, None, None, None]
        x = abar.sqrt() * corrupted + (1 - abar).sqrt() * noise
        if wanted == "consistent":
            noise = (x - abar.sqrt() * clean) / (1 - abar).sqrt()
        velocity = abar.sqrt() * noise - (1 - abar).sqrt() * clean
        target = {"v_prediction": velocity, "epsilon": noise}[kind]
        prompt = torch.tensor(params[4]["prompt"]["embedding"]).repeat(ROWS, 1, 1)
        inputs = torch.cat([image, x.float()], dim=1)
        output = unets[8](inputs, torch.tensor(t), prompt).sample
        expected = F.mse_loss(output[cells], target[cells].float()).item()
    assert float(loss) == pytest.approx(expected, rel=1e-4)

    # Rows come in any order, and each has the randomness of its own index.
    order = rng.permutation(ROWS)
    turned = loss_fn(params[8], {k: x[order] for k, x in batch.items()}, key)[0]
    assert float(turned) == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("corruption", ["increasing", "constant", "decreasing"])
def test_corrupted_targets(rng, corruption):
    """Each has the intensity of its timestep and its own randomness, on any device."""
    m = method("gaussian", corruption=corruption, corruption_strength=0.8)
    batch, key = inputs_of(rng)
    batch = {k: jnp.concatenate([x, x[:1]]) for k, x in batch.items()}
    batch["index"] = jnp.asarray(rng.choice(1000, 4, replace=False), jnp.int32)
    t = np.array([0, 400, 700, 999], np.int32)
    run = jax.jit(m._corrupted)
    ours = np.asarray(run(key, batch, t))
    keys = corruption_keys(key, batch["index"])
    expected = blurred(batch, 0.8 * share_of(corruption, t), keys)
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    if corruption == "increasing":  # at t = 0 by 0.01 pixels at most
        np.testing.assert_allclose(ours[0], m.task.encode_target(batch).image[0], atol=1e-6)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    split = jax.device_put((batch, t), NamedSharding(mesh, P("data")))
    np.testing.assert_allclose(run(key, *split), ours, atol=1e-5)


# ---- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (
            {"corruption": "rising"},
            "method.corruption is 'rising': use none or increasing",
        ),
        ({"corruption_target": "both"}, "corruption_target is 'both': use released or consistent"),
        ({"corruption_strength": 0.0}, "corruption_strength is 0.0: give a value above 0"),
        ({"corruption_strength": 5.0}, "corruption_strength is 5.0: .* at most 4"),
    ],
)
def test_options_that_do_not_fit_are_named(options, complaint):
    with pytest.raises(UserError, match=complaint):
        method("gaussian", **options)
