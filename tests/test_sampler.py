import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from jaxpercept.diffusion.sampler import ddim_sample, ddim_step
from jaxpercept.diffusion.schedule import GENPERCEPT, NoiseSchedule

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]


@pytest.mark.parametrize(
    ("prediction_type", "spacing", "zero_snr", "to_one", "clip"),
    [
        case
        for case in itertools.product(
            PREDICTION_TYPES, ["leading", "trailing"], [False, True], [False, True], [False, True]
        )
        if case[0] != "epsilon" or not case[2]
    ],
)
def test_steps_equal_diffusers(rng, prediction_type, spacing, zero_snr, to_one, clip):
    config = {
        **CONFIG,
        "prediction_type": prediction_type,
        "timestep_spacing": spacing,
        "rescale_betas_zero_snr": zero_snr,
        "set_alpha_to_one": to_one,
        "clip_sample": clip,
        "clip_sample_range": 0.7,
    }
    schedule, oracle = NoiseSchedule.from_config(config), DDIMScheduler(**config)
    # In float32, diffusers' own differences of nearly equal ᾱ are off by up to 7e-4.
    oracle.alphas_cumprod = oracle.alphas_cumprod.double()
    oracle.final_alpha_cumprod = oracle.final_alpha_cumprod.double()
    counts = np.repeat((1, 4, 10, 50), (1, 4, 10, 50))
    t = np.concatenate([schedule.timesteps(n) for n in (1, 4, 10, 50)])
    prev_t = np.concatenate([schedule.previous_timesteps(n) for n in (1, 4, 10, 50)])
    pred, x_t, noise = rng.normal(size=(3, len(t), 5, 4)).astype(np.float32)
    pred64, x64, noise64 = (torch.from_numpy(a).double() for a in (pred, x_t, noise))
    # The noise prediction's x_0 divides rounding errors by √ᾱ_t.
    gain = schedule.alphas_cumprod[t] ** -0.5 if prediction_type == "epsilon" else np.ones(len(t))
    gain = gain[:, None, None]
    for eta in (0.0, 0.6, 1.0):
        sample, x0 = ddim_step(
            schedule, *map(jnp.asarray, (pred, x_t, t, prev_t)), eta=eta, noise=jnp.asarray(noise)
        )
        expected = []
        for row, count in enumerate(counts):
            oracle.num_inference_steps = int(count)
            variance_noise = noise64[row] if eta else None
            step = oracle.step(
                pred64[row], int(t[row]), x64[row], eta=eta, variance_noise=variance_noise
            )
            expected.append((step.prev_sample, step.pred_original_sample))
        expected_sample, expected_x0 = map(np.stack, zip(*expected, strict=True))
        assert (np.abs(x0 - expected_x0) <= 1e-6 * (gain + np.abs(expected_x0))).all()
        # A sample prediction implies its noise through a division by √(1−ᾱ_t).
        tolerance = (1e-5 if prediction_type == "sample" else 3e-6) if eta else 1e-6
        np.testing.assert_allclose(sample, expected_sample, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("to_one", [False, True])
def test_stochastic_step_in_float64(rng, to_one):
    schedule = NoiseSchedule.from_config(
        {
            **CONFIG,
            "prediction_type": "v_prediction",
            "set_alpha_to_one": to_one,
            "clip_sample": False,
        }
    )
    levels = np.cumprod(1 - schedule.betas.astype(np.float64))
    t, prev_t = np.array([999, 500, 21, 1, 1]), np.array([979, 499, 1, 0, -19])
    pred, x_t, noise = rng.normal(size=(3, 5, 7)).astype(np.float32)
    now = levels[t][:, None]
    final = 1.0 if to_one else levels[0]
    before = np.where(prev_t >= 0, levels[np.maximum(prev_t, 0)], final)[:, None]
    x0 = np.sqrt(now) * x_t - np.sqrt(1 - now) * pred
    epsilon = np.sqrt(now) * pred + np.sqrt(1 - now) * x_t
    variance = (1 - before) / (1 - now) * (1 - now / before)
    expected = np.sqrt(before) * x0 + np.sqrt(1 - before - variance) * epsilon
    expected += np.sqrt(variance) * noise
    sample, _ = ddim_step(
        schedule, *map(jnp.asarray, (pred, x_t, t, prev_t)), eta=1.0, noise=jnp.asarray(noise)
    )
    np.testing.assert_allclose(sample, expected, atol=1e-6)


@pytest.mark.parametrize("beta", [(1.0, 1.0), (0.544, 0.768), (0.136, 0.192)])
@pytest.mark.parametrize("num_steps", [1, 50])
def test_vanishing_signal_stays_finite(rng, beta, num_steps):
    schedule = NoiseSchedule.from_config(
        {**GENPERCEPT.to_config(), "beta_start": beta[0], "beta_end": beta[1]}
    )
    t, prev_t = schedule.timesteps(num_steps), schedule.previous_timesteps(num_steps)
    pred, x_t, noise = rng.normal(size=(3, num_steps, 6)).astype(np.float32)
    for eta in (0.0, 1.0):
        sample, x0 = ddim_step(
            schedule, *map(jnp.asarray, (pred, x_t, t, prev_t)), eta=eta, noise=jnp.asarray(noise)
        )
        assert np.isfinite(sample).all()
        assert np.isfinite(x0).all()


def test_underflown_levels_keep_their_ratio(rng):
    """Where ᾱ_t and ᾱ_prev are both 0 in float32, the variance is that of the steps between."""
    schedule = NoiseSchedule.from_config(
        {**GENPERCEPT.to_config(), "beta_start": 0.544, "beta_end": 0.768}
    )
    zero, t, prev_t = jnp.zeros((1, 1)), jnp.array([901]), jnp.array([900])
    sample, _ = ddim_step(schedule, zero, zero, t, prev_t, eta=1.0, noise=jnp.ones((1, 1)))
    np.testing.assert_allclose(sample[0, 0] ** 2, schedule.betas[901], rtol=1e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_sampling_loop_equals_diffusers(rng, prediction_type):
    config = {**CONFIG, "prediction_type": prediction_type, "clip_sample": False, "steps_offset": 1}
    schedule, oracle = NoiseSchedule.from_config(config), DDIMScheduler(**config)
    matrix = rng.normal(size=(4, 4)).astype(np.float32) / 4
    latents = rng.normal(size=(2, 3, 5, 4)).astype(np.float32)

    def predict(x, t, tanh):
        return tanh(x @ matrix) * (1 + 0.1 * t / 1000)

    oracle.set_timesteps(10)
    x = torch.from_numpy(latents)
    for t in oracle.timesteps:
        pred = torch.from_numpy(predict(x.numpy(), int(t), np.tanh))
        x, x0 = oracle.step(pred, t, x, return_dict=False)

    @jax.jit
    def sample(latents):
        return ddim_sample(
            schedule, lambda x, t: predict(x, t[:, None, None, None], jnp.tanh), latents, 10
        )

    last, last_x0 = sample(latents)
    np.testing.assert_allclose(last, x, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(last_x0, x0, rtol=1e-5, atol=1e-5)


def test_one_genpercept_step_negates_the_prediction(rng):
    latents = jnp.asarray(rng.normal(size=(2, 3, 4, 4)).astype(np.float32))
    seen = []

    def predict(x, t):
        jax.debug.callback(lambda t: seen.append(np.asarray(t)), t)
        return 2 * x

    _, x0 = ddim_sample(GENPERCEPT, predict, latents, 1)
    np.testing.assert_array_equal(x0, -2 * latents)
    jax.effects_barrier()
    np.testing.assert_array_equal(seen[0], [1, 1])


def test_network_is_traced_once_whatever_the_number_of_steps():
    traces = []

    def predict(x, t):
        traces.append(t)
        return x

    ddim_sample(GENPERCEPT, predict, jnp.ones((1, 2)), 50)
    assert len(traces) == 1


def test_noise_belongs_to_the_example_not_to_the_row():
    schedule = NoiseSchedule.from_config(CONFIG)
    key = jax.random.key(3)

    def run(index):
        index = jnp.asarray(index)
        latents = jnp.ones((len(index), 8))
        return ddim_sample(schedule, lambda x, t: x / 2, latents, 5, eta=1.0, key=key, index=index)[
            0
        ]

    forward, backward = run([4, 7, 9]), run([9, 7, 4])
    np.testing.assert_array_equal(forward, backward[::-1])
    assert np.abs(forward[0] - forward[1]).max() > 0.01


def test_missing_noise_is_an_error():
    x, t = jnp.ones((1, 2)), jnp.array([3])
    with pytest.raises(ValueError, match="noise"):
        ddim_step(GENPERCEPT, x, x, t, t - 1, eta=0.5)
    with pytest.raises(ValueError, match="key"):
        ddim_sample(GENPERCEPT, lambda x, t: x, x, 2, eta=0.5)
