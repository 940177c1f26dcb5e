"""Solvers: tables of coefficients that `diffusion.steps.sample` runs.

DDIM, DDPM, LCM and the two Euler methods differ only in eight numbers a step, which are worked out
beforehand, in float64, safely where ᾱ = 0.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxpercept.diffusion.schedule import NoiseSchedule
from jaxpercept.diffusion.steps import Column, Steps, Table
from jaxpercept.errors import UserError

# ---- solvers -------------------------------------------------------------------------------------


def ddim(
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    timesteps: Sequence[int] | None = None,
    eta: float = 0.0,
) -> Steps:
    """Song et al. 2021, arXiv 2010.02502.

    Args:
      timesteps: descending, each step leads to the next; None for the schedule's `num_steps`.
      eta: 0 is deterministic, 1 as noisy as DDPM.
    """
    if timesteps is None:
        t, prev_t = schedule.timesteps(num_steps), schedule.previous_timesteps(num_steps)
    else:
        t = np.asarray(timesteps)
        prev_t = np.append(t[1:], -1)
    levels = _Levels.at(schedule, t)
    before = _alpha_before(schedule, prev_t, float(schedule.final_alpha_cumprod))
    variance = np.zeros(num_steps)
    if eta > 0:
        first = 0 if schedule.set_alpha_to_one else 1  # ᾱ past the last step is 1 or ᾱ_0
        ratio = _alpha_product(schedule, np.where(prev_t >= 0, prev_t + 1, first), t)
        # 1 - ᾱ_t is 0 only where there is nothing to denoise.
        variance = eta**2 * (1 - before) * _divide(1 - ratio, 1 - levels.alpha)
    direction = np.sqrt(np.maximum(1 - before - variance, 0))
    return _steps(
        schedule,
        levels,
        t,
        next_of_x=direction * levels.noise_of_x,
        next_of_output=direction * levels.noise_of_output,
        next_of_x0=np.sqrt(before),
        next_of_noise=np.sqrt(variance),
    )


def ddpm(
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    timesteps: Sequence[int] | None = None,
    variance_type: str = "fixed_small",
) -> Steps:
    """Ho et al. 2020, arXiv 2006.11239, eq. 6 and 7, each step to the next of the timesteps.

    Args:
      timesteps: descending; None for the schedule's `num_steps`. Lotus takes its one step at 999.
      variance_type: "fixed_small", the posterior's, or "fixed_large", β; none at t = 0.
    """
    t = schedule.timesteps(num_steps) if timesteps is None else np.asarray(timesteps)
    prev_t = np.append(t[1:], -1)
    levels = _Levels.at(schedule, t)
    before = _alpha_before(schedule, prev_t, 1.0)
    ratio = _alpha_product(schedule, prev_t + 1, t)
    small = _divide((1 - before) * (1 - ratio), 1 - levels.alpha)
    variance = 1 - ratio if variance_type.startswith("fixed_large") else small
    return _steps(
        schedule,
        levels,
        t,
        next_of_x=_divide(np.sqrt(ratio) * (1 - before), 1 - levels.alpha),
        next_of_x0=_divide(np.sqrt(before) * (1 - ratio), 1 - levels.alpha),
        next_of_noise=np.where(t > 0, np.sqrt(variance), 0),
    )


def lcm(
    schedule: NoiseSchedule,
    num_steps: int,
    *,
    original_inference_steps: int = 50,
    timestep_scaling: float = 10.0,
) -> Steps:
    """Latent consistency models (Luo et al. 2023, arXiv 2310.04378): x_0, then noise again.

    Args:
      original_inference_steps: the steps of distillation, of which some are taken.
      timestep_scaling: of the boundary condition that makes the network the identity at t = 0.

    Raises:
      UserError: more steps than the model was distilled with.
    """
    origin = original_inference_steps
    if not 1 <= num_steps <= origin:
        raise UserError(
            f"The number of inference steps is {num_steps}; this LCM takes from 1 to {origin}."
        )
    distilled = np.arange(origin, 0, -1) * (schedule.num_train_timesteps // origin) - 1
    t = distilled[np.linspace(0, origin, num_steps, endpoint=False).astype(np.int64)]
    levels = _Levels.at(schedule, t)
    scaled, data_deviation = t * timestep_scaling, 0.5
    skip = data_deviation**2 / (scaled**2 + data_deviation**2)
    out = scaled / np.sqrt(scaled**2 + data_deviation**2)
    before = np.append(schedule.alphas_cumprod[t[1:]].astype(np.float64), 1.0)
    return _steps(
        schedule,
        levels,
        t,
        next_of_x=np.sqrt(before) * skip,
        next_of_x0=np.sqrt(before) * out,
        next_of_noise=np.sqrt(1 - before),
    )


def euler(schedule: NoiseSchedule, num_steps: int) -> Steps:
    """Karras et al. 2022, arXiv 2206.00364, algorithm 2 without churn, as diffusers runs it."""
    return _euler(schedule, num_steps, ancestral=False)


def euler_ancestral(schedule: NoiseSchedule, num_steps: int) -> Steps:
    """The Euler method that goes below each noise level and adds noise again (k-diffusion)."""
    return _euler(schedule, num_steps, ancestral=True)


def _euler(schedule: NoiseSchedule, num_steps: int, *, ancestral: bool) -> Steps:
    t = schedule.timesteps(num_steps).astype(np.float64)
    if schedule.timestep_spacing == "linspace":
        t = np.linspace(0, schedule.num_train_timesteps - 1, num_steps)[::-1]
    alphas_cumprod = schedule.alphas_cumprod.astype(np.float64)
    if schedule.rescale_betas_zero_snr:
        alphas_cumprod[-1] = 2.0**-24  # as diffusers, so that the first σ is finite
    if not alphas_cumprod.all():
        raise UserError(
            "The Euler solvers need alphas_cumprod above 0: use DDIMScheduler for this schedule."
        )
    every = np.sqrt((1 - alphas_cumprod) / alphas_cumprod)
    sigma = np.interp(t, np.arange(len(every)), every)
    to = np.append(sigma[1:], 0.0)
    up = np.sqrt(to**2 * (sigma**2 - to**2) / sigma**2) if ancestral else np.zeros(num_steps)
    down = np.sqrt(to**2 - up**2)
    levels = _Levels.of(1 / (sigma**2 + 1), schedule.prediction_type)
    scale = 1 / np.sqrt(sigma**2 + 1)
    steps = _steps(
        schedule,
        levels._replace(x0_of_x=levels.x0_of_x * scale),
        t,
        next_of_x=down / sigma,
        next_of_x0=1 - down / sigma,
        next_of_noise=up,
    )
    first = sigma.max()
    if schedule.timestep_spacing == "leading":
        first = np.sqrt(first**2 + 1)
    return Steps(steps.table._replace(scale=scale), initial_scale=float(first))


# ---- from scheduler_config.json ------------------------------------------------------------------

# Options of these solvers' configs, and the one value of each that is implemented.
_ONLY = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "interpolation_type": "linear",
    "final_sigmas_type": "zero",
    "timestep_type": "discrete",
}


@dataclasses.dataclass(frozen=True)
class Solver:
    """The solver that a `scheduler_config.json` names: `solver.steps(n)` is its table.

    Attributes:
      schedule: the noise schedule.
      class_name: diffusers' name of the solver, such as "DDIMScheduler".
      options: keyword arguments of the function that makes the table.
    """

    schedule: NoiseSchedule
    class_name: str
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, eta: float = 0.0) -> "Solver":
        """`eta` is DDIM's.

        Raises:
          UserError: a class or an option whose steps are not implemented.
        """
        schedule = NoiseSchedule.from_config(config)
        class_name = config.get("_class_name", "DDIMScheduler").removesuffix("Customized")
        if class_name not in _SOLVERS:
            raise UserError(
                f"The scheduler {class_name} cannot be sampled with; supported: "
                f"{', '.join(_SOLVERS)}. Write one of these into scheduler_config.json, most often "
                "DDIMScheduler."
            )
        function, keys = _SOLVERS[class_name]
        for key, only in _ONLY.items():
            if config.get(key) not in (None, only):
                raise UserError(
                    f"The scheduler config has {key}={config[key]!r}; only {only!r} is supported."
                )
        options = {key: config[key] for key in keys if config.get(key) is not None}
        if function is ddim:
            options["eta"] = eta
        return cls(schedule, class_name, tuple(sorted(options.items())))

    def steps(self, num_steps: int, timesteps: Sequence[int] | None = None) -> Steps:
        """The table of `num_steps` steps.

        Args:
          num_steps: how many.
          timesteps: descending, instead of those the schedule would take.

        Raises:
          UserError: the number does not fit the schedule, or x_0 cannot be computed.
        """
        options = dict(self.options)
        if timesteps is not None:
            options["timesteps"] = timesteps
        return _SOLVERS[self.class_name][0](self.schedule, num_steps, **options)


# Function, and the keys of the config it reads.
_SOLVERS: dict[str, tuple[Callable[..., Steps], tuple[str, ...]]] = {
    "DDIMScheduler": (ddim, ()),
    "DDPMScheduler": (ddpm, ("variance_type",)),
    "LCMScheduler": (lcm, ("original_inference_steps", "timestep_scaling")),
    "EulerDiscreteScheduler": (euler, ()),
    "EulerAncestralDiscreteScheduler": (euler_ancestral, ()),
}


# ---- coefficients --------------------------------------------------------------------------------


class _Levels(NamedTuple):
    """What a network output at noise level ᾱ says about x_0 and about the noise, per step."""

    alpha: Column
    x0_of_x: Column
    x0_of_output: Column
    noise_of_x: Column
    noise_of_output: Column

    @classmethod
    def at(cls, schedule: NoiseSchedule, t: Int[np.ndarray, "n"]) -> "_Levels":
        schedule.check_recoverable()
        return cls.of(schedule.alphas_cumprod[t].astype(np.float64), schedule.prediction_type)

    @classmethod
    def of(cls, alpha: Column, prediction_type: str) -> "_Levels":
        signal, sigma, one = np.sqrt(alpha), np.sqrt(1 - alpha), np.ones_like(alpha)
        if prediction_type == "epsilon":
            return cls(alpha, _divide(one, signal), -_divide(sigma, signal), 0 * one, one)
        if prediction_type == "sample":
            return cls(alpha, 0 * one, one, _divide(one, sigma), -_divide(signal, sigma))
        return cls(alpha, signal, -sigma, sigma, signal)


def _steps(
    schedule: NoiseSchedule,
    levels: _Levels,
    timesteps: np.ndarray,
    *,
    next_of_x: Column,
    next_of_x0: Column,
    next_of_noise: Column,
    next_of_output: Column | None = None,
) -> Steps:
    table = Table(
        timestep=timesteps,
        alpha=levels.alpha,
        scale=np.ones(len(timesteps)),
        x0_of_x=levels.x0_of_x,
        x0_of_output=levels.x0_of_output,
        next_of_x=next_of_x,
        next_of_output=np.zeros(len(timesteps)) if next_of_output is None else next_of_output,
        next_of_x0=next_of_x0,
        next_of_noise=next_of_noise,
    )
    return Steps(table, clip=schedule.clip_sample_range if schedule.clip_sample else None)


def _alpha_before(schedule: NoiseSchedule, prev_t: Int[np.ndarray, "n"], final: float) -> Column:
    levels = schedule.alphas_cumprod[np.maximum(prev_t, 0)].astype(np.float64)
    return np.where(prev_t >= 0, levels, final)


def _alpha_product(
    schedule: NoiseSchedule, first: Int[np.ndarray, "n"], last: Int[np.ndarray, "n"]
) -> Column:
    """∏ α_s for first <= s <= last: ᾱ_t / ᾱ_prev, which is 0/0 where both have vanished.

    GenPercept's scheduler uses the product as well (`src/customized_modules/ddim.py`).
    """
    alphas = 1 - schedule.betas.astype(np.float64)
    return np.array([np.prod(alphas[a : b + 1]) for a, b in zip(first, last, strict=True)])


def _divide(numerator: Column, denominator: Column) -> Column:
    """0 where the denominator is 0."""
    safe = np.where(denominator == 0, 1, denominator)
    return np.where(denominator == 0, 0, numerator / safe)
