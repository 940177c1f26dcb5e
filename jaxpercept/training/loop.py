"""The one training loop."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from tqdm import tqdm

from jaxpercept.config import check_config
from jaxpercept.data.pipeline import make_train_dataset
from jaxpercept.errors import UserError
from jaxpercept.training import sharding
from jaxpercept.training.checkpointing import Checkpoints, open_workdir
from jaxpercept.training.metric_writer import MetricWriter
from jaxpercept.training.optim import Params, make_optimizer, merge_params
from jaxpercept.training.setup import Setup, set_up
from jaxpercept.training.step import State, init_state, make_train_step

Observer = Callable[[int, Params, MetricWriter], dict[str, float]]
"""`(step, all weights, writer) -> metrics`: evaluates, or draws pictures."""
# Dense bfloat16 peak of one device in FLOP/s, from the makers' data sheets.
_PEAK = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
}


class Interrupted(Exception):
    """SIGTERM came; the state is saved."""


def train(
    config: Any,
    workdir: Path,
    *,
    evaluate: Callable[[Setup, Mesh], Observer] | None = None,
    pictures: Callable[[Setup, Mesh], Observer] | None = None,
) -> State:
    """Train as `config` says, or continue what `workdir` holds.

    Args:
        config: `jaxpercept.config.base_config()` with changes.
        workdir: gets `jaxpercept.json`, `checkpoints/`, `frozen/`, `metrics.jsonl`, `pictures/`.
        evaluate: builds the observer called every `eval_every` steps and at the end.
        pictures: builds the observer called every `picture_every` steps and at the end.

    Returns:
        The final state.

    Raises:
        UserError: the config, the data, the checkpoint or the workdir do not fit.
        Interrupted: SIGTERM came; run the same again to go on.
    """
    mesh = sharding.make_mesh(**config.mesh)
    setup = set_up(config)
    check_config(config, sharding.batch_devices(mesh), setup.method.model.downscale)
    dataset = _dataset(config, setup)
    open_workdir(workdir, setup.description, setup.frozen)

    optimizer, schedule = make_optimizer(config.optimizer)
    state, shardings = _place(setup.trainable, optimizer, mesh, ema=config.ema_decay > 0)
    frozen = sharding.put_tree(setup.frozen, sharding.tree_shardings(setup.frozen, mesh))
    iterator = iter(dataset)
    checkpoints = Checkpoints(workdir, keep=config.keep)
    start = checkpoints.latest_step() or 0
    if start:
        state = checkpoints.restore(start, state, shardings, iterator)
        logging.info("continuing from step %d of %s", start, workdir)

    step_fn = make_train_step(
        setup.method.loss,
        optimizer,
        mesh=mesh,
        state_sharding=shardings,
        seed=config.seed,
        accumulate=config.accumulate,
        ema_decay=config.ema_decay,
    )
    writer = MetricWriter(workdir)
    observers = {
        every: build(setup, mesh)
        for every, build in (("eval_every", evaluate), ("picture_every", pictures))
        if build is not None
    }
    try:
        if start < config.steps:
            loop = _Loop(config, mesh, step_fn, schedule, iterator, checkpoints, writer, observers)
            state = loop.run(start, state, frozen)
        weights = merge_params(frozen, state.get("ema", state["params"]))
        for observer in observers.values():
            writer.scalars(config.steps, observer(config.steps, weights, writer))
    finally:
        checkpoints.close()
        writer.close()
    return state


class _Loop:
    """The steps between the first batch and the last save."""

    def __init__(self, config, mesh, step_fn, schedule, iterator, checkpoints, writer, observers):
        self.config, self.mesh, self.step_fn, self.schedule = config, mesh, step_fn, schedule
        self.iterator, self.checkpoints = iterator, checkpoints
        self.writer, self.observers = writer, observers

    def run(self, start: int, state: State, frozen: Params) -> State:
        """Train from step `start` to `config.steps`."""
        config = self.config
        batch = self._next_batch()
        step_fn, report = _compile(self.step_fn, state, frozen, batch)
        self.writer.scalars(start, report)
        _summary(report)
        clock = _Clock(config.batch_size, report.get("flops", 0.0))
        bar = tqdm(
            total=config.steps,
            initial=start,
            desc="training",
            unit="step",
            disable=None if jax.process_index() == 0 else True,
        )
        with _sigterm() as terminated, bar:
            pending = None
            for step in itertools.count(start + 1):
                with jax.transfer_guard("disallow"):
                    state, metrics = step_fn(state, frozen, batch)
                last = step == config.steps or terminated(step)
                # Save before the next batch is taken: state and iterator must agree.
                if last or step % config.save_every == 0:
                    self.checkpoints.save(step, state, self.iterator)
                if not last:
                    batch = self._next_batch()
                # The device works on this step while the host waits for the one before.
                if pending is not None:
                    self._finish_step(*pending, clock, bar)
                pending = (step, metrics)
                if last:
                    self._finish_step(*pending, clock, bar)
                    break
                clock.pause(self._observe, step, state, frozen)
        if step < config.steps:
            raise Interrupted(f"stopped by SIGTERM after step {step}; the state is saved.")
        return state

    def _next_batch(self) -> dict[str, jax.Array]:
        try:
            return sharding.put_batch(next(self.iterator), self.mesh)
        except StopIteration:
            raise UserError(
                "the training data is empty: no example is readable and has a valid pixel."
            ) from None

    def _finish_step(self, step: int, metrics: dict[str, jax.Array], clock: _Clock, bar) -> None:
        jax.block_until_ready(metrics["loss"])
        clock.tick()
        bar.update()
        if step % self.config.log_every and step != self.config.steps:
            return
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not np.isfinite(values["loss"]):
            raise UserError(
                f"the loss is not finite at step {step}: lower config.optimizer.learning_rate or "
                "set config.optimizer.clip_norm=1, then run again to go on from the last save."
            )
        values["learning_rate"] = float(self.schedule(step - 1))
        values |= clock.read()
        self.writer.scalars(step, values)
        summary = (
            f"loss {values['loss']:.4f}, {values['images_per_second']:.1f} img/s, "
            f"{values['step_seconds'] * 1e3:.0f} ms/step"
        )
        bar.set_postfix_str(summary)
        if bar.disable:  # no terminal: a line in the log instead
            logging.info("step %d/%d: %s", step, self.config.steps, summary)

    def _observe(self, step: int, state: State, frozen: Params) -> None:
        for every, observer in self.observers.items():
            period = self.config[every]
            if period and step % period == 0:
                weights = merge_params(frozen, state.get("ema", state["params"]))
                self.writer.scalars(step, observer(step, weights, self.writer))


def _dataset(config: Any, setup: Setup) -> grain.IterDataset:
    return make_train_dataset(
        [
            (name, weight, {"data_dir": config.data_dir, **config.data.options.get(name, {})})
            for name, weight in config.data.mixture.items()
            if weight > 0
        ],
        resolution=tuple(config.resolution),
        batch_size=config.batch_size,
        seed=config.seed,
        augment=config.data.augment.to_dict(),
        fields=setup.method.fields,
        tokenize=setup.tokenize,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_workers=config.data.num_workers,
    )


def _place(trainable: Params, optimizer, mesh: Mesh, *, ema: bool) -> tuple[State, State]:
    """The initial state on the mesh, and its shardings."""

    def init(params: Params) -> State:
        return init_state(params, optimizer, ema=ema)

    shardings = sharding.tree_shardings(jax.eval_shape(init, trainable), mesh)
    params = sharding.put_tree(trainable, shardings["params"])
    return jax.jit(init, out_shardings=shardings)(params), shardings


def _compile(step_fn, state: State, frozen: Params, batch: dict[str, jax.Array]):
    """Compile the step once, ahead of time; say what it costs."""
    began = time.perf_counter()
    compiled = step_fn.lower(state, frozen, batch).compile()
    report = {"compile_seconds": time.perf_counter() - began}
    cost = compiled.cost_analysis() or {}
    memory = compiled.memory_analysis()
    report["flops"] = float(cost.get("flops", 0.0))
    if memory is not None:
        report["temporary_bytes"] = float(memory.temp_size_in_bytes)
        report["argument_bytes"] = float(memory.argument_size_in_bytes)
    weights = [*jax.tree.leaves(state["params"]), *jax.tree.leaves(frozen)]
    report["trained_weights"] = float(sum(x.size for x in jax.tree.leaves(state["params"])))
    report["all_weights"] = float(sum(x.size for x in weights))
    return compiled, report


def _summary(report: dict[str, float]) -> None:
    logging.info(
        "compiled in %.1f s: %.1f M of %.1f M weights trained, %.2f GFLOP and %.0f MB of "
        "temporary memory a step and device",
        report["compile_seconds"],
        report["trained_weights"] / 1e6,
        report["all_weights"] / 1e6,
        report["flops"] / 1e9,
        report.get("temporary_bytes", 0.0) / 1e6,
    )


class _Clock:
    """Step time over the steps since the last reading, pauses left out."""

    def __init__(self, batch_size: int, flops: float):
        self._batch_size, self._flops = batch_size, flops
        kind = jax.devices()[0].device_kind
        self._peak = next((peak for name, peak in _PEAK.items() if name in kind), 0.0)
        self._steps, self._began = 0, time.perf_counter()

    def tick(self) -> None:
        self._steps += 1

    def pause(self, function: Callable[..., None], *args: Any) -> None:
        began = time.perf_counter()
        function(*args)
        self._began += time.perf_counter() - began

    def read(self) -> dict[str, float]:
        seconds = (time.perf_counter() - self._began) / max(self._steps, 1)
        self._steps, self._began = 0, time.perf_counter()
        values = {"step_seconds": seconds, "images_per_second": self._batch_size / seconds}
        if self._peak and self._flops:
            values["mfu"] = self._flops / seconds / self._peak
        return values


@contextmanager
def _sigterm() -> Iterator[Callable[[int], bool]]:
    """Within: a function that tells whether this step must be the last."""
    received = []

    def stop(step: int) -> bool:
        if jax.process_count() > 1:
            # Every process must agree on the step to stop at; JAX's preemption service decides it.
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return bool(received)

    if jax.process_count() > 1:
        yield stop
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)
