"""Saving and resuming a run: Orbax, asynchronous, with the data iterator's position."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp
from absl import logging

from jaxpercept.checkpoints import orbax
from jaxpercept.checkpoints.description import FILE_NAME, Description
from jaxpercept.checkpoints.diffusers_write import copy_tokenizer
from jaxpercept.checkpoints.load import STEPS
from jaxpercept.errors import UserError
from jaxpercept.training.optim import Params
from jaxpercept.training.step import State

# What may differ between a run and its continuation: how long, how often, where, and how the same
# arithmetic is carried out. Folders of single datasets (data.options.NAME.data_dir) may, too.
_MAY_CHANGE = (
    *(
        "steps",
        "data_dir",
        "mesh",
        "remat",
        "attention",
        "data.num_workers",
        "data.timeout",
        "keep",
    ),
    *("log_every", "eval_every", "save_every", "evaluation", "recover", "profile", "wandb"),
)


class Checkpoints:
    """The checkpoints of one run, in `workdir/checkpoints/STEP`.

    Each holds three items: `params` (the weights to predict with: the averaged ones where weights
    are averaged), `state` (the rest of the training state) and `data` (the iterator's position).
    A save that did not finish is never seen. Several processes share the folder.

    Raises:
        UserError: the workdir cannot be written to, or holds something else than a run.
    """

    def __init__(self, workdir: Path, *, keep: int):
        self._folder = workdir / STEPS
        if workdir.is_file():
            raise UserError(f"--workdir {workdir} is a file: give a folder.")
        for other in (orbax.WEIGHTS, "model_index.json"):
            if (workdir / other).exists():
                raise UserError(f"--workdir {workdir} holds a finished model: give another one.")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            writable = os.access(self._folder, os.W_OK)
        except OSError as error:
            raise UserError(
                f"--workdir {workdir} cannot be written to ({error.strerror}): give another one."
            ) from error
        if not writable:
            raise UserError(f"--workdir {workdir} cannot be written to: give another one.")
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        handlers = {
            "params": orbax.array_handler(),
            "state": orbax.array_handler(),
            "data": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(
            self._folder.resolve(), options=options, item_handlers=handlers
        )

    def latest_step(self) -> int | None:
        """The newest complete checkpoint."""
        return self._manager.latest_step()

    def shapes(self, step: int) -> Params:
        """Shapes and dtypes of the trained weights in a checkpoint."""
        return orbax.load_shapes(self._folder / str(step) / "params")

    def save(self, step: int, state: State, iterator: grain.DatasetIterator) -> None:
        """Start saving; returns once the arrays are copied.

        Raises:
            UserError: an earlier save failed, or this one cannot start.
        """
        params, rest = _split_state(state)
        with self._failures():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.PyTreeSave(params),
                    state=ocp.args.PyTreeSave(rest),
                    data=ocp.args.JsonSave(iterator.get_state()),
                ),
            )

    def check(self) -> None:
        """Raise a UserError if a save in the background has failed."""
        with self._failures():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Wait for the save in progress, and raise a UserError if it fails."""
        with self._failures():
            self._manager.wait_until_finished()

    def restore(
        self, step: int, state: State, shardings: State, iterator: grain.DatasetIterator
    ) -> State:
        """Read a checkpoint into the given shardings, and move the iterator to its place.

        Args:
            step: which checkpoint.
            state: a tree of the wanted structure, shapes and dtypes.
            shardings: where each leaf goes, on any number of devices.
            iterator: set to the saved position.

        Raises:
            UserError: the checkpoint is damaged, or of another model.
        """
        abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
        )
        params, rest = _split_state(abstract)
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=_restore_args(params),
                    state=_restore_args(rest),
                    data=ocp.args.JsonRestore(),
                ),
            )
        except (KeyError, ValueError, OSError) as error:
            raise UserError(
                f"the checkpoint {self._folder / str(step)} cannot be read ({_first_line(error)}): "
                "remove it to go on from an earlier one, or give another --workdir."
            ) from error
        iterator.set_state(restored["data"])
        return _join_state(restored["params"], restored["state"])

    def close(self) -> None:
        """Wait for the save in progress, and raise what went wrong in it."""
        try:
            self.wait()
        finally:
            self._manager.close()

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"a checkpoint could not be written to {self._folder} ({_first_line(error)}): make "
                "room or repair it, and run again to go on from the checkpoint before."
            ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _restore_args(tree: Any) -> ocp.args.PyTreeRestore:
    shardings = ocp.checkpoint_utils.construct_restore_args(tree)
    return ocp.args.PyTreeRestore(item=tree, restore_args=shardings)


def _split_state(state: State) -> tuple[Any, State]:
    rest = dict(state)
    return rest.pop("ema" if "ema" in rest else "params"), rest


def _join_state(params: Any, rest: State) -> State:
    return {**rest, ("ema" if "params" in rest else "params"): params}


def write_description(
    workdir: Path, description: Description, tokenizer_dir: Path | None = None
) -> None:
    """Say what the run is, once for all processes, and keep its tokenizer, if it has one."""
    if jax.process_index() == 0:
        if tokenizer_dir is not None:
            copy_tokenizer(tokenizer_dir, workdir / "tokenizer")
        description.save(workdir)


def refuse_other_run(workdir: Path, description: Description) -> None:
    """Check that the run a workdir holds is the one `description` is about.

    The number of steps may change. A learning-rate schedule that ends with the run then ends with
    the longer run; it changes where the run is continued, not before.

    Raises:
        UserError: naming the keys that differ, with both values.
    """
    before, now = _flat(Description.load(workdir)), _flat(description)
    changed = {k for k in {*before, *now} if before.get(k) != now.get(k)}
    allowed = {key for key in changed if _may_change(key)}
    end = "optimizer.decay_steps"
    if all(run.get(end) == run.get("steps") for run in (before, now)):
        allowed.add(end)
    refused = [f"{k} ({before.get(k)}, now {now.get(k)})" for k in sorted(changed - allowed)]
    if refused:
        rest = f" and {len(refused) - 5} more" if len(refused) > 5 else ""
        raise UserError(
            f"{workdir / FILE_NAME} is of a run with another {', '.join(refused[:5])}{rest}: give "
            "the same config to continue it, or another --workdir to start anew."
        )
    for key in sorted(changed & allowed):
        logging.info("%s was %s, now %s", key, before.get(key), now.get(key))


def _may_change(key: str) -> bool:
    names = any(key == name or key.startswith(name + ".") for name in _MAY_CHANGE)
    return names or (key.startswith("data.options.") and key.endswith(".data_dir"))


def _flat(description: Description) -> dict[str, Any]:
    """The config and the architectures, by dotted key, as JSON keeps them."""
    components = {name: c.to_dict() for name, c in description.components.items()}
    tree = json.loads(json.dumps({**description.config, **components}))
    if str(tree.get("method", {}).get("timesteps")).startswith("file:"):
        # The config names the file; what it held is in the method.
        tree["table of method.timesteps"] = description.method.get("timesteps")

    def walk(prefix: str, node: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(node, dict) and node:
            for key, value in node.items():
                yield from walk(f"{prefix}.{key}" if prefix else key, value)
        else:
            yield prefix, node

    return dict(walk("", tree))
