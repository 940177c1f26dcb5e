import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from jaxpercept.diffusion.schedule import GENPERCEPT, NoiseSchedule
from jaxpercept.errors import UserError

STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
}
LEVELS = [
    {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    {"beta_start": 0.136, "beta_end": 0.192, "beta_schedule": "scaled_linear"},
    {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": [0.01, 0.1, 0.3, 0.2], "num_train_timesteps": 4},
]


def normal(rng, *shape):
    return jnp.asarray(rng.normal(size=shape).astype(np.float32))


def pair(config, oracle=DDIMScheduler):
    return NoiseSchedule.from_config({"_class_name": oracle.__name__, **config}), oracle(**config)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("oracle", [DDIMScheduler, DDPMScheduler])
def test_alphas_cumprod_equal_diffusers(levels, zero_snr, oracle):
    ours, theirs = pair({**levels, "rescale_betas_zero_snr": zero_snr}, oracle)
    # diffusers divides 0 by 0 where ᾱ underflows before it is rescaled.
    expected = np.nan_to_num(theirs.alphas_cumprod.numpy())
    # A few roundings apart: torch multiplies in an order that hangs on the processor.
    np.testing.assert_allclose(ours.alphas_cumprod, expected, rtol=1e-6, atol=6e-8)
    assert ours.alphas_cumprod.dtype == np.float32
    if zero_snr:
        assert ours.alphas_cumprod[-1] == 0


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 7, 10, 50, 999])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_timesteps_equal_diffusers(spacing, num_steps, offset, zero_snr):
    for levels in LEVELS[:4]:
        ours, theirs = pair(
            {
                **levels,
                "timestep_spacing": spacing,
                "steps_offset": offset,
                "rescale_betas_zero_snr": zero_snr,
            }
        )
        theirs.set_timesteps(num_steps)
        np.testing.assert_array_equal(ours.timesteps(num_steps), theirs.timesteps)


def test_documented_timesteps():
    leading = NoiseSchedule.from_config(STABLE_DIFFUSION)
    trailing = NoiseSchedule.from_config({**STABLE_DIFFUSION, "timestep_spacing": "trailing"})
    assert leading.timesteps(1).tolist() == [1]
    assert leading.timesteps(4).tolist() == [751, 501, 251, 1]
    assert trailing.timesteps(4).tolist() == [999, 749, 499, 249]
    assert leading.previous_timesteps(4).tolist() == [501, 251, 1, -249]


def test_documented_levels():
    """Values of ᾱ that the papers' schedules imply, before and after the zero-SNR rescaling."""
    plain = NoiseSchedule.from_config(STABLE_DIFFUSION).alphas_cumprod
    rescaled = NoiseSchedule.from_config({**STABLE_DIFFUSION, "rescale_betas_zero_snr": True})
    steps = [249, 499, 749, 998, 999]
    np.testing.assert_allclose(plain[steps], [0.67543, 0.27767, 0.05662, 0.004717, 0.004660], 1e-3)
    np.testing.assert_allclose(
        rescaled.alphas_cumprod[steps], [0.65419, 0.24236, 0.03317, 1.968e-7, 0], 1e-3
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_conversions_equal_diffusers(rng, prediction_type, zero_snr):
    if prediction_type == "epsilon" and zero_snr:
        pytest.skip("undefined at the last timestep")
    ours, theirs = pair(
        {
            **STABLE_DIFFUSION,
            "prediction_type": prediction_type,
            "rescale_betas_zero_snr": zero_snr,
        }
    )
    x0, noise = normal(rng, 2, 6, 5, 3, 4)
    t = jnp.array([0, 1, 250, 777, 998, 999])
    tensors = [torch.from_numpy(np.array(a)) for a in (x0, noise, t)]
    x_t = ours.add_noise(x0, noise, t)
    np.testing.assert_allclose(x_t, theirs.add_noise(*tensors), atol=1e-6)
    np.testing.assert_allclose(
        ours.velocity(x0, noise, t), theirs.get_velocity(*tensors), atol=1e-6
    )
    (pred,) = normal(rng, 1, *x0.shape)
    theirs.set_timesteps(1000 // 2)
    expected = [
        theirs.step(
            torch.from_numpy(np.array(p)), int(s), torch.from_numpy(np.array(x))
        ).pred_original_sample
        for p, s, x in zip(pred, t, x_t, strict=True)
    ]
    # The noise prediction's x_0 divides rounding errors by √ᾱ_t.
    gain = ours.alphas_cumprod.min() ** -0.5 if prediction_type == "epsilon" else 1
    np.testing.assert_allclose(
        jax.jit(ours.to_x0)(pred, x_t, t), np.stack(expected), rtol=1e-6, atol=1e-6 * gain
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_target_inverts_to_x0_and_noise(rng, prediction_type):
    schedule = NoiseSchedule.from_config({**STABLE_DIFFUSION, "prediction_type": prediction_type})
    x0, noise = normal(rng, 2, 8, 6)
    t = jnp.asarray(rng.integers(100, 700, 8))
    pred, x_t = schedule.target(x0, noise, t), schedule.add_noise(x0, noise, t)
    np.testing.assert_allclose(schedule.to_x0(pred, x_t, t), x0, atol=1e-5)
    np.testing.assert_allclose(schedule.to_noise(pred, x_t, t), noise, atol=1e-5)


def test_genpercept_predicts_minus_the_target_latent(rng):
    target, image = normal(rng, 2, 4, 3, 2, 4)
    t = jnp.asarray(rng.integers(0, 1000, 4))
    np.testing.assert_array_equal(GENPERCEPT.add_noise(target, image, t), image)
    np.testing.assert_array_equal(GENPERCEPT.target(target, image, t), -target)
    np.testing.assert_array_equal(GENPERCEPT.to_x0(-target, image, t), target)
    assert not GENPERCEPT.alphas_cumprod.any()
    GENPERCEPT.check_recoverable()


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_nothing_is_nan_where_the_signal_is_gone(rng, prediction_type):
    schedule = NoiseSchedule.from_config(
        {**GENPERCEPT.to_config(), "prediction_type": prediction_type}
    )
    pred, x_t = normal(rng, 2, 3, 5)
    t = jnp.array([0, 1, 999])

    def total(pred):
        return schedule.to_x0(pred, x_t, t).sum() + schedule.to_noise(pred, x_t, t).sum()

    value, gradient = jax.value_and_grad(total)(jnp.asarray(pred))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()
    if prediction_type == "epsilon":
        with pytest.raises(UserError, match="epsilon"):
            schedule.check_recoverable()


def test_config_round_trip_and_hash():
    config = {**STABLE_DIFFUSION, "_class_name": "PNDMScheduler", "skip_prk_steps": True}
    schedule = NoiseSchedule.from_config(config)
    again = NoiseSchedule.from_config(schedule.to_config())
    assert again == schedule
    assert hash(again) == hash(schedule)
    table = NoiseSchedule.from_config({"trained_betas": [0.1, 0.2], "num_train_timesteps": 2})
    assert NoiseSchedule.from_config(table.to_config()) == table
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = DDIMScheduler.from_config(schedule.to_config())
    np.testing.assert_allclose(schedule.alphas_cumprod, theirs.alphas_cumprod, atol=6e-8)


def test_class_defaults():
    assert NoiseSchedule.from_config({}).clip_sample
    assert NoiseSchedule.from_config({}).set_alpha_to_one
    assert not NoiseSchedule.from_config({"_class_name": "PNDMScheduler"}).set_alpha_to_one
    lcm = NoiseSchedule.from_config({"_class_name": "LCMScheduler"})
    assert (lcm.beta_schedule, lcm.clip_sample) == ("scaled_linear", False)
    euler = NoiseSchedule.from_config({"_class_name": "EulerDiscreteScheduler"})
    assert euler.timestep_spacing == "linspace"


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEuler"),
        ({"beta_schedule": "sigmoid"}, "sigmoid"),
        ({"prediction_type": "flow"}, "flow"),
        ({"timestep_spacing": "karras"}, "karras"),
        ({"thresholding": True}, "thresholding"),
        ({"variance_type": "learned_range"}, "learned_range"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas"),
        ({"snr_shift_scale": 3.0}, "snr_shift_scale"),
        ({"beta_end": 1.5}, "beta"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
    ],
)
def test_unsupported_configs_are_named(config, named):
    with pytest.raises(UserError, match=named):
        NoiseSchedule.from_config(config)


def test_bad_step_counts():
    schedule = NoiseSchedule.from_config(STABLE_DIFFUSION)
    for count in (0, 1001):
        with pytest.raises(UserError, match=str(count)):
            schedule.timesteps(count)
    with pytest.raises(UserError, match="steps_offset"):
        schedule.timesteps(1000)


def test_zero_snr_of_a_constant_schedule_is_refused():
    with pytest.raises(UserError, match="rescale"):
        _ = NoiseSchedule(beta_start=1.0, beta_end=1.0, rescale_betas_zero_snr=True).betas
