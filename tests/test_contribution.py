"""Contribution factors against autodiff through diffusers' loops, and weights as published."""

import itertools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.training_utils import compute_snr
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from jaxpercept.diffusion import contribution
from jaxpercept.diffusion.sampler import Solver
from jaxpercept.diffusion.schedule import GENPERCEPT, NoiseSchedule
from jaxpercept.diffusion.steps import sample
from jaxpercept.errors import UserError

CONFIG = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}
PREDICTION_TYPES = ["epsilon", "v_prediction", "sample"]
SPACINGS = ["leading", "trailing", "linspace"]


def schedule(**changes):
    return NoiseSchedule.from_config({"_class_name": "DDIMScheduler", **CONFIG, **changes})


def cases():
    """Solver, prediction type, spacing, zero terminal SNR, whether ᾱ ends at one, and steps."""
    for name, prediction, spacing, zero_snr, to_one in itertools.product(
        ("DDIMScheduler", "DDPMScheduler"), PREDICTION_TYPES, SPACINGS, [False, True], [True, False]
    ):
        if not (zero_snr and prediction == "epsilon") and (to_one or name == "DDIMScheduler"):
            yield name, prediction, spacing, zero_snr, to_one


def through_diffusers(config, num_steps, held):
    """d (x_0, sample) / d output_i in float64, through the steps of diffusers.

    held: at the other steps the network gives the same "output", or what it gives tells of the same
    "noise".
    """
    name = config["_class_name"]
    options = {k: v for k, v in config.items() if not k.startswith("_")}
    theirs = getattr(diffusers, name)(**options)
    theirs.set_timesteps(num_steps)
    for level in ("alphas_cumprod", "final_alpha_cumprod", "alphas", "betas", "one"):
        if hasattr(theirs, level):
            setattr(theirs, level, getattr(theirs, level).double())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 1, 1, dtype=torch.float64, generator=generator)
    noises = torch.randn(num_steps, dtype=torch.float64, generator=generator)
    errors = torch.zeros(num_steps, dtype=torch.float64, requires_grad=True)
    for number, t in enumerate(theirs.timesteps):
        alpha, output = theirs.alphas_cumprod[t], noises[number]
        if held == "noise" and number > 0:
            x0 = (x - (1 - alpha) ** 0.5 * output) / alpha**0.5
            output = {
                "epsilon": output,
                "v_prediction": alpha**0.5 * output - (1 - alpha) ** 0.5 * x0,
                "sample": x0,
            }[config["prediction_type"]]
        output = (output + errors[number]).reshape(x.shape)
        x, x0 = theirs.step(output, t, x, generator=generator, return_dict=False)[:2]
    return {
        "x0": torch.autograd.grad(x0.sum(), errors, retain_graph=True)[0].numpy(),
        "sample": torch.autograd.grad(x.sum(), errors)[0].numpy(),
    }


@pytest.mark.parametrize("held", contribution.HELD)
@pytest.mark.parametrize(("name", "prediction", "spacing", "zero_snr", "to_one"), list(cases()))
def test_factors_are_the_derivatives_of_diffusers_loop(
    rng, name, prediction, spacing, zero_snr, to_one, held
):
    config = {
        "_class_name": name,
        **CONFIG,
        "prediction_type": prediction,
        "timestep_spacing": spacing,
        "rescale_betas_zero_snr": zero_snr,
        "steps_offset": int(spacing == "leading"),
    }
    if name == "DDIMScheduler":
        config["set_alpha_to_one"] = to_one
    solver = Solver.from_config(config)
    s = solver.schedule
    # ᾱ is float32 in both, and DDPM's steps here are products of 1 − β in the place of its ratios.
    rtol = 1e-5 if name == "DDIMScheduler" else 1e-4
    for num_steps in (1, 2, int(rng.integers(3, 40))):
        expected = through_diffusers(config, num_steps, held)
        signal = np.sqrt(s.alphas_cumprod[s.timesteps(num_steps)].astype(np.float64))
        signal = signal if held == "noise" else None
        for result in ("x0", "sample"):
            ours = contribution.sensitivities(solver.steps(num_steps), result, signal)
            scale = np.abs(expected[result]).max()
            np.testing.assert_allclose(ours, expected[result], rtol=rtol, atol=1e-6 * scale)
        factors = contribution.ddim_factors if "DDIM" in name else contribution.ddpm_factors
        ours = factors(s, num_steps, held=held)
        expected = np.abs(expected["x0"])
        np.testing.assert_allclose(ours, expected, rtol=rtol, atol=1e-6 * expected.max())


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("result", ["x0", "sample"])
def test_factors_are_the_derivatives_of_our_loop(rng, name, result):
    """As `steps.sample` runs it, in float32; noise in between changes nothing."""
    steps = Solver.from_config({**CONFIG, "_class_name": name, "steps_offset": 1}).steps(7)
    timesteps = jnp.asarray(steps.table.timestep, jnp.float32)
    start, key = jnp.asarray(rng.normal(size=(1, 3)), jnp.float32), jax.random.key(5)

    def run(outputs):
        def predict(x, t):
            return jnp.full(x.shape, jnp.sum(jnp.where(timesteps == t[0], outputs, 0)))

        x, x0 = sample(steps, predict, start, key=key)
        return (x0 if result == "x0" else x)[0, 0]

    gradient = jax.jit(jax.grad(run))(jnp.asarray(rng.normal(size=7), jnp.float32))
    ours = contribution.sensitivities(steps, result)
    np.testing.assert_allclose(ours, gradient, rtol=1e-4, atol=1e-5 * np.abs(ours).max())


# ---- closed forms --------------------------------------------------------------------------------


def levels(schedule, num_steps):
    """ᾱ of the inference steps, float64, and 1 past the last."""
    return np.append(schedule.alphas_cumprod[schedule.timesteps(num_steps)].astype(np.float64), 1)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [1, 4, 10, 50])
def test_ddim_in_closed_form(spacing, num_steps):
    """Where each step leads to the next one's timestep, whatever lies past the last."""
    for to_one in (True, False):
        options = {"timestep_spacing": spacing, "set_alpha_to_one": to_one}
        s = schedule(**options)
        if not np.array_equal(s.timesteps(num_steps)[1:], s.previous_timesteps(num_steps)[:-1]):
            assert spacing == "linspace"
            continue
        alpha = levels(s, num_steps)
        sigma = np.sqrt((1 - alpha) / alpha)
        for held in contribution.HELD:
            ours = contribution.ddim_factors(s, num_steps, held=held)
            np.testing.assert_allclose(ours, sigma[:-1] - sigma[1:], rtol=1e-9)

        for zero_snr in (False, True):
            s = schedule(prediction_type="v_prediction", rescale_betas_zero_snr=zero_snr, **options)
            angle = np.arccos(np.sqrt(levels(s, num_steps)))
            turn = angle[:-1] - angle[1:]
            later = [np.prod(np.cos(turn[i + 1 :])) for i in range(num_steps)]
            ours = contribution.ddim_factors(s, num_steps)
            np.testing.assert_allclose(ours, np.sin(turn) * later, rtol=1e-8)
            # √ᾱ_i (σ_i − σ_{i+1}), without the infinite σ_1 of zero terminal SNR.
            ours = contribution.ddim_factors(s, num_steps, held="noise")
            np.testing.assert_allclose(ours, np.sin(turn) / np.cos(angle[1:]), rtol=1e-8)

        s = schedule(prediction_type="sample", **options)
        ours = contribution.ddim_factors(s, num_steps, held="noise")
        np.testing.assert_allclose(ours, 1 - sigma[1:] / sigma[:-1], rtol=1e-9)
        np.testing.assert_array_equal(
            contribution.ddim_factors(s, num_steps), np.arange(num_steps) == num_steps - 1
        )


@pytest.mark.parametrize("num_steps", [1, 10, 250, 1000])
def test_ddpm_in_closed_form(num_steps):
    """c_t = β_t / (√ᾱ_t √(1−ᾱ_t)), β_t being that of all the timesteps that a step skips."""
    s = schedule()
    alpha = levels(s, num_steps)
    beta = 1 - alpha[:-1] / alpha[1:]
    expected = beta / np.sqrt(alpha[:-1] * (1 - alpha[:-1]))
    # Steps are products of 1 − β in float32; ᾱ is their rounded product.
    ours = contribution.ddpm_factors(s, num_steps)
    np.testing.assert_allclose(ours, expected, rtol=1e-3 if num_steps > 500 else 1e-4)


def test_the_first_of_marigold_s_steps_counts_one():
    """The limit of no signal: its output is minus the image."""
    s = schedule(
        prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True
    )
    assert contribution.ddim_factors(s, 4, held="noise")[0] == pytest.approx(1)
    assert contribution.ddpm_factors(s, 4, held="noise")[0] == pytest.approx(1)


def test_what_no_factor_can_be_computed_for_is_refused():
    with pytest.raises(UserError, match="epsilon"):
        contribution.ddim_factors(schedule(rescale_betas_zero_snr=True), 10)
    with pytest.raises(UserError, match="is 0 after the first inference step"):
        contribution.ddim_factors(GENPERCEPT, 2, held="noise")
    with pytest.raises(ValueError, match="use output or noise"):
        contribution.ddim_factors(schedule(), 2, held="sample")


# ---- from inference steps to training timesteps --------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    total=st.integers(1, 60),
    part=st.floats(0, 1),
    spacing=st.sampled_from(SPACINGS),
    offset=st.integers(0, 1),
)
def test_each_timestep_belongs_to_the_step_that_covers_it(total, part, spacing, offset):
    num_steps = max(1, round(part * total))
    s = NoiseSchedule(num_train_timesteps=total, timestep_spacing=spacing, steps_offset=offset)
    if spacing == "leading" and (num_steps - 1) * (total // num_steps) + offset >= total:
        return  # refused
    timesteps = s.timesteps(num_steps)
    steps = contribution.step_of_timestep(timesteps, total)
    for t, step in enumerate(steps):
        below = timesteps[step + 1] if step + 1 < num_steps else -1
        assert below < t
        assert t <= timesteps[step] or step == 0
    assert set(steps) == set(range(num_steps))
    np.testing.assert_array_equal(steps[timesteps], np.arange(num_steps))

    factors = np.arange(1.0, num_steps + 1)
    weights = contribution.of_steps(s, factors)
    for step, factor in enumerate(factors):
        covered = weights[steps == step]
        np.testing.assert_allclose(covered, factor**2 / len(covered))


@pytest.mark.parametrize(
    ("s", "num_steps"), [(schedule(prediction_type="sample"), 4), (GENPERCEPT, 2)]
)
def test_factors_of_the_last_step_alone_are_refused(s, num_steps):
    for factors in (contribution.ddim_factors, contribution.ddpm_factors):
        with pytest.raises(UserError, match="the last one alone"):
            contribution.of_steps(s, factors(s, num_steps))
        weights = contribution.of_steps(s, factors(s, 1))
        np.testing.assert_allclose(weights / weights.sum(), 1 / 1000)


# ---- published weights ---------------------------------------------------------------------------


def snr_of(s):
    theirs = diffusers.DDPMScheduler.from_config(s.to_config())
    theirs.alphas_cumprod = torch.tensor(s.alphas_cumprod).double()
    return compute_snr(theirs, torch.arange(s.num_train_timesteps)).numpy()


@pytest.mark.parametrize("zero_snr", [False, True])
def test_weights_by_signal_to_noise(rng, zero_snr):
    k, gamma = rng.uniform(0.3, 3, 2)
    for prediction in PREDICTION_TYPES:
        s = schedule(prediction_type=prediction, rescale_betas_zero_snr=zero_snr)
        snr = snr_of(s)
        assert (snr[-1] == 0) == zero_snr
        np.testing.assert_allclose(contribution.p2(s, k, gamma), (k + snr) ** -gamma, rtol=3e-6)
        np.testing.assert_allclose(contribution.p2(s), 1 / (1 + snr), rtol=3e-6)
        for limit in (5.0, 2 * gamma):
            # In terms of x_0: |Δε|² = SNR |Δx_0|² and |Δv|² = (SNR + 1) |Δx_0|².
            of_x0 = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction]
            ours = contribution.min_snr(s, limit)
            np.testing.assert_allclose(ours * of_x0, np.minimum(snr, limit), rtol=3e-6)
        np.testing.assert_array_equal(contribution.min_snr(s), contribution.min_snr(s, 5.0))
    epsilon = contribution.min_snr(schedule(rescale_betas_zero_snr=zero_snr))
    assert epsilon[-1] == 1  # also in the limit of no signal


def test_a_schedule_that_begins_without_noise_and_ends_without_signal():
    betas = (0.0, 0.5, 1.0)
    s = {
        p: NoiseSchedule(num_train_timesteps=3, trained_betas=betas, prediction_type=p)
        for p in PREDICTION_TYPES
    }
    np.testing.assert_array_equal(contribution.p2(s["epsilon"], 2.0, 1.0), [0, 1 / 3, 1 / 2])
    np.testing.assert_array_equal(contribution.min_snr(s["epsilon"]), [0, 1, 1])
    np.testing.assert_array_equal(contribution.min_snr(s["v_prediction"]), [0, 0.5, 0])
    np.testing.assert_array_equal(contribution.min_snr(s["sample"]), [5, 1, 0])
    for prediction, held in itertools.product(("v_prediction", "sample"), contribution.HELD):
        # What is there at t = 0 is the image: a v counts nothing there, and all after one step.
        ours = contribution.ddim_factors(s[prediction], 3, held=held)
        assert np.isfinite(ours).all()
        assert ours[-1] == (prediction == "sample")


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7), (1.2, 2.0)])
def test_logit_normal_is_its_density(mean, std):
    def density(u):
        return stats.norm.pdf(np.log(u / (1 - u)), mean, std) / (u * (1 - u))

    s = NoiseSchedule(num_train_timesteps=200)
    weights = contribution.logit_normal(s, mean, std)
    assert integrate.quad(density, 0, 1)[0] == pytest.approx(1)
    edges = np.linspace(0, 1, 201)
    with np.errstate(divide="ignore"):
        exact = np.diff(stats.norm.cdf(np.log(edges / (1 - edges)), mean, std))
    np.testing.assert_allclose(weights / weights.sum(), exact, rtol=0.15, atol=2e-2 * exact.max())
    inner = slice(20, 180)  # the midpoint stands for its interval
    np.testing.assert_allclose((weights / weights.sum())[inner], exact[inner], rtol=5e-3)
