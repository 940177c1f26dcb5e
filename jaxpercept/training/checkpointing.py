"""Saving and resuming a run: Orbax, asynchronous, with the data iterator's position."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp

from jaxpercept.checkpoints import orbax
from jaxpercept.checkpoints.description import FILE_NAME, Description
from jaxpercept.checkpoints.load import FROZEN, STEPS
from jaxpercept.errors import UserError
from jaxpercept.training.step import State

# What may differ between a run and its continuation: how long, how often, where.
_MAY_CHANGE = frozenset(
    {"steps", "data_dir", "mesh", "log_every", "eval_every", "save_every", "picture_every"}
    | {"keep", "evaluation", "profile"}
)


class Checkpoints:
    """The checkpoints of one run, in `workdir/checkpoints/STEP`.

    Each holds three items: `params` (the weights to predict with: the averaged ones where weights
    are averaged), `state` (the rest of the training state) and `data` (the iterator). Unfinished
    saves are never seen by `latest_step`. Frozen weights are written once, in `workdir/frozen`.
    """

    def __init__(self, workdir: Path, *, keep: int):
        self._workdir = workdir
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=True, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager((workdir / STEPS).resolve(), options=options)

    def latest_step(self) -> int | None:
        """The newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: State, iterator: grain.DatasetIterator) -> None:
        """Start saving; returns once the arrays are copied. An earlier failed save raises here."""
        params, rest = _split_state(state)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                state=ocp.args.StandardSave(rest),
                data=grain.checkpoint.CheckpointSave(iterator),
            ),
        )

    def restore(
        self, step: int, state: State, shardings: State, iterator: grain.DatasetIterator
    ) -> State:
        """Read a checkpoint into the given shardings, and move the iterator to its place.

        Args:
            step: which checkpoint.
            state: a state of the wanted structure; only shapes and dtypes are read.
            shardings: where each leaf goes, on any number of devices.
            iterator: set to the saved position.
        """
        abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
        )
        params, rest = _split_state(abstract)
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(params),
                    state=ocp.args.StandardRestore(rest),
                    data=grain.checkpoint.CheckpointRestore(iterator),
                ),
            )
        except (KeyError, ValueError) as error:
            raise UserError(
                f"the checkpoint of step {step} in {self._workdir} does not fit this run "
                f"({str(error).splitlines()[0]}): use the config it was made with or a new workdir."
            ) from error
        return _join_state(restored["params"], restored["state"])

    def close(self) -> None:
        """Wait for the save in progress, and raise what went wrong in it."""
        self._manager.wait_until_finished()
        self._manager.close()


def _split_state(state: State) -> tuple[Any, State]:
    rest = dict(state)
    return rest.pop("ema" if "ema" in rest else "params"), rest


def _join_state(params: Any, rest: State) -> State:
    return {**rest, ("ema" if "params" in rest else "params"): params}


def open_workdir(workdir: Path, description: Description, frozen: orbax.Params) -> None:
    """Prepare a workdir, or check that a former run's workdir fits this run.

    Raises:
        UserError: the workdir belongs to a run with another model, data or method.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    if (workdir / FILE_NAME).exists():
        _refuse_other_run(workdir, description)
    elif jax.process_index() == 0:
        description.save(workdir)
    if frozen and not (workdir / FROZEN).exists():
        orbax.save_params(workdir / FROZEN, frozen)


def _refuse_other_run(workdir: Path, description: Description) -> None:
    before = _comparable(Description.load(workdir))
    now = _comparable(description)
    changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if changed:
        raise UserError(
            f"{workdir} holds a run with another value of {', '.join(changed)}: give the same "
            "config to continue it, or another --workdir to start anew."
        )


def _comparable(description: Description) -> dict[str, Any]:
    config = {k: v for k, v in description.config.items() if k not in _MAY_CHANGE}
    components = {name: c.to_dict() for name, c in description.components.items()}
    return json.loads(json.dumps({**config, "checkpoint": config.get("checkpoint"), **components}))
