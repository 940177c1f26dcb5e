"""What a run would need: memory a device, and bytes sent a step, before it is begun.

The step is compiled for the mesh, and nothing is put on the devices. With JAX_PLATFORMS=cpu and
JAX_NUM_CPU_DEVICES=N it is compiled for N devices that are not there: their arrays are those of N
accelerators; temporary memory and what is sent are what XLA's CPU compiler makes of the step.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpercept.config import check_config
from jaxpercept.training import sharding
from jaxpercept.training.clock import compile_step
from jaxpercept.training.loop import make_step, open_data
from jaxpercept.training.optim import make_optimizer
from jaxpercept.training.setup import initial_weights, set_up
from jaxpercept.training.step import init_state


def dry_run(config: Any, *, mesh: Mesh | None = None) -> dict[str, Any]:
    """Compiles the step of a config and says what it costs.

    Returns:
        The facts of `clock.compile_step`; `held_bytes`: of one device, by what they are;
        `expected_sent_bytes`: what a step must send at least, by `expected_sent`.

    Raises:
        UserError: the config, the data or the checkpoint do not fit.
    """
    mesh = sharding.make_mesh(**config.mesh) if mesh is None else mesh
    check_config(config, sharding.batch_devices(mesh))
    setup = set_up(config)
    iterator = iter(open_data(config, setup))
    batch = next(iterator)
    iterator.close()
    optimizer, schedule = make_optimizer(config.optimizer)
    trained, frozen = initial_weights(config, setup)
    shapes = jax.eval_shape(lambda p: init_state(p, optimizer, ema=config.ema_decay > 0), trained)
    shardings = sharding.tree_shardings(shapes, mesh)
    state = _placed(shapes, shardings)
    frozen = _placed(frozen, sharding.tree_shardings(frozen, mesh))
    step_fn = make_step(config, setup, optimizer, schedule, mesh, shardings)
    placed = _batch(batch, mesh, config.accumulate)
    _, facts = compile_step(step_fn, state, frozen, placed, mesh)
    held = {
        "trained weights": held_bytes(state["params"]),
        "optimizer": held_bytes(state["opt_state"]),
        "averaged weights": held_bytes(state.get("ema", {})),
        "frozen weights": held_bytes(frozen),
        "batch": held_bytes(placed),
        "temporary": facts["temporary_bytes"],
    }
    sent = expected_sent(state["params"], mesh, config.accumulate)
    return facts | {"held_bytes": held, "expected_sent_bytes": sent}


def held_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays on one device."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def expected_sent(params: Any, mesh: Mesh, accumulate: int = 1) -> dict[str, float]:
    """Bytes that each device has to send in a step for its trained weights, by the mesh's axis.

    Every gradient is summed over the devices that split the batch: scattered over `fsdp`, summed
    over `data`, a share each, and gathered over `fsdp`; where the weights are split it is they that
    are gathered, once for each micro-batch. What frozen weights that are split and the activations
    of tensor parallelism add is not in it, nor what XLA gathers twice.
    """
    data, fsdp, tensor = (mesh.shape[axis] for axis in ("data", "fsdp", "tensor"))
    held = sum(
        x.size * x.dtype.itemsize // (tensor if "tensor" in x.sharding.spec else 1)
        for x in jax.tree.leaves(params)
    )
    return sent_by_axis(accumulate * held, data, fsdp)


def sent_by_axis(weights: int, data: int, fsdp: int) -> dict[str, float]:
    """`expected_sent` of so many bytes of weights and a mesh of these sizes."""
    return {
        "fsdp": weights * 2 * (fsdp - 1) / fsdp,
        "data": weights * 2 * (data - 1) / data / fsdp,
    }


def report(facts: dict[str, Any]) -> str:
    """The facts as a table for people."""
    held = {name: size for name, size in facts["held_bytes"].items() if size}
    rows = [("memory of a device", "MB")]
    rows += [(f"  {name}", f"{size / 1e6:,.1f}") for name, size in held.items()]
    rows.append(("  all", f"{sum(held.values()) / 1e6:,.1f}"))
    rows.append(("sent by a device in a step", "MB"))
    rows += [(f"  {kind}", f"{size / 1e6:,.1f}") for kind, size in facts["sent_bytes"].items()]
    rows.append(("  all", f"{sum(facts['sent_bytes'].values()) / 1e6:,.1f}"))
    expected = facts["expected_sent_bytes"]
    rows.append(("  at least, for the weights", f"{sum(expected.values()) / 1e6:,.1f}"))
    rows += [(f"    over {axis}", f"{size / 1e6:,.1f}") for axis, size in expected.items() if size]
    width = max(len(name) for name, _ in rows)
    mesh = ", ".join(f"{axis} {size}" for axis, size in facts["mesh"].items())
    lines = [f"{facts['devices']} x {facts['device_kind']} ({mesh})"]
    lines += [f"{name:<{width}}  {value:>12}" for name, value in rows]
    lines.append(
        f"{facts['flops'] / 1e9:,.1f} GFLOP a step and device, compiled in "
        f"{facts['compile_seconds']:.0f} s"
    )
    return "\n".join(lines)


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def _batch(batch: dict[str, np.ndarray], mesh: Mesh, accumulate: int) -> Any:
    """The shapes of the global batch, of all processes."""
    placed = {}
    for name, array in batch.items():
        rows = len(array) * jax.process_count()
        shape, spec = (rows, *array.shape[1:]), sharding.BATCH
        if accumulate > 1:
            shape, spec = (accumulate, rows // accumulate, *array.shape[1:]), P(None, *spec)
        placed[name] = jax.ShapeDtypeStruct(shape, array.dtype, sharding=NamedSharding(mesh, spec))
    return placed
