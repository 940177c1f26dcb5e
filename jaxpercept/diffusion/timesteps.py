"""How training timesteps are drawn and weighed: uniform, fixed, by tables, or by contribution."""

import dataclasses
import errno
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, UInt32

from jaxpercept.diffusion import contribution
from jaxpercept.diffusion.noise import per_example
from jaxpercept.diffusion.schedule import NoiseSchedule
from jaxpercept.errors import UserError

# Relative weights of ten equal bins, low to high timesteps, as ADDP's released code has them
# (arXiv 2504.11457; Marigold depth and RefCOCO referring segmentation).
PRESETS = {
    "addp_depth": (1, 1, 3, 7, 13, 14, 8, 4, 22, 33),
    "addp_ris": (1, 1, 1, 1, 1, 1, 1, 2, 4, 95),
}
USES = ("sample", "loss", "importance")
"""What a policy's probabilities p(t) are used for, see `loss_weights`."""

# Smaller T·p(t), larger weights, would be noise: such a timestep is hardly ever drawn.
_LEAST_IMPORTANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class TimestepPolicy:
    """A distribution over the training timesteps 0..T-1 of a schedule; hashable.

    Attributes:
      kind: a name in `KINDS`.
      numbers: its arguments.

    Raises:
      UserError: an unknown kind, or numbers that it cannot have.
    """

    kind: str = "uniform"
    numbers: tuple[float | int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(
                f"Unknown timestep policy {_in_short(self.kind)}; choose "
                f"{', '.join(kind.usage for kind in KINDS.values())}, {', '.join(PRESETS)} or "
                "file:PATH."
            )
        kind = KINDS[self.kind]
        if not (all(map(_is_number, self.numbers)) and kind.accepts(self.numbers)):
            raise UserError(
                f"The timestep policy {_in_short(self)} is not of the form {kind.usage}, "
                f"{kind.range}."
            )

    @classmethod
    def parse(cls, spec: str) -> "TimestepPolicy":
        """Reads a name of `KINDS` or `PRESETS`, its numbers after a colon, or `file:PATH`.

        Raises:
          UserError: the policy is unknown or its numbers, or its file, cannot be read.
        """
        name, _, argument = resolve(spec).partition(":")
        if name in PRESETS and not argument:
            return cls("weighted", PRESETS[name])
        kind = KINDS.get(name)
        if kind is None:
            return cls(spec)  # which says what there is
        if not argument:
            return cls(name, kind.default)
        try:
            return cls(name, tuple(kind.number(text) for text in argument.split(",")))
        except ValueError:
            raise UserError(
                f"The timestep policy {_in_short(spec)} has an unreadable number; write it like "
                f"{kind.usage}, {kind.range}."
            ) from None

    @classmethod
    def constant(cls, timestep: int) -> "TimestepPolicy":
        """Always `timestep`."""
        return cls("fixed", (timestep,))

    @classmethod
    def weighted(cls, weights: tuple[float | int, ...]) -> "TimestepPolicy":
        """Equal bins with probabilities proportional to `weights`, low to high timesteps.

        Bin k of n covers kT//n <= t < (k+1)T//n and is uniform inside.
        """
        return cls("weighted", tuple(weights))

    @property
    def fixed(self) -> int | None:
        """The timestep of a policy that has only one."""
        return int(self.numbers[0]) if self.kind == "fixed" else None

    def distribution(self, schedule: NoiseSchedule) -> Float[np.ndarray, "t"]:
        """The probability of each training timestep, float64.

        Raises:
          UserError: the policy does not fit the schedule.
        """
        weights = KINDS[self.kind].weights(schedule, *self.numbers)
        total = weights.sum()
        if not (np.isfinite(total) and total > 0):
            raise UserError(
                f"The timestep policy {_in_short(self)} gives no timestep of this schedule a "
                "weight; use another one."
            )
        return weights / total

    def __str__(self) -> str:
        return f"{self.kind}:{','.join(map(str, self.numbers))}".removesuffix(":")


def _in_short(policy: TimestepPolicy | str) -> str:
    """Quoted; a table may have a thousand numbers."""
    text = str(policy)
    return repr(text if len(text) <= 80 else text[:77] + "...")


# ---- the kinds of policies -----------------------------------------------------------------------


class _Kind(NamedTuple):
    """One kind of policy.

    Attributes:
      weights: (schedule, *numbers) -> relative weight of each training timestep.
      allows: (*numbers) -> whether they can be.
      usage, range: how it is written, and what the numbers may be.
      number: reads one.
      default: the numbers where none are given.
    """

    weights: Callable[..., Float[np.ndarray, "t"]]
    allows: Callable[..., bool]
    usage: str
    range: str = "without numbers"
    number: Callable[[str], float | int] = float
    default: tuple[float | int, ...] = ()

    def accepts(self, numbers: tuple[float | int, ...]) -> bool:
        """Whether there can be so many numbers of these values."""
        try:
            inspect.signature(self.allows).bind(*numbers)
        except TypeError:
            return False
        return self.allows(*numbers)


def _is_number(value: float | int) -> bool:
    """Neither NaN nor infinite nor so large that a sum of some would be."""
    return abs(value) < 1e30


def _uniform(schedule: NoiseSchedule) -> Float[np.ndarray, "t"]:
    return np.ones(schedule.num_train_timesteps)


def _fixed(schedule: NoiseSchedule, timestep: int) -> Float[np.ndarray, "t"]:
    total = schedule.num_train_timesteps
    if timestep >= total:
        raise UserError(f"The fixed timestep {timestep} is not below num_train_timesteps={total}.")
    return np.eye(1, total, timestep)[0]


def _weighted(schedule: NoiseSchedule, *weights: float | int) -> Float[np.ndarray, "t"]:
    total, bins = schedule.num_train_timesteps, len(weights)
    widths = np.diff(np.arange(bins + 1) * total // bins)
    if widths.min() < 1:
        raise UserError(f"{bins} timestep bins do not fit into {total} timesteps.")
    return np.repeat(np.asarray(weights, np.float64) / widths, widths)


def _contribution(
    name: str, factors: Callable[..., Float[np.ndarray, "n"]], held: str = "output"
) -> _Kind:
    def weights(schedule: NoiseSchedule, num_steps: int) -> Float[np.ndarray, "t"]:
        return contribution.of_steps(schedule, factors(schedule, num_steps, held=held))

    return _Kind(weights, lambda n: n > 0, f"{name}:N", "N counting the steps", int)


KINDS = {
    "uniform": _Kind(_uniform, lambda: True, "uniform"),
    "fixed": _Kind(_fixed, lambda t: t >= 0, "fixed:T", "T counting from 0", int),
    "weighted": _Kind(
        _weighted,
        lambda *weights: min(weights, default=0) >= 0 and any(weights),
        "weighted:W1,W2,...",
        "with weights of 0 or more that are not all 0",
    ),
    "ddim": _contribution("ddim", contribution.ddim_factors),
    "ddpm": _contribution("ddpm", contribution.ddpm_factors),
    "ddim_noise": _contribution("ddim_noise", contribution.ddim_factors, "noise"),
    "ddpm_noise": _contribution("ddpm_noise", contribution.ddpm_factors, "noise"),
    "p2": _Kind(
        contribution.p2,
        lambda k, gamma: k > 0 and gamma >= 0,
        "p2:K,GAMMA",
        "with K above 0 and GAMMA of 0 or more",
        default=(1.0, 1.0),
    ),
    "min_snr": _Kind(
        contribution.min_snr, lambda gamma: gamma > 0, "min_snr:GAMMA", "above 0", default=(5.0,)
    ),
    "logit_normal": _Kind(
        contribution.logit_normal,
        lambda mean, std: std > 0,
        "logit_normal:MEAN,STD",
        "with STD above 0",
        default=(0.0, 1.0),
    ),
}
"""The kinds of policies by their names; `docs/tasks.md` says where each comes from."""


# ---- tables in files -----------------------------------------------------------------------------


def resolve(spec: str) -> str:
    """A spec that needs no file: `file:PATH` becomes the `weighted:W1,W2,...` it holds.

    Raises:
      UserError: the file is missing or holds no table.
    """
    name, _, path = spec.partition(":")
    if name != "file":
        return spec
    return f"weighted:{','.join(map(str, read_table(Path(path))))}"


def read_table(path: Path) -> tuple[float | int, ...]:
    """Weights of equal bins, low to high timesteps, from the key "weights" of a JSON file.

    All other keys document where they come from, such as "checkpoint", "dataset" and "seeds".

    Raises:
      UserError: the file cannot be read or holds no such weights.
    """
    try:
        if not path.is_file():  # nor a device, which may have no end
            raise FileNotFoundError(errno.ENOENT, "no such file")
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"The table of timesteps {str(path)!r} cannot be read ({error.strerror}); name a JSON "
            "file."
        ) from None
    except ValueError:
        raise UserError(
            f"The table of timesteps {str(path)!r} is no JSON; write it like "
            '{"weights": [1, 1, 3]}.'
        ) from None
    weights = content.get("weights") if isinstance(content, dict) else None
    if not (
        isinstance(weights, list)
        and all(type(w) in (int, float) and _is_number(w) and w >= 0 for w in weights)
        and any(weights)
    ):
        raise UserError(
            f"The table of timesteps {str(path)!r} needs the key 'weights' with a list of numbers "
            "of 0 or more that are not all 0; correct it."
        )
    return tuple(weights)


# ---- drawing -------------------------------------------------------------------------------------


def sample_timesteps(
    policy: TimestepPolicy | str,
    key: Key[Array, ""],
    index: Int[Array, "b"],
    schedule: NoiseSchedule,
    *,
    strata: int = 0,
) -> Int[Array, "b"]:
    """One timestep per example, int32 in [0, T); row i depends only on (key, index[i], strata).

    Stratified, any n consecutive indices have one draw in each of the n equally likely parts of
    the distribution, in a random order, so that a batch is a fair sample and means over it vary
    less. Each single example still follows the whole distribution.

    Args:
      policy: or how it is written.
      key: of this training step.
      index: positions in the global stream of examples, where batches lie one after the other.
      schedule: the noise schedule that is trained with.
      strata: n, the number of examples in the batch of all devices and micro-batches; 0 draws each
        timestep on its own.

    Raises:
      UserError: unknown policy, or one that does not fit the schedule.
    """
    policy = TimestepPolicy.parse(policy) if isinstance(policy, str) else policy
    distribution = policy.distribution(schedule)
    if policy.fixed is not None:
        return jnp.full(index.shape, policy.fixed, jnp.int32)
    # The inverse of the cumulative distribution, in units of 2^-32: float32 would not tell small
    # probabilities apart near 1. The last timestep with any weight catches rounding.
    last = int(np.flatnonzero(distribution)[-1])
    cumulative = np.round(np.cumsum(distribution)[:last] * 2.0**32)
    cumulative = np.minimum(cumulative, 2.0**32 - 1).astype(np.uint32)
    uniform = _uniform_bits(key, index, strata)
    return jnp.searchsorted(jnp.asarray(cumulative), uniform, side="right").astype(jnp.int32)


def _uniform_bits(key: Key[Array, ""], index: Int[Array, "b"], strata: int) -> UInt32[Array, "b"]:
    """Uniform in [0, 2^32), one per example; stratified, see `sample_timesteps`."""

    def bits(key: Key[Array, ""]) -> UInt32[Array, "b"]:
        return per_example(key, index, lambda k: jax.random.bits(k, dtype=jnp.uint32))

    if strata < 2:
        return bits(key)
    key_order, key_within = jax.random.split(key)
    edges = np.array([stratum * 2**32 // strata for stratum in range(strata + 1)])
    first, width = (jnp.asarray(x.astype(np.uint32)) for x in (edges[:-1], np.diff(edges)))
    stratum = jax.random.permutation(key_order, strata)[index % strata]
    # 2^32 is a multiple of the width but for some units, so that no remainder is favoured.
    return first[stratum] + bits(key_within) % width[stratum]


# ---- weighing ------------------------------------------------------------------------------------


def drawn_policy(policy: TimestepPolicy, use: str) -> TimestepPolicy:
    """What the timesteps are drawn from: the policy, or uniformly where it weighs the loss."""
    return TimestepPolicy() if use == "loss" else policy


def loss_weights(
    policy: TimestepPolicy, schedule: NoiseSchedule, use: str
) -> Float[np.ndarray, "t"]:
    """The factor of the loss at each training timestep, drawn from `drawn_policy`, float64.

    sample      1: the policy says what is drawn (ADDP's released code and Fig. 2)
    loss        T·p(t), drawn uniformly: the same expectation (ADDP's Eq. 2, as a review cites it)
    importance  1 / (T·p(t)): the expectation of uniform timesteps without weights, drawn otherwise

    Raises:
      UserError: an unknown use, a policy that does not fit the schedule or, for importance, one
        that hardly ever draws some timestep.
    """
    if use not in USES:
        raise UserError(f"The timestep use {use!r} is unknown; choose {', '.join(USES)}.")
    relative = schedule.num_train_timesteps * policy.distribution(schedule)
    if use == "sample":
        return np.ones_like(relative)
    if use == "loss":
        return relative
    if relative.min() < _LEAST_IMPORTANCE:
        raise UserError(
            f"The timestep policy {_in_short(policy)} draws t = {int(relative.argmin())} never or "
            "hardly ever, which no importance weight makes up for; set timestep_use to 'sample' or "
            "choose another policy."
        )
    return 1 / relative
