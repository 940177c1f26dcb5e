import itertools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxpercept.diffusion import sampler
from jaxpercept.diffusion.noise import per_example
from jaxpercept.diffusion.sampler import Solver
from jaxpercept.diffusion.schedule import GENPERCEPT, NoiseSchedule
from jaxpercept.diffusion.steps import draws_noise, ideal_path, sample, sample_from, trajectory
from jaxpercept.errors import UserError

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]
SPACINGS = ["leading", "trailing", "linspace"]
MODULES = {
    "DDIMScheduler": "scheduling_ddim",
    "DDPMScheduler": "scheduling_ddpm",
    "LCMScheduler": "scheduling_lcm",
    "EulerDiscreteScheduler": "scheduling_euler_discrete",
    "EulerAncestralDiscreteScheduler": "scheduling_euler_ancestral_discrete",
}


def network(x, t, tanh):
    """Some smooth function of sample and timestep."""
    return tanh(x * 0.7 + np.float32(0.3)) * (1 + t / 2000)


def ours(config, latents, num_steps, *, key, eta=0.0):
    steps = Solver.from_config(config, eta=eta).steps(num_steps)
    run = jax.jit(
        lambda x: sample(
            steps, lambda x, t: network(x, t[:, None, None, None], jnp.tanh), x, key=key
        )
    )
    return run(jnp.asarray(latents))


def theirs(monkeypatch, config, latents, num_steps, *, key, eta=0.0):
    """diffusers' loop in float64, with the same noise."""
    name = config["_class_name"]
    options = {k: v for k, v in config.items() if not k.startswith("_")}
    oracle = getattr(diffusers, name)(**options)
    oracle.set_timesteps(num_steps)
    for level in ("alphas_cumprod", "final_alpha_cumprod", "alphas", "betas", "one"):
        if hasattr(oracle, level):
            setattr(oracle, level, getattr(oracle, level).double())
    count = itertools.count()
    index = jnp.arange(len(latents))

    def noise(*_, **__):
        number = next(count)
        draw = per_example(
            key,
            index,
            lambda k: jax.random.normal(jax.random.fold_in(k, number), latents.shape[1:]),
        )
        return torch.from_numpy(np.array(draw)).double()

    monkeypatch.setattr(getattr(diffusers.schedulers, MODULES[name]), "randn_tensor", noise)
    x = torch.from_numpy(latents).double() * oracle.init_noise_sigma
    extra = {"eta": eta} if name == "DDIMScheduler" else {}
    for t in oracle.timesteps:
        output = network(oracle.scale_model_input(x, t).double().numpy(), float(t), np.tanh)
        x, x0 = oracle.step(torch.from_numpy(output), t, x, return_dict=False, **extra)[:2]
    return x.numpy(), x0.numpy()


def cases():
    for name, prediction, spacing, zero_snr in itertools.product(
        MODULES, PREDICTION_TYPES, SPACINGS, [False, True]
    ):
        is_euler = name.startswith("Euler")
        if zero_snr and prediction == "epsilon" and not is_euler:
            continue  # refused
        if name == "EulerAncestralDiscreteScheduler" and prediction == "sample":
            continue  # not implemented in diffusers
        if name == "LCMScheduler" and spacing != "leading":
            continue  # has its own timesteps
        yield name, prediction, spacing, zero_snr


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # diffusers' Euler, NumPy 2
@pytest.mark.parametrize(("name", "prediction_type", "spacing", "zero_snr"), list(cases()))
def test_loops_equal_diffusers(rng, monkeypatch, name, prediction_type, spacing, zero_snr):
    config = {
        "_class_name": name,
        **CONFIG,
        "prediction_type": prediction_type,
        "timestep_spacing": spacing,
        "rescale_betas_zero_snr": zero_snr,
        "steps_offset": int(spacing == "leading"),
    }
    if not name.startswith("Euler"):
        config |= {"clip_sample": bool(rng.integers(2)), "clip_sample_range": 0.7}
    if name.startswith(("DDIM", "LCM")):
        config["set_alpha_to_one"] = bool(rng.integers(2))
    if name.startswith("DDPM"):
        config["variance_type"] = str(rng.choice(["fixed_small", "fixed_large"]))
    latents = rng.normal(size=(2, 3, 5, 4)).astype(np.float32)
    eta = float(rng.choice([0.0, 0.6, 1.0])) if name.startswith("DDIM") else 0.0
    key = jax.random.key(int(rng.integers(2**31)))
    for num_steps in (1, 4):
        got = ours(config, latents, num_steps, key=key, eta=eta)
        want = theirs(monkeypatch, config, latents, num_steps, key=key, eta=eta)
        # With zero terminal SNR the Euler solvers start at sigma = 4096.
        tolerance = 2e-4 if name.startswith("Euler") and zero_snr else 5e-5
        for a, b in zip(got, want, strict=True):
            assert np.abs(a - b).max() <= tolerance * np.abs(b).max(), num_steps


@pytest.mark.parametrize("to_one", [False, True])
def test_stochastic_steps_in_float64(rng, to_one):
    config = {**CONFIG, "prediction_type": "v_prediction", "set_alpha_to_one": to_one}
    schedule = NoiseSchedule.from_config({**config, "clip_sample": False})
    levels = np.cumprod(1 - schedule.betas.astype(np.float64))
    steps = sampler.ddim(schedule, 50, eta=1.0).table
    t, prev_t = schedule.timesteps(50), schedule.previous_timesteps(50)
    x, output, noise = rng.normal(size=(3, 50))
    now = levels[t]
    before = np.where(prev_t >= 0, levels[np.maximum(prev_t, 0)], 1.0 if to_one else levels[0])
    x0 = np.sqrt(now) * x - np.sqrt(1 - now) * output
    epsilon = np.sqrt(now) * output + np.sqrt(1 - now) * x
    variance = (1 - before) / (1 - now) * (1 - now / before)
    want = np.sqrt(before) * x0 + np.sqrt(1 - before - variance) * epsilon
    want += np.sqrt(variance) * noise
    got = steps.next_of_x * x + steps.next_of_output * output + steps.next_of_x0 * x0
    np.testing.assert_allclose(got + steps.next_of_noise * noise, want, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("solver", [sampler.ddim, sampler.ddpm])
@pytest.mark.parametrize("beta", [(1.0, 1.0), (0.544, 0.768), (0.136, 0.192)])
@pytest.mark.parametrize("num_steps", [1, 50])
def test_vanishing_signal_stays_finite(beta, num_steps, solver):
    schedule = NoiseSchedule.from_config(
        {**GENPERCEPT.to_config(), "beta_start": beta[0], "beta_end": beta[1]}
    )
    options = {"eta": 1.0} if solver is sampler.ddim else {}
    for column in solver(schedule, num_steps, **options).table:
        assert np.isfinite(np.asarray(column, np.float32)).all()


def test_underflown_levels_keep_their_ratio():
    """Where ᾱ_t and ᾱ_prev are both 0 in float32, the variance is that of the steps between."""
    schedule = NoiseSchedule.from_config(
        {**GENPERCEPT.to_config(), "beta_start": 0.544, "beta_end": 0.768, "steps_offset": 0}
    )
    steps = sampler.ddim(schedule, 1000, eta=1.0).table
    row = list(steps.timestep).index(901)
    np.testing.assert_allclose(steps.next_of_noise[row] ** 2, schedule.betas[901], rtol=1e-5)


def test_one_step_at_a_given_timestep_gives_x0(rng):
    """Lotus-G: a single DDPM step at t = 999."""
    schedule = NoiseSchedule.from_config(
        {**CONFIG, "prediction_type": "sample", "clip_sample": False}
    )
    steps = sampler.ddpm(schedule, 1, timesteps=(999,))
    latents = jnp.asarray(rng.normal(size=(2, 4, 4, 4)), jnp.float32)
    last, x0 = sample(steps, lambda x, t: x * t[0], latents)
    np.testing.assert_array_equal(last, x0)
    np.testing.assert_allclose(x0, latents * 999, rtol=1e-6)


def test_one_genpercept_step_negates_the_prediction(rng):
    latents = jnp.asarray(rng.normal(size=(2, 3, 4, 4)).astype(np.float32))
    seen = []

    def predict(x, t):
        jax.debug.callback(lambda t: seen.append(np.asarray(t)), t)
        return 2 * x

    _, x0 = sample(sampler.ddim(GENPERCEPT, 1), predict, latents)
    np.testing.assert_array_equal(x0, -2 * latents)
    jax.effects_barrier()
    np.testing.assert_array_equal(seen[0], [1, 1])


def test_network_is_traced_once_whatever_the_number_of_steps():
    traces = []

    def predict(x, t):
        traces.append(t)
        return x

    sample(sampler.ddim(GENPERCEPT, 50), predict, jnp.ones((1, 2)))
    assert len(traces) == 1


def test_noise_belongs_to_the_example_not_to_the_row():
    steps = sampler.ddpm(NoiseSchedule.from_config(CONFIG), 5)

    def run(index):
        latents = jnp.ones((len(index), 8))
        options = {"key": jax.random.key(3), "index": jnp.asarray(index)}
        return sample(steps, lambda x, t: x / 2, latents, **options)[0]

    forward, backward = run([4, 7, 9]), run([9, 7, 4])
    np.testing.assert_array_equal(forward, backward[::-1])
    assert np.abs(forward[0] - forward[1]).max() > 0.01


@pytest.mark.parametrize("class_name", MODULES)
def test_a_trajectory_goes_on_from_where_it_was_left(class_name, rng):
    steps = Solver.from_config({**CONFIG, "_class_name": class_name}).steps(6)
    key, index = jax.random.key(int(rng.integers(1000))), jnp.array([5, 2])

    def predict(x, t):
        return network(x, t[:, None], jnp.tanh)

    start = jnp.asarray(rng.standard_normal((2, 7)), jnp.float32)
    whole = trajectory(steps, predict, start, key=key, index=index)
    last, x0 = sample(steps, predict, start, key=key, index=index)
    np.testing.assert_allclose(whole.last, last, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(whole.x0[-1], x0, rtol=1e-5, atol=1e-5)
    assert whole.x.shape == whole.x0.shape == (6, 2, 7)
    resume = jax.jit(lambda x, i: sample_from(steps, predict, x, i, key=key, index=index))
    for done in range(6):
        resumed = resume(whole.x[done], jnp.int32(done))
        np.testing.assert_allclose(resumed, (last, x0), rtol=1e-5, atol=1e-5)
        entered = whole.x[done] if done else start
        rest = trajectory(steps.between(done), predict, entered, key=key, index=index)
        assert len(rest.x) == 6 - done
        np.testing.assert_allclose(rest.last, last, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(rest.x0, whole.x0[done:], rtol=1e-5, atol=1e-5)
        again = steps.between(done // 2).between(done - done // 2)
        assert again.first == done
        if done:
            before, _ = sample(steps.between(0, done), predict, start, key=key, index=index)
            np.testing.assert_allclose(before, entered, rtol=1e-5, atol=1e-5)
    for wrong in [(-1, 3), (6, None), (2, 2), (0, 7)]:
        with pytest.raises(ValueError, match="steps"):
            steps.between(*wrong)


@pytest.mark.parametrize("class_name", MODULES)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_ideal_path_is_that_of_a_perfect_network(class_name, prediction_type, rng):
    """From training's first sample on; what a solver adds is part of it."""
    config = {**CONFIG, "_class_name": class_name, "prediction_type": prediction_type}
    steps = Solver.from_config({**config, "clip_sample": False}).steps(5)
    key, index = jax.random.key(int(rng.integers(1000))), jnp.array([5, 2])
    x0, noise = (jnp.asarray(rng.standard_normal((2, 70)), jnp.float32) for _ in range(2))
    path = ideal_path(steps, x0, noise, key=key, index=index)
    times, alphas, scales = steps.table.timestep, steps.table.alpha, steps.table.scale
    np.testing.assert_allclose(
        path[0], np.sqrt(alphas[0]) * x0 + np.sqrt(1 - alphas[0]) * noise, rtol=1e-5, atol=1e-5
    )

    def perfect(x, t):
        alpha = jnp.asarray(alphas, jnp.float32)[jnp.argmin(jnp.abs(times - t[0]))]
        signal, sigma = jnp.sqrt(alpha), jnp.sqrt(1 - alpha)
        epsilon = (x - signal * x0) / sigma
        outputs = {"epsilon": epsilon, "v_prediction": signal * epsilon - sigma * x0, "sample": x0}
        return outputs[prediction_type]

    start = path[0] / (scales[0] * steps.initial_scale)
    whole = trajectory(steps, perfect, start.astype(jnp.float32), key=key, index=index)
    np.testing.assert_allclose(whole.x0, np.broadcast_to(x0, whole.x0.shape), atol=1e-3)
    np.testing.assert_allclose(scales[:, None, None] * whole.x, path, atol=1e-3)
    if not draws_noise(steps):
        signal, sigma = np.sqrt([alphas, 1 - alphas])[:, :, None, None]
        seen = signal * np.asarray(x0) + sigma * np.asarray(noise)
        np.testing.assert_allclose(path, seen, atol=1e-3)
    else:  # other noise, as much of it
        assert class_name not in ("DDIMScheduler", "EulerDiscreteScheduler")
        left = (path[-1] - np.sqrt(alphas[-1]) * x0) / np.sqrt(1 - alphas[-1])
        assert np.abs(left - noise).max() > 0.1


def test_missing_key_is_an_error():
    steps = sampler.ddim(GENPERCEPT, 2, eta=0.5)
    with pytest.raises(ValueError, match="key"):
        sample(steps, lambda x, t: x, jnp.ones((1, 2)))


@pytest.mark.parametrize(
    ("config", "num_steps", "words"),
    [
        ({"_class_name": "PNDMScheduler"}, 4, "PNDMScheduler.*DDIMScheduler"),
        (
            {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True},
            4,
            "use_karras_sigmas",
        ),
        ({"_class_name": "EulerDiscreteScheduler", "final_sigmas_type": "sigma_min"}, 4, "zero"),
        ({"_class_name": "LCMScheduler"}, 51, "51.*from 1 to 50"),
        ({**CONFIG, "rescale_betas_zero_snr": True}, 4, "v_prediction"),
        (
            {**GENPERCEPT.to_config(), "_class_name": "EulerDiscreteScheduler"},
            4,
            "DDIMScheduler",
        ),
        ({**CONFIG}, 1001, "1001"),
    ],
)
def test_what_cannot_be_sampled_is_refused(config, num_steps, words):
    with pytest.raises(UserError, match=words):
        Solver.from_config(config).steps(num_steps)
