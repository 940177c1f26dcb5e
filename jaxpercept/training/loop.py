"""The one training loop."""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Shaped
from tqdm import tqdm

from jaxpercept.checkpoints import orbax
from jaxpercept.checkpoints.load import FROZEN, load_frozen, merge_params
from jaxpercept.config import check_config, dataset_options
from jaxpercept.data.pipeline import TrainDataset, TrainIterator, make_train_dataset
from jaxpercept.training import sharding
from jaxpercept.training.checkpointing import Checkpoints, refuse_other_run, write_description
from jaxpercept.training.clock import Clock, compile_step
from jaxpercept.training.metric_writer import MetricWriter
from jaxpercept.training.optim import Params, make_optimizer
from jaxpercept.training.record import Record
from jaxpercept.training.recovery import Diverged, Recovery, not_finite, nowhere_to_go
from jaxpercept.training.setup import Setup, initial_weights, set_up
from jaxpercept.training.step import State, init_state, make_train_step
from jaxpercept.training.trace import Trace

Observer = Callable[[int, Params, MetricWriter], dict[str, float]]
"""`(step, all weights, writer) -> metrics`: evaluates, or draws pictures."""


class Interrupted(Exception):
    """SIGTERM came; the state is saved."""


def train(
    config: Any,
    workdir: Path,
    *,
    observer: Callable[[Setup, Mesh], Observer] | None = None,
    mesh: Mesh | None = None,
) -> State:
    """Train as `config` says, or continue what `workdir` holds.

    Args:
        config: `jaxpercept.config.base_config()` with changes.
        workdir: gets what `training/record.py` lists. With several hosts, a folder that all of
            them share.
        observer: builds what is called every `eval_every` steps and at the end.
        mesh: None for all devices, arranged as `config.mesh` says.

    Returns:
        The final state.

    Raises:
        UserError: the config, the data, the checkpoint or the workdir do not fit.
        Interrupted: SIGTERM came; run the same again to go on.
    """
    mesh = sharding.make_mesh(**config.mesh) if mesh is None else mesh
    check_config(config, sharding.batch_devices(mesh))
    setup = set_up(config, workdir)
    iterator = iter(open_data(config, setup))
    checkpoints = Checkpoints(workdir, keep=config.keep)
    try:
        start = checkpoints.latest_step()
        if start is not None:
            refuse_other_run(workdir, setup.description)
        # Before weights are read: it looks at the images to evaluate on.
        observe = observer(setup, mesh) if observer is not None else None
        optimizer, schedule = make_optimizer(config.optimizer)
        trained, frozen = _weights(config, setup, workdir, checkpoints, start)
        write_description(workdir, setup.description, setup.tokenizer_dir)
        state, shardings = _place(config, trained, optimizer, mesh, checkpoints, start, iterator)
        frozen = sharding.put_tree(frozen, sharding.tree_shardings(frozen, mesh))
        step_fn = make_step(config, setup, optimizer, schedule, mesh, shardings)
        record = Record(workdir, setup.description, start or 0, iterator.provenance)
        record.card()
        writer = MetricWriter(
            workdir, start or 0, project=config.wandb, config=setup.description.config
        )
        trace = Trace(config.profile, workdir)
        try:
            loop = _Loop(config, mesh, step_fn, iterator, checkpoints, writer, observe)
            state = loop.run(start or 0, state, frozen, record, trace)
            record.card()
            return state
        finally:
            trace.close()
            writer.close()
    finally:
        iterator.close()
        checkpoints.close()


def make_step(
    config: Any,
    setup: Setup,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    shardings: State,
) -> Callable[..., Any]:
    """The train step of a config."""
    return make_train_step(
        setup.method.loss,
        optimizer,
        mesh=mesh,
        state_sharding=shardings,
        schedule=schedule,
        seed=config.seed,
        accumulate=config.accumulate,
        ema_decay=config.ema_decay,
    )


def open_data(config: Any, setup: Setup) -> TrainDataset:
    """This process's share of the data of a run."""
    task = getattr(setup.method, "task", None)
    return make_train_dataset(
        [
            (name, weight, dataset_options(config, name))
            for name, weight in config.data.mixture.items()
            if weight > 0
        ],
        resolution=tuple(config.resolution),
        batch_size=config.batch_size,
        seed=config.seed,
        augment=config.data.augment.to_dict(),
        fields=setup.method.fields,
        tokenize=setup.tokenize,
        instructions=tuple(task.parts) if task else (),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_workers=config.data.num_workers,
        timeout=float(config.data.timeout),
    )


def _weights(
    config: Any, setup: Setup, workdir: Path, checkpoints: Checkpoints, start: int | None
) -> tuple[Params, Params]:
    """The trained weights (of a run to be continued, their shapes) and the frozen ones."""
    if start is not None:
        return checkpoints.shapes(start), load_frozen(workdir)
    trained, frozen = initial_weights(config, setup)
    if frozen:
        orbax.save_params(workdir / FROZEN, frozen)
    return trained, frozen


def _place(
    config: Any,
    trained: Params,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    checkpoints: Checkpoints,
    start: int | None,
    iterator: TrainIterator,
) -> tuple[State, State]:
    """The state on the mesh, initial or as saved, and its shardings."""

    def init(params: Params) -> State:
        return init_state(params, optimizer, ema=config.ema_decay > 0)

    shapes = jax.eval_shape(init, trained)
    shardings = sharding.tree_shardings(shapes, mesh)
    if start is None:
        params = sharding.put_tree(trained, shardings["params"])
        return jax.jit(init, out_shardings=shardings, donate_argnums=0)(params), shardings
    logging.info("continuing from step %d", start)
    return checkpoints.restore(start, shapes, shardings, iterator), shardings


_MUCH_WAITING = 0.1
_WARM = 20  # steps before anything is said of the data
_KEEP_UP = (
    "the data do not keep up with the devices, which wait for them %.0f %% of the time: set "
    "config.data.num_workers to the number of cores, and prepare the data with jaxpercept.prepare."
)


class _Loop:
    """The steps between the first batch and the last save."""

    def __init__(self, config, mesh, step_fn, iterator, checkpoints, writer, observe):
        self.config, self.mesh, self.step_fn, self.iterator = config, mesh, step_fn, iterator
        self.checkpoints, self.writer, self.observe = checkpoints, writer, observe
        self.recovery = Recovery(**config.recover)

    def run(self, start: int, state: State, frozen: Params, record: Record, trace: Trace) -> State:
        """Train from step `start` to `config.steps`, then observe."""
        steps = self.config.steps
        if start >= steps:
            if scores := self._observe(start, state, frozen):
                self.writer.scalars(start, scores)
            return state
        batch = next(self.iterator)
        _describe_batch(batch)
        index, batch = batch["index"], self._put(batch)
        step_fn, facts = compile_step(self.step_fn, state, frozen, batch, self.mesh)
        record.facts(facts)
        self.trace = trace
        self.clock = Clock(self.config.batch_size, facts["flops"])
        self.warn_from = start + _WARM
        self.bar = tqdm(
            total=steps,
            initial=start,
            desc="training",
            unit="step",
            disable=None if jax.process_index() == 0 else True,
        )
        shapes = jax.eval_shape(lambda: state)
        shardings = jax.tree.map(lambda x: x.sharding, state)
        with self.bar, jax.transfer_guard("disallow"), _sigterm() as terminated:
            while True:
                try:
                    state, step, values = self._steps(
                        start, state, frozen, (batch, index), step_fn, terminated
                    )
                    break
                except Diverged as error:
                    start, state = self._roll_back(error, shapes, shardings)
                    batch, index = self._next()
            if step < steps:
                self._report(step, values)
                raise Interrupted(f"stopped by SIGTERM after step {step}; the state is saved.")
            self._report(step, values, lambda: self._observe(step, state, frozen))
        return state

    def _steps(self, start: int, state: State, frozen: Params, first, step_fn, terminated):
        """Take steps until the end or until `terminated`, and save.

        Returns:
            The state, the last step and its metrics, which are not reported yet.
        """
        config, pending, (batch, index) = self.config, (), first
        for step in range(start + 1, config.steps + 1):
            with self.trace.step(step):
                state, metrics = step_fn(state, frozen, batch)
            now, last = (step, metrics, index), terminated(step) or step == config.steps
            # Save before the next batch is taken: state and iterator must agree.
            if not last and step % config.save_every == 0:
                self._save(step, state, metrics)
            self.checkpoints.check()
            self.trace.done(step, metrics)
            if not last:
                batch, index = self._next()
            # The device works on this step while the host reads the one before.
            if pending:
                self._report(pending[0], self._read(*pending))
            pending = now
            if last:
                values = self._read(*now)
                self._save(step, state, metrics, last=True)
                break
            if config.eval_every and step % config.eval_every == 0:
                observe = functools.partial(self._observe, step, state, frozen)
                self._report(step, self._read(*now), observe)
                pending = ()
        return state, step, values

    def _next(self) -> tuple[dict[str, jax.Array], np.ndarray]:
        """The next batch on the devices, and where its examples of this process come from."""
        with self.clock.waiting():
            batch = next(self.iterator)
        return self._put(batch), batch["index"]

    def _put(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        return sharding.put_batch(batch, self.mesh, self.config.accumulate)

    def _roll_back(self, error: Diverged, shapes: State, shardings: State) -> tuple[int, State]:
        """The newest checkpoint, to go on from with the data that come next.

        Raises:
            UserError: there is none.
        """
        self.checkpoints.wait()
        step = self.checkpoints.latest_step()
        if step is None:
            raise nowhere_to_go(error)
        logging.warning("%s: back to step %d, with the data that come next.", error, step)
        position = self.iterator.get_state()
        with jax.transfer_guard("allow"):
            state = self.checkpoints.restore(step, shapes, shardings, self.iterator)
        self.iterator.set_state(position)
        self.writer.go_back(step)
        self.bar.reset()
        self.bar.update(step)
        self.clock.start()
        return step, state

    def _save(
        self, step: int, state: State, metrics: Mapping[str, jax.Array], *, last: bool = False
    ) -> None:
        if not_finite(jax.device_get(metrics)) and not last:
            return  # a checkpoint is what to go back to
        with jax.transfer_guard("allow"):
            self.checkpoints.save(step, state, self.iterator)

    def _read(
        self, step: int, metrics: Mapping[str, jax.Array], index: np.ndarray
    ) -> dict[str, float]:
        """Wait for a step's metrics and check them.

        Raises:
            Diverged: too many steps were not finite.
        """
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.clock.tick()
        self.recovery.look(step, values, index)
        return values

    def _report(
        self,
        step: int,
        values: dict[str, float],
        observe: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        """Report a step's metrics, with those `observe` finds."""
        self.bar.update()
        if step % self.config.log_every and observe is None:
            return
        values |= self.clock.read()
        if step > self.warn_from and values["input_wait"] > _MUCH_WAITING:
            self.warn_from = self.config.steps
            logging.warning(_KEEP_UP, 100 * values["input_wait"])
        if skipped := sum(self.iterator.skipped.values()):
            values["skipped_examples"] = skipped
        if held := self.iterator.worker_memory():
            values["worker_megabytes"] = held / 1e6
        if self.recovery.skipped:
            values["skipped_steps"] = self.recovery.skipped
        summary = (
            f"loss {values['loss']:.4f}, {values['images_per_second']:.1f} img/s, "
            f"{values['step_seconds'] * 1e3:.0f} ms/step"
        )
        self.bar.set_postfix_str(summary)
        if self.bar.disable:  # no terminal: a line in the log instead
            logging.info("step %d/%d: %s", step, self.config.steps, summary)
        if observe is not None:
            values |= observe()
            self.clock.start()
        self.writer.scalars(step, values)

    def _observe(self, step: int, state: State, frozen: Params) -> dict[str, float]:
        if self.observe is None:
            return {}
        weights = merge_params(frozen, state.get("ema", state["params"]))
        with jax.transfer_guard("allow"):
            return self.observe(step, weights, self.writer)


def _describe_batch(batch: Mapping[str, Shaped[np.ndarray, "b ..."]]) -> None:
    """One line about the first batch, in which a wrong unit or a wrong mask shows."""
    if "depth" in batch:
        depth = batch["depth"][batch["valid"]]
        near, median, far = np.quantile(depth, (0.0, 0.5, 1.0))
        logging.info(
            "first batch: %.1f %% of the pixels valid, depth %.2f to %.2f m, median %.2f m",
            100 * batch["valid"].mean(),
            near,
            far,
            median,
        )


@contextmanager
def _sigterm() -> Iterator[Callable[[int], bool]]:
    """Within: a function that tells whether this step must be the last."""
    if jax.process_count() > 1:
        # Every process must stop at the same step; JAX's preemption service agrees on it.
        yield _preempted
        return
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: False  # Python hands signals to the main thread alone
        return
    previous = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield lambda step: bool(received)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _preempted(step: int) -> bool:
    try:
        return multihost_utils.reached_preemption_sync_point(step)
    except RuntimeError:  # the service is switched off: jax_enable_preemption_service
        return False
