"""Sampling: a solver is a table of coefficients, and one compiled loop runs any of them.

Between the network's output and the next sample every solver here is linear, save for the clipping
of x_0; `diffusion.sampler` has the solvers.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxpercept.diffusion.noise import per_example

PredictFn = Callable[[Float[Array, "b *d"], Float[Array, "b"]], Float[Array, "b *d"]]
Column = Float[np.ndarray, "n"]


class Table(NamedTuple):
    """A row for each step, from the noisiest on. With x the sample and z standard normal noise:

    output = network(scale * x, timestep)
    x_0    = clip(x0_of_x * x + x0_of_output * output)
    x      = next_of_x * x + next_of_output * output + next_of_x0 * x_0 + next_of_noise * z

    What the network sees, scale * x, has the noise level ᾱ, `alpha`.
    """

    timestep: Column
    alpha: Column
    scale: Column
    x0_of_x: Column
    x0_of_output: Column
    next_of_x: Column
    next_of_output: Column
    next_of_x0: Column
    next_of_noise: Column


@dataclasses.dataclass(frozen=True, eq=False)
class Steps:
    """What to do in n steps.

    Attributes:
      table: the coefficients. The Euler solvers work with x = x_0 + σ ε instead of
        √ᾱ x_0 + √(1−ᾱ) ε; their `scale` takes the one to the other.
      initial_scale: the first x is so many times the latents that sampling starts from.
      clip: largest absolute value of x_0, None for no limit.
      first: the number of the first step in the whole trajectory, which its noise depends on.
    """

    table: Table
    initial_scale: float = 1.0
    clip: float | None = None
    first: int = 0

    def __len__(self) -> int:
        return len(self.table.timestep)

    def between(self, start: int, end: int | None = None) -> "Steps":
        """Steps `start` to `end`, not included; None: to the last. They go on from x, not noise.

        With the same key and index they are the same as without the interruption.
        """
        end = len(self) if end is None else end
        if not 0 <= start < end <= len(self):
            raise ValueError(f"there are no steps from {start} to {end} of {len(self)}")
        table = Table(*(column[start:end] for column in self.table))
        scale = 1.0 if start else self.initial_scale
        return Steps(table, scale, self.clip, self.first + start)


class Row(NamedTuple):
    """A step, or several below each other, as arrays: what a compiled program can be given.

    Attributes:
      number: of the step in the whole trajectory, which its noise depends on.
      table: its coefficients.
    """

    number: Int[Array | np.ndarray, "*n"]
    table: Table


class Trajectory(NamedTuple):
    """What happened in n steps.

    Attributes:
      x: the sample before each step; x[i] is where `steps.between(i)` goes on.
      x0: what each step predicted.
      last: the sample after the last one.
    """

    x: Float[Array, "n b *d"]
    x0: Float[Array, "n b *d"]
    last: Float[Array, "b *d"]


def sample(
    steps: Steps,
    predict_fn: PredictFn,
    latents: Float[Array, "b *d"],
    *,
    key: Key[Array, ""] | None = None,
    index: Int[Array, "b"] | None = None,
) -> tuple[Float[Array, "b *d"], Float[Array, "b *d"]]:
    """Runs the steps from `latents` as one scan, so predict_fn is traced once.

    Args:
      steps: from a solver, such as `ddim(schedule, num_steps)`.
      predict_fn: (x float32 [b, ...], timestep float32 [b]) -> network output [b, ...].
      latents: x_T; pure noise, or the RGB latent for RGB blending and GenPercept.
      key, index: for steps that draw noise; that of row i depends only on (key, index[i], step),
        with index = 0..b-1 if None.

    Returns:
      (last sample, last predicted x_0), float32. Marigold decodes the first, GenPercept and
      E2E-FT the second.
    """
    step = _step(steps, predict_fn, key, index)
    x = latents.astype(jnp.float32) * steps.initial_scale
    (x, x0), _ = jax.lax.scan(
        lambda carry, row: (step(carry[0], row), None), (x, jnp.zeros_like(x)), rows(steps)
    )
    return x, x0


def trajectory(
    steps: Steps,
    predict_fn: PredictFn,
    latents: Float[Array, "b *d"],
    *,
    key: Key[Array, ""] | None = None,
    index: Int[Array, "b"] | None = None,
) -> Trajectory:
    """All that `sample` passes through; its arguments."""
    step = _step(steps, predict_fn, key, index)

    def keeping(x: Array, row: Row) -> tuple[Array, tuple[Array, Array]]:
        following, x0 = step(x, row)
        return following, (x, x0)

    x = latents.astype(jnp.float32) * steps.initial_scale
    last, (x, x0) = jax.lax.scan(keeping, x, rows(steps))
    return Trajectory(x, x0, last)


def sample_from(
    steps: Steps,
    predict_fn: PredictFn,
    x: Float[Array, "b *d"],
    first: Int[Array, ""],
    *,
    key: Key[Array, ""] | None = None,
    index: Int[Array, "b"] | None = None,
) -> tuple[Float[Array, "b *d"], Float[Array, "b *d"]]:
    """`sample(steps.between(first), ...)` for a `first` that is traced: one program for all.

    Args:
      x: the sample before step `first`, the first one included.
      first: from 0 to len(steps) - 1.
    """
    step = _step(steps, predict_fn, key, index)
    table = jax.tree.map(jnp.asarray, rows(steps))

    def body(i: Int[Array, ""], carry: tuple[Array, Array]) -> tuple[Array, Array]:
        return step(carry[0], jax.tree.map(lambda column: column[i], table))

    x = x.astype(jnp.float32)
    return jax.lax.fori_loop(first, len(steps), body, (x, jnp.zeros_like(x)))


def ideal_path(
    steps: Steps,
    x0: Float[Array, "b *d"],
    noise: Float[Array, "b *d"],
    *,
    key: Key[Array, ""] | None = None,
    index: Int[Array, "b"] | None = None,
) -> Float[Array, "n b *d"]:
    """What a network that predicts x_0 exactly sees at each step.

    It begins at √ᾱ x_0 + √(1−ᾱ) ε with the noise ε, as training does, and goes on with the noise
    that the steps add. Without any it is √ᾱ x_0 + √(1−ᾱ) ε at each DDIM step: what training shows
    the network with this ε. x_0 is not clipped.

    Args:
      steps: of a trajectory, from its first one on.
      x0: what every step predicts.
      noise: ε, standard normal, or the image's latent for RGB blending.
      key, index: as for `sample`; with the same ones the same noise is added.
    """
    own = key if draws_noise(steps) else None

    def step(x: Array, row: Row) -> tuple[Array, Array]:
        output = (x0 - row.table.x0_of_x * x) / row.table.x0_of_output
        following, _ = take(row, lambda x, t: output, x, key=own, index=index)
        return following, row.table.scale * x

    alpha, scale = (np.float32(column[0]) for column in (steps.table.alpha, steps.table.scale))
    x = (np.sqrt(alpha) * x0 + np.sqrt(1 - alpha) * noise) / scale
    return jax.lax.scan(step, x, rows(steps))[1]


def rows(steps: Steps) -> Row:
    """The steps below each other, in float32."""
    table = jax.tree.map(lambda column: np.asarray(column, np.float32), steps.table)
    return Row(np.arange(steps.first, steps.first + len(steps)), table)


def take(
    row: Row,
    predict_fn: PredictFn,
    x: Float[Array, "b *d"],
    *,
    clip: float | None = None,
    key: Key[Array, ""] | None = None,
    index: Int[Array, "b"] | None = None,
) -> tuple[Float[Array, "b *d"], Float[Array, "b *d"]]:
    """One step; `sample` takes one after the other.

    Args:
      row: the step. It may be an argument of a compiled program, which then serves for any.
      predict_fn, index: as for `sample`.
      x: the sample before it.
      clip: of the `Steps`.
      key: as for `sample`; None for a step that draws no noise.

    Returns:
      The sample after it, and what it predicts.
    """
    number, table = row
    output = predict_fn(table.scale * x, jnp.full(x.shape[0], table.timestep)).astype(jnp.float32)
    x0 = table.x0_of_x * x + table.x0_of_output * output
    if clip is not None:
        x0 = jnp.clip(x0, -clip, clip)
    following = table.next_of_x * x + table.next_of_output * output + table.next_of_x0 * x0
    if key is None:
        return following, x0

    def draw(key: Key[Array, ""]) -> Array:
        return jax.random.normal(jax.random.fold_in(key, number), x.shape[1:])

    index = jnp.arange(x.shape[0]) if index is None else index
    return following + table.next_of_noise * per_example(key, index, draw), x0


def draws_noise(steps: Steps) -> bool:
    """Whether noise is drawn between the steps."""
    return bool(np.any(steps.table.next_of_noise))


def _step(
    steps: Steps,
    predict_fn: PredictFn,
    key: Key[Array, ""] | None,
    index: Int[Array, "b"] | None,
) -> Callable[[Array, Row], tuple[Array, Array]]:
    """(x, row) -> (next x, x_0)."""
    draws = draws_noise(steps)
    if draws and key is None:
        raise ValueError("these steps draw noise: give a key")

    def step(x: Array, row: Row) -> tuple[Array, Array]:
        own = key if draws else None
        return take(row, predict_fn, x, clip=steps.clip, key=own, index=index)

    return step
