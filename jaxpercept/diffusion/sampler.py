"""DDIM sampling (Song et al. 2021, arXiv 2010.02502), safe where ᾱ = 0."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxpercept.diffusion.schedule import NoiseSchedule

PredictFn = Callable[[Float[Array, "b *d"], Int[Array, "b"]], Float[Array, "b *d"]]


def ddim_step(
    schedule: NoiseSchedule,
    pred: Float[Array, "b *d"],
    x_t: Float[Array, "b *d"],
    t: Int[Array, "b"],
    prev_t: Int[Array, "b"],
    *,
    eta: float = 0.0,
    noise: Float[Array, "b *d"] | None = None,
) -> tuple[Float[Array, "b *d"], Float[Array, "b *d"]]:
    """One step from timestep `t` to `prev_t` (negative: past the last one).

    Args:
      pred: network output for (x_t, t), of the schedule's `prediction_type`.
      eta: 0 deterministic, 1 as much noise as DDPM.
      noise: standard normal, needed if eta > 0.

    Returns:
      (sample at `prev_t`, predicted x_0), float32. One-step methods decode the second. x_0 is
      clipped if the schedule says `clip_sample`.
    """
    pred, x_t = pred.astype(jnp.float32), x_t.astype(jnp.float32)
    x0, predicted_noise = schedule.to_x0(pred, x_t, t), schedule.to_noise(pred, x_t, t)
    if schedule.clip_sample:
        x0 = jnp.clip(x0, -schedule.clip_sample_range, schedule.clip_sample_range)
    shape = (t.shape[0],) + (1,) * (x_t.ndim - 1)
    alpha_prev = _previous_alpha_cumprod(schedule, prev_t)
    variance = eta**2 * _posterior_variance(schedule, t, prev_t) if eta > 0 else jnp.zeros(t.shape)
    direction = jnp.sqrt(jnp.maximum(1 - alpha_prev - variance, 0))
    sample = jnp.sqrt(alpha_prev).reshape(shape) * x0 + direction.reshape(shape) * predicted_noise
    if eta > 0:
        if noise is None:
            raise ValueError("ddim_step needs noise when eta > 0.")
        sample += jnp.sqrt(variance).reshape(shape) * noise.astype(jnp.float32)
    return sample, x0


def ddim_sample(
    schedule: NoiseSchedule,
    predict_fn: PredictFn,
    latents: Float[Array, "b *d"],
    num_steps: int,
    *,
    eta: float = 0.0,
    key: Key[Array, ""] | None = None,
    index: Int[Array, "b"] | None = None,
) -> tuple[Float[Array, "b *d"], Float[Array, "b *d"]]:
    """Runs `num_steps` DDIM steps from `latents` as one scan, so predict_fn is traced once.

    Args:
      predict_fn: (x_t float32 [b, ...], t int32 [b]) -> network output [b, ...].
      latents: x_T; pure noise, or the RGB latent for RGB blending and GenPercept.
      eta, key, index: for eta > 0; noise of row i depends only on (key, index[i], step), with
        index = 0..b-1 if None.

    Returns:
      (last sample, last predicted x_0), float32. Marigold decodes the first, GenPercept and
      E2E-FT the second.

    Raises:
      UserError: `num_steps` does not fit the schedule.
    """
    if eta > 0 and key is None:
        raise ValueError("ddim_sample needs a key when eta > 0.")
    batch = latents.shape[0]
    index = jnp.arange(batch) if index is None else index
    latents = latents.astype(jnp.float32)

    def step(carry, inputs):
        x_t, _ = carry
        number, t, prev_t = inputs
        t, prev_t = jnp.full(batch, t), jnp.full(batch, prev_t)
        noise = None
        if eta > 0:
            keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, i), number))(index)
            noise = jax.vmap(lambda k: jax.random.normal(k, latents.shape[1:]))(keys)
        pred = predict_fn(x_t, t)
        return ddim_step(schedule, pred, x_t, t, prev_t, eta=eta, noise=noise), None

    steps = (
        np.arange(num_steps, dtype=np.int32),
        schedule.timesteps(num_steps).astype(np.int32),
        schedule.previous_timesteps(num_steps).astype(np.int32),
    )
    (sample, x0), _ = jax.lax.scan(step, (latents, jnp.zeros_like(latents)), steps)
    return sample, x0


def _previous_alpha_cumprod(schedule: NoiseSchedule, prev_t: Int[Array, "b"]) -> Float[Array, "b"]:
    levels = jnp.asarray(schedule.alphas_cumprod)[jnp.maximum(prev_t, 0)]
    return jnp.where(prev_t >= 0, levels, float(schedule.final_alpha_cumprod))


def _posterior_variance(
    schedule: NoiseSchedule, t: Int[Array, "b"], prev_t: Int[Array, "b"]
) -> Float[Array, "b"]:
    """(1 − ᾱ_prev) / (1 − ᾱ_t) · (1 − ᾱ_t / ᾱ_prev), the DDPM posterior variance.

    The last ratio is 0/0 at ᾱ = 0. It equals the product of the α between the two steps, which is
    what GenPercept's scheduler uses (`src/customized_modules/ddim.py`).
    """
    alpha_prev = _previous_alpha_cumprod(schedule, prev_t)
    noise = 1 - jnp.asarray(schedule.alphas_cumprod)[t]
    safe_noise = jnp.where(noise > 0, noise, 1)
    return (1 - alpha_prev) / safe_noise * _one_minus_alpha_product(schedule, t, prev_t)


def _one_minus_alpha_product(
    schedule: NoiseSchedule, t: Int[Array, "b"], prev_t: Int[Array, "b"]
) -> Float[Array, "b"]:
    """1 − ∏_{prev_t < s ≤ t} α_s, from cumulative sums of log α that skip (and count) zeros.

    The sums reach −10³ where ᾱ underflows, so each is a pair of float32.
    """
    alphas = 1 - schedule.betas.astype(np.float64)
    logs = np.log(np.where(alphas > 0, alphas, 1))
    cumulative = np.concatenate([[0.0], np.cumsum(logs)])
    zeros = np.concatenate([[0], np.cumsum(alphas == 0)]).astype(np.int32)
    high = cumulative.astype(np.float32)
    low = (cumulative - high).astype(np.float32)
    # Entry k covers s < k. Past the last step, ᾱ_prev is 1 or ᾱ_0.
    before_all = 0 if schedule.set_alpha_to_one else 1
    end, start = t + 1, jnp.where(prev_t >= 0, prev_t + 1, before_all)

    def between(table):
        table = jnp.asarray(table)
        return table[end] - table[start]

    return jnp.where(between(zeros) > 0, 1.0, -jnp.expm1(between(high) + between(low)))
