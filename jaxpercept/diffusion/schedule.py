"""The forward diffusion process: noise levels, prediction types and inference timesteps.

Everything is read from a diffusers `scheduler_config.json`. Notation: ᾱ_t = ∏_{s≤t} (1 − β_s),
x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε and v = √ᾱ_t ε − √(1−ᾱ_t) x_0 (Salimans & Ho 2022). In GenPercept
(arXiv 2403.06090) ε is the RGB latent and β = 1, so that ᾱ = 0, x_t = ε and v = −x_0.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxpercept.errors import UserError

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")

# Classes whose config describes a variance-preserving discrete process.
_SCHEDULER_CLASSES = (
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDIMSchedulerCustomized",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DDPMSchedulerCustomized",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "TCDScheduler",
    "UniPCMultistepScheduler",
)
# Where the classes' defaults differ: GenPercept's two customised classes inherit diffusers'.
_CLIPPING_CLASSES = ("DDIM", "DDPM")
_LCM_CLASSES = ("LCMScheduler", "TCDScheduler")
_LINSPACE_CLASSES = ("Euler", "LMS", "Heun", "KDPM2", "DPMSolverM", "UniPC", "DEIS")

# Options of particular solvers: they change how those solvers step, not the forward process.
_INERT_KEYS = (
    "algorithm_type",
    "disable_corrector",
    "dynamic_thresholding_ratio",
    "euler_at_final",
    "final_sigmas_type",
    "flow_shift",
    "interpolation_type",
    "lambda_min_clipped",
    "lower_order_final",
    "original_inference_steps",
    "power_beta_curve",
    "predict_x0",
    "sample_max_value",
    "shift_terminal",
    "sigma_max",
    "sigma_min",
    "skip_prk_steps",
    "solver_order",
    "solver_p",
    "solver_type",
    "time_shift_type",
    "timestep_scaling",
    "timestep_type",
    "use_beta_sigmas",
    "use_exponential_sigmas",
    "use_karras_sigmas",
    "use_lu_lambdas",
)
_MUST_BE_OFF = ("thresholding", "use_flow_sigmas", "use_dynamic_shifting")
_FIXED_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log")


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """A discrete variance-preserving noise schedule; hashable, so it can be a static jit argument.

    Fields carry the names and meanings of diffusers' `scheduler_config.json`. Methods take
    timesteps `t`, int [b], one per example, and arrays [b, ...]; all arithmetic is float32.

    Raises:
      UserError: a field has a value that no supported schedule has.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    rescale_betas_zero_snr: bool = False
    clip_sample: bool = True
    clip_sample_range: float = 1.0

    def __post_init__(self):
        _require_choice("beta_schedule", self.beta_schedule, BETA_SCHEDULES)
        _require_choice("prediction_type", self.prediction_type, PREDICTION_TYPES)
        _require_choice("timestep_spacing", self.timestep_spacing, TIMESTEP_SPACINGS)
        if self.num_train_timesteps < 1:
            raise UserError(f"num_train_timesteps={self.num_train_timesteps} must be at least 1.")
        betas = self.trained_betas or (self.beta_start, self.beta_end)
        if not all(0 <= beta <= 1 for beta in betas):
            raise UserError("The scheduler config has a beta outside [0, 1]; correct it.")
        if self.trained_betas and len(self.trained_betas) != self.num_train_timesteps:
            raise UserError(
                f"trained_betas has {len(self.trained_betas)} values but num_train_timesteps is "
                f"{self.num_train_timesteps}; make them equal."
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "NoiseSchedule":
        """Builds the schedule from the content of `scheduler_config.json`.

        Absent keys take the default of the class named by `_class_name` (DDIMScheduler if none).

        Raises:
          UserError: names an unsupported scheduler class, key or value.
        """
        name = config.get("_class_name", "DDIMScheduler")
        _require_choice("_class_name", name, _SCHEDULER_CLASSES)
        values = _class_defaults(name)
        fields = {field.name for field in dataclasses.fields(cls)}
        for key, value in config.items():
            if key in fields:
                values[key] = value
            elif key in _MUST_BE_OFF:
                _require_choice(key, value, (False, None))
            elif key == "variance_type":
                _require_choice(key, value, (*_FIXED_VARIANCES, None))
            elif key not in _INERT_KEYS and not key.startswith("_"):
                raise UserError(f"The scheduler config has an unsupported key {key!r}; remove it.")
        if values.get("trained_betas") is not None:
            values["trained_betas"] = tuple(float(beta) for beta in values["trained_betas"])
        return cls(**values)

    def to_config(self) -> dict[str, Any]:
        """The same schedule as a `scheduler_config.json` for diffusers' DDIMScheduler."""
        config = dataclasses.asdict(self)
        if self.trained_betas is not None:
            config["trained_betas"] = list(self.trained_betas)
        return {"_class_name": "DDIMScheduler", "thresholding": False, **config}

    # -- Noise levels ----------------------------------------------------------------------------

    @functools.cached_property
    def betas(self) -> Float[np.ndarray, "t"]:
        """β_t, float32, after the zero-terminal-SNR rescaling if that is asked for."""
        betas = self._raw_betas()
        return _rescale_zero_terminal_snr(betas) if self.rescale_betas_zero_snr else betas

    @functools.cached_property
    def alphas_cumprod(self) -> Float[np.ndarray, "t"]:
        """ᾱ_t, float32."""
        return _cumprod(np.float32(1) - self.betas)

    @property
    def final_alpha_cumprod(self) -> np.float32:
        """ᾱ of the sample after the last step, where the previous timestep is negative."""
        return np.float32(1) if self.set_alpha_to_one else self.alphas_cumprod[0]

    def _raw_betas(self) -> Float[np.ndarray, "t"]:
        steps = self.num_train_timesteps
        if self.trained_betas is not None:
            return np.asarray(self.trained_betas, np.float32)
        if self.beta_schedule == "linear":
            return _linspace(self.beta_start, self.beta_end, steps)
        if self.beta_schedule == "scaled_linear":
            return _linspace(self.beta_start**0.5, self.beta_end**0.5, steps) ** 2
        # Nichol & Dhariwal 2021, with betas capped at 0.999.
        angles = [(i / steps + 0.008) / 1.008 * math.pi / 2 for i in range(steps + 1)]
        cosine = [math.cos(angle) ** 2 for angle in angles]
        ratios = [after / before for before, after in itertools.pairwise(cosine)]
        return np.array([min(1 - ratio, 0.999) for ratio in ratios], np.float32)

    def check_recoverable(self) -> None:
        """Raises UserError if x_0 cannot be computed from a prediction at some timestep.

        With ᾱ = 0 the sample holds no trace of x_0, so a prediction of the noise says nothing.
        """
        if self.prediction_type == "epsilon" and np.any(self.alphas_cumprod == 0):
            raise UserError(
                "prediction_type 'epsilon' cannot recover the image where alphas_cumprod is 0; "
                "use v_prediction or sample with zero-terminal-SNR or beta=1 schedules."
            )

    # -- Forward process and conversions between predictions -------------------------------------

    def signal_and_noise(
        self, t: Int[Array, "b"], ndim: int
    ) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
        """(√ᾱ_t, √(1−ᾱ_t)), float32, each shaped [b, 1, ..., 1] with `ndim` dimensions."""
        signal = np.sqrt(self.alphas_cumprod)
        noise = np.sqrt(np.float32(1) - self.alphas_cumprod)
        shape = (t.shape[0],) + (1,) * (ndim - 1)
        return jnp.asarray(signal)[t].reshape(shape), jnp.asarray(noise)[t].reshape(shape)

    def add_noise(
        self, x0: Float[Array, "b *d"], noise: Float[Array, "b *d"], t: Int[Array, "b"]
    ) -> Float[Array, "b *d"]:
        """x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε."""
        signal, sigma = self.signal_and_noise(t, x0.ndim)
        return signal * x0 + sigma * noise

    def velocity(
        self, x0: Float[Array, "b *d"], noise: Float[Array, "b *d"], t: Int[Array, "b"]
    ) -> Float[Array, "b *d"]:
        """v = √ᾱ_t ε − √(1−ᾱ_t) x_0."""
        signal, sigma = self.signal_and_noise(t, x0.ndim)
        return signal * noise - sigma * x0

    def target(
        self, x0: Float[Array, "b *d"], noise: Float[Array, "b *d"], t: Int[Array, "b"]
    ) -> Float[Array, "b *d"]:
        """What the network must output for this `prediction_type`."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        return self.velocity(x0, noise, t)

    def to_x0(
        self, pred: Float[Array, "b *d"], x_t: Float[Array, "b *d"], t: Int[Array, "b"]
    ) -> Float[Array, "b *d"]:
        """The clean sample that a network output implies; exactly −pred for v at ᾱ_t = 0.

        An ε-prediction at ᾱ_t = 0 gives 0, never NaN; `check_recoverable` refuses it beforehand.
        """
        signal, sigma = self.signal_and_noise(t, x_t.ndim)
        if self.prediction_type == "sample":
            return pred
        if self.prediction_type == "epsilon":
            return _divide(x_t - sigma * pred, signal)
        return signal * x_t - sigma * pred

    def to_noise(
        self, pred: Float[Array, "b *d"], x_t: Float[Array, "b *d"], t: Int[Array, "b"]
    ) -> Float[Array, "b *d"]:
        """The noise that a network output implies (0 where ᾱ_t = 1 leaves it undetermined)."""
        signal, sigma = self.signal_and_noise(t, x_t.ndim)
        if self.prediction_type == "epsilon":
            return pred
        if self.prediction_type == "sample":
            return self.noise_between(x_t, pred, t)
        return signal * pred + sigma * x_t

    def noise_between(
        self, x_t: Float[Array, "b *d"], x0: Float[Array, "b *d"], t: Int[Array, "b"]
    ) -> Float[Array, "b *d"]:
        """The ε that leads from x_0 to x_t: (x_t − √ᾱ_t x_0) / √(1−ᾱ_t).

        0 where ᾱ_t = 1: there no noise leads anywhere.
        """
        signal, sigma = self.signal_and_noise(t, x_t.ndim)
        return _divide(x_t - signal * x0, sigma)

    # -- Inference timesteps ---------------------------------------------------------------------

    def timesteps(self, num_steps: int) -> Int[np.ndarray, "n"]:
        """Inference timesteps, int64, descending (table 2 of Lin et al. 2023, arXiv 2305.08891).

        Raises:
          UserError: more steps than training timesteps, or `steps_offset` leaves the schedule.
        """
        total = self.num_train_timesteps
        if not 1 <= num_steps <= total:
            raise UserError(
                f"The number of inference steps is {num_steps}; choose one from 1 to {total}."
            )
        if self.timestep_spacing == "linspace":
            steps = np.linspace(0, total - 1, num_steps).round()[::-1]
        elif self.timestep_spacing == "leading":
            steps = np.arange(num_steps)[::-1] * (total // num_steps) + self.steps_offset
        else:
            # Rounding can append a spurious last element; the slice drops it.
            steps = np.arange(total, 0, -total / num_steps)[:num_steps].round() - 1
        if steps[0] >= total:
            raise UserError(
                f"{num_steps} inference steps with steps_offset={self.steps_offset} reach timestep "
                f"{int(steps[0])} of {total}; take fewer steps or trailing spacing."
            )
        return steps.astype(np.int64)

    def previous_timesteps(self, num_steps: int) -> Int[np.ndarray, "n"]:
        """Where each DDIM step leads, t − T // n; negative means `final_alpha_cumprod`."""
        return self.timesteps(num_steps) - self.num_train_timesteps // num_steps


def _class_defaults(class_name: str) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "clip_sample": class_name.startswith(_CLIPPING_CLASSES),
        "set_alpha_to_one": class_name != "PNDMScheduler",
    }
    if class_name in _LCM_CLASSES:
        defaults |= {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    if class_name.startswith(("Heun", "KDPM2")):
        defaults |= {"beta_start": 0.00085, "beta_end": 0.012}
    if class_name.startswith(_LINSPACE_CLASSES):
        defaults |= {"timestep_spacing": "linspace"}
    return defaults


def _require_choice(key: str, value: Any, choices: tuple) -> None:
    if value not in choices:
        shown = ", ".join(str(choice) for choice in choices if choice is not None)
        raise UserError(f"The scheduler config has {key}={value!r}; supported: {shown}.")


def _linspace(start: float, stop: float, num: int) -> Float[np.ndarray, "t"]:
    """float32 grid rounded as torch's: float32 step, each half counted from its own end."""
    first, last = np.float32(start), np.float32(stop)
    step = np.float64((last - first) / np.float32(max(num - 1, 1)))
    index = np.arange(num)
    grid = np.where(index < num // 2, first + step * index, last - step * (num - 1 - index))
    return grid.astype(np.float32)


def _cumprod(alphas: Float[np.ndarray, "t"]) -> Float[np.ndarray, "t"]:
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)


def _rescale_zero_terminal_snr(betas: Float[np.ndarray, "t"]) -> Float[np.ndarray, "t"]:
    """Maps √ᾱ affinely so that the last is 0 and the first is kept (Lin et al. 2023, alg. 1)."""
    signal = np.sqrt(_cumprod(np.float32(1) - betas))
    if signal[0] == signal[-1]:
        raise UserError("rescale_betas_zero_snr needs a schedule whose noise level changes.")
    scale = signal[0] / (signal[0] - signal[-1])
    alphas_cumprod = ((signal - signal[-1]) * scale) ** 2
    betas = np.ones_like(betas)  # Where ᾱ has underflowed to 0 already.
    betas[0] = 1 - alphas_cumprod[0]
    before, after = alphas_cumprod[:-1], alphas_cumprod[1:]
    betas[1:][before > 0] = np.float32(1) - after[before > 0] / before[before > 0]
    return betas


def _divide(numerator: Array, denominator: Array) -> Array:
    """numerator / denominator, 0 where the denominator is 0, with finite gradients."""
    nonzero = denominator != 0
    return jnp.where(nonzero, numerator / jnp.where(nonzero, denominator, 1), 0)


GENPERCEPT = NoiseSchedule.from_config(
    {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 1.0,
        "beta_end": 1.0,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "timestep_spacing": "leading",
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "clip_sample": False,
        "skip_prk_steps": True,
        "thresholding": False,
        "rescale_betas_zero_snr": False,
    }
)
