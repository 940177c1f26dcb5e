"""How much each inference step contributes to the result, and published weights of timesteps.

ADDP (arXiv 2504.11457) draws the training timesteps in proportion to c_t², the square of "the
contribution factor" of a timestep, and estimates c_t by a linear regression. How exactly, we could
not read; its released code has two finished tables (`timesteps.PRESETS`). The factors here are OUR
reading of the words, not the paper's: c_i is how far the result of the sampling loop moves where
the network's output at step i alone is off by one. Since solvers are linear that is a number of the
schedule and the solver; a task's own statistics, which a regression would see, are not in it.

"Alone" has two meanings, `HELD`. What stays as it is at the other steps can be the network's
"output", or the "noise" which that output tells of together with the sample. For a network that
predicts epsilon these are one. For one that predicts v or the image they are not: if its outputs
stay, each later step repairs a part of an early error, and late steps (low t) matter most; if the
noise estimates stay, errors are carried along, and early steps (high t) matter most, as in both of
ADDP's tables.

The published alternatives weigh a timestep by its signal-to-noise ratio SNR_t = ᾱ_t / (1 − ᾱ_t),
or by its place in the schedule alone. All is NumPy in float64; a weight [t] is relative, of each
training timestep.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int, Num

from jaxpercept.diffusion import sampler
from jaxpercept.diffusion.sampler import Steps
from jaxpercept.diffusion.schedule import NoiseSchedule
from jaxpercept.errors import UserError

Column = Float[np.ndarray, "n"]
Weights = Float[np.ndarray, "t"]

HELD = ("output", "noise")


# ---- contribution factors ------------------------------------------------------------------------


def sensitivities(steps: Steps, result: str = "x0", signal: Column | None = None) -> Column:
    """∂ result / ∂ output_i of each step, with its sign.

    A step takes x to keep · x + write · output, so that an error written at step i is kept by all
    later steps. Noise that a step adds changes nothing, and clipping of x_0 is left out.

    Args:
      steps: of any solver, from the noisiest on.
      result: the last predicted "x0" or the last "sample". They differ where the last step leaves
        some noise (`set_alpha_to_one` False).
      signal: √ᾱ of the steps' timesteps, of which the first may be 0: hold the other steps' noise
        estimates, for solvers of √ᾱ x_0 + √(1−ᾱ) ε such as DDIM and DDPM. None: their outputs.
    """
    row = steps.table
    x0_of_x, output_of_x = row.x0_of_x, 0.0
    if signal is not None:
        # x_0 = (x − √(1−ᾱ) ε) / √ᾱ, and the output is what gives this x_0. Nothing comes before
        # the first step, whose x is fixed.
        x0_of_x = np.divide(1, signal, out=row.x0_of_x.copy(), where=signal > 0)
        change, rate = x0_of_x - row.x0_of_x, row.x0_of_output
        output_of_x = np.divide(change, rate, out=np.zeros_like(rate), where=rate != 0)
    keep = row.next_of_x + row.next_of_output * output_of_x + row.next_of_x0 * x0_of_x
    write = row.next_of_output + row.next_of_x0 * row.x0_of_output
    if result == "x0":
        keep, write = keep.copy(), write.copy()
        keep[-1], write[-1] = x0_of_x[-1], row.x0_of_output[-1]
    kept_later = np.append(np.cumprod(keep[:0:-1])[::-1], 1.0)
    return kept_later * write


def ddim_factors(schedule: NoiseSchedule, num_steps: int, *, held: str = "output") -> Column:
    """c_i ≥ 0 of each DDIM step, for the last predicted x_0. Our reading, see the module.

    With σ = √(1−ᾱ)/√ᾱ = tan φ, both 0 past the last step, and where each step leads to the next
    one's timestep:

                    held: output                                   held: noise
      epsilon       σ_i − σ_{i+1}                                  the same
      v_prediction  sin(φ_i − φ_{i+1}) ∏_{j>i} cos(φ_j − φ_{j+1})  √ᾱ_i (σ_i − σ_{i+1})
      sample        1 of the last step, 0 of all others            (σ_i − σ_{i+1}) / σ_i

    At ᾱ = 0 (φ = π/2) of the first step the second column has its limit, 1.

    Raises:
      UserError: the number of steps does not fit, epsilon is predicted at ᾱ = 0, or the noise is
        held where ᾱ = 0 after the first step.
    """
    return _factors(sampler.ddim, schedule, num_steps, held)


def ddpm_factors(schedule: NoiseSchedule, num_steps: int, *, held: str = "output") -> Column:
    """c_i ≥ 0 of each DDPM step, for x_0. Our reading, see the module.

    Where epsilon is predicted, c_t = β_t / (√ᾱ_t √(1−ᾱ_t)) with β_t = 1 − ᾱ_t / ᾱ_prev, so that
    with independent errors E‖Δx_0‖² = Σ_t c_t² E‖Δε_t‖².

    Raises:
      UserError: as `ddim_factors`.
    """
    return _factors(sampler.ddpm, schedule, num_steps, held)


def _factors(
    solver: Callable[..., Steps], schedule: NoiseSchedule, num_steps: int, held: str
) -> Column:
    if held not in HELD:
        raise ValueError(f"held is {held!r}: use {' or '.join(HELD)}")
    steps, signal = solver(schedule, num_steps), None
    if held == "noise":
        timesteps = schedule.timesteps(num_steps)
        signal = np.sqrt(schedule.alphas_cumprod[timesteps].astype(np.float64))
        if not signal[1:].all():
            raise UserError(
                "With this scheduler alphas_cumprod is 0 after the first inference step, where the "
                "noise says nothing of the image; use another timestep policy."
            )
    return np.abs(sensitivities(steps, signal=signal))


# ---- from inference steps to training timesteps --------------------------------------------------


def step_of_timestep(
    timesteps: Num[np.ndarray, "n"], num_train_timesteps: int
) -> Int[np.ndarray, "t"]:
    """Which inference step covers each training timestep.

    The step at t_i covers t_{i+1} < t ≤ t_i, the levels it goes through; the last all that are
    below, the first also those above, where the inference starts late (leading spacing).

    Args:
      timesteps: of the inference, descending; they need not be whole.
      num_train_timesteps: T.
    """
    first = len(timesteps) - 1
    ascending = np.searchsorted(timesteps[::-1], np.arange(num_train_timesteps))
    return first - np.minimum(ascending, first)


def of_steps(schedule: NoiseSchedule, factors: Column) -> Weights:
    """c_i² of the step that covers a timestep, spread evenly over all that it covers.

    Raises:
      UserError: the last step alone has a factor, and there are others.
    """
    if len(factors) > 1 and not np.any(factors[:-1]):
        raise UserError(
            f"Of {len(factors)} inference steps with this scheduler and prediction_type "
            f"{schedule.prediction_type!r} the last one alone makes the result, whose timesteps "
            "would be all that is trained; use another timestep policy."
        )
    steps = step_of_timestep(schedule.timesteps(len(factors)), schedule.num_train_timesteps)
    return (np.square(factors) / np.bincount(steps))[steps]


# ---- published weights ---------------------------------------------------------------------------


def p2(schedule: NoiseSchedule, k: float = 1.0, gamma: float = 1.0) -> Weights:
    """(k + SNR)^−γ, k > 0, γ ≥ 0 (Choi et al. 2022, arXiv 2204.00227, eq. 8).

    There the network predicts epsilon; here it is applied to the loss of any prediction.
    """
    signal = schedule.alphas_cumprod.astype(np.float64)
    noise = 1 - signal
    return (noise / (k * noise + signal)) ** gamma  # no SNR, which is infinite at ᾱ = 1


def min_snr(schedule: NoiseSchedule, gamma: float = 5.0) -> Weights:
    """min(SNR, γ) in terms of the loss of x_0 (Hang et al. 2023, arXiv 2303.09556, sec. 3.4).

    Of the loss of the network's output that is min(SNR, γ) / SNR for epsilon, min(SNR, γ) /
    (SNR + 1) for v_prediction and min(SNR, γ) for sample.
    """
    signal = schedule.alphas_cumprod.astype(np.float64)
    noise = 1 - signal
    of_velocity = np.minimum(signal, gamma * noise)
    if schedule.prediction_type == "v_prediction":
        return of_velocity
    share = signal if schedule.prediction_type == "epsilon" else noise
    limit = 1.0 if schedule.prediction_type == "epsilon" else gamma  # of SNR to 0, or infinity
    return np.divide(of_velocity, share, out=np.full_like(share, limit), where=share > 0)


def logit_normal(schedule: NoiseSchedule, mean: float = 0.0, std: float = 1.0) -> Weights:
    """The density of u = (t + 1/2) / T with logit u ~ N(mean, std²) (arXiv 2403.03206, eq. 19).

    Esser et al. 2024 draw the time of a rectified flow so, which is 1 at pure noise, too.
    """
    total = schedule.num_train_timesteps
    u = (np.arange(total) + 0.5) / total
    logarithm = -0.5 * ((np.log(u / (1 - u)) - mean) / std) ** 2 - np.log(u * (1 - u))
    return np.exp(logarithm - logarithm.max())
