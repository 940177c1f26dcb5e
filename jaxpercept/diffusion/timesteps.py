"""How training timesteps are drawn: uniform, fixed, or weighted by bins of the schedule."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxpercept.errors import UserError

# Relative weights of ten equal bins, low to high timesteps, as ADDP's released code has them
# (arXiv 2504.11457; Marigold depth and RefCOCO referring segmentation).
PRESETS = {
    "addp_depth": (1, 1, 3, 7, 13, 14, 8, 4, 22, 33),
    "addp_ris": (1, 1, 1, 1, 1, 1, 1, 2, 4, 95),
}


@dataclasses.dataclass(frozen=True)
class TimestepPolicy:
    """A distribution over timesteps 0..T-1; hashable. Neither field set means uniform.

    Attributes:
      fixed: always this timestep.
      probabilities: one per bin, summing to 1. Bin k of n covers kT//n <= t < (k+1)T//n and is
        uniform inside, so contribution weights such as ADDP's are one table.
    """

    fixed: int | None = None
    probabilities: tuple[float, ...] | None = None

    @classmethod
    def parse(cls, spec: str) -> "TimestepPolicy":
        """Reads `uniform`, `fixed:T`, `addp_depth`, `addp_ris` or `weighted:W1,W2,...`.

        Raises:
          UserError: the policy is unknown or its numbers cannot be read.
        """
        name, _, argument = spec.partition(":")
        if name in ("fixed", "weighted"):
            try:
                if name == "fixed":
                    return cls.constant(int(argument))
                return cls.weighted(tuple(float(weight) for weight in argument.split(",")))
            except ValueError:
                example = "fixed:1" if name == "fixed" else "weighted:1,1,3"
                raise UserError(
                    f"Timestep policy {spec!r} has an unreadable number; write it like {example}."
                ) from None
        if name == "uniform" and not argument:
            return cls()
        if name in PRESETS and not argument:
            return cls.weighted(PRESETS[name])
        raise UserError(
            f"Unknown timestep policy {spec!r}; choose uniform, fixed:T, weighted:W1,W2,... or "
            f"{' or '.join(PRESETS)}."
        )

    @classmethod
    def constant(cls, timestep: int) -> "TimestepPolicy":
        """Always `timestep`."""
        if timestep < 0:
            raise UserError(f"The fixed timestep {timestep} is negative; it counts from 0.")
        return cls(fixed=timestep)

    @classmethod
    def weighted(cls, weights: tuple[float | int, ...]) -> "TimestepPolicy":
        """Equal bins with probabilities proportional to `weights`, low to high timesteps."""
        weights = np.asarray(weights, np.float64)
        if not (np.all(np.isfinite(weights)) and np.all(weights >= 0) and weights.sum() > 0):
            raise UserError("Timestep bin weights must be non-negative numbers, not all zero.")
        return cls(probabilities=tuple((weights / weights.sum()).tolist()))

    def distribution(self, num_train_timesteps: int) -> Float[np.ndarray, "t"]:
        """Probability of each timestep, float64.

        Raises:
          UserError: the policy does not fit a schedule of that length.
        """
        total = num_train_timesteps
        if self.fixed is not None:
            if self.fixed >= total:
                raise UserError(
                    f"The fixed timestep {self.fixed} is not below num_train_timesteps={total}."
                )
            return np.eye(1, total, self.fixed)[0]
        bins = self.probabilities or (1.0,)
        edges = np.arange(len(bins) + 1) * total // len(bins)
        widths = np.diff(edges)
        if widths.min() < 1:
            raise UserError(f"{len(bins)} timestep bins do not fit into {total} timesteps.")
        return np.repeat(np.asarray(bins) / widths, widths)


def sample_timesteps(
    policy: TimestepPolicy | str,
    key: Key[Array, ""],
    index: Int[Array, "b"],
    num_train_timesteps: int,
) -> Int[Array, "b"]:
    """One timestep per example, int32 in [0, T); row i depends only on (key, index[i]).

    Raises:
      UserError: unknown policy, or one that does not fit the schedule.
    """
    policy = TimestepPolicy.parse(policy) if isinstance(policy, str) else policy
    distribution = policy.distribution(num_train_timesteps)
    if policy.fixed is not None:
        return jnp.full(index.shape, policy.fixed, jnp.int32)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
    if policy.probabilities is None:
        return jax.vmap(lambda k: jax.random.randint(k, (), 0, num_train_timesteps))(keys)
    # Inverse of the cumulative distribution; the last timestep with any weight catches rounding.
    last = int(np.flatnonzero(distribution)[-1])
    cumulative = jnp.asarray(np.cumsum(distribution)[:last], jnp.float32)
    uniform = jax.vmap(jax.random.uniform)(keys)
    return jnp.searchsorted(cumulative, uniform, side="right").astype(jnp.int32)
