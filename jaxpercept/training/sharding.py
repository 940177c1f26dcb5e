"""Where every array lives: one mesh, and rules from a weight's path and shape to its sharding.

The mesh has three axes. `data` and `fsdp` both split the batch; `fsdp` also splits every large
weight and its optimizer moments; `tensor` splits attention heads and feed-forward widths, the
column-then-row pattern of Megatron-LM (arXiv 1909.08053), which needs no extra layout change.
Between TPU slices only `data` reaches: they talk over the data centre's network.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Shaped

from jaxpercept.errors import UserError

BATCH = P(("data", "fsdp"))

# Linear kernels are [in, out]. The first pair of rules is column parallel, the second row parallel.
_TENSOR_RULES: tuple[tuple[str, int], ...] = (
    (r"\.(to_q|to_k|to_v|q_proj|k_proj|v_proj)\.kernel$", 1),
    (r"\.(ff\.net\.0\.proj|mlp\.fc1)\.kernel$", 1),
    (r"\.(to_out\.0|out_proj)\.kernel$", 0),
    (r"\.(ff\.net\.2|mlp\.fc2)\.kernel$", 0),
)
# Below this many elements, gathering a shard costs more than keeping a copy.
_MIN_FSDP_SIZE = 2**14


# The sizes of (data, fsdp, tensor) by name; -1: whatever is left. "hybrid" splits the weights
# within a slice (of one slice or none, within a host), and each has them all.
PRESETS: dict[str, tuple[int, int, int]] = {
    "ddp": (-1, 1, 1),
    "fsdp": (1, -1, 1),
    "fsdp_tensor": (1, -1, 2),
    "hybrid": (0, -1, 1),  # 0: as many as there are slices or hosts
}


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    preset: str = "",
    *,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh of named axes; one size may be -1, "whatever is left".

    Args:
        data, fsdp, tensor: the sizes of the axes.
        preset: one of `PRESETS` instead of sizes.
        devices: None for all devices of all processes.

    Raises:
        UserError: the sizes do not multiply to the number of devices, `tensor` would split an
            example between processes, which each read examples of their own, or `fsdp` or `tensor`
            would reach from one slice into another.
    """
    devices = jax.devices() if devices is None else devices
    named = f"config.mesh data={data}, fsdp={fsdp}, tensor={tensor}"
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    if preset:
        named = f"config.mesh.preset={preset}"
        sizes = _preset(preset, sizes, devices)
    count = len(devices)
    free = [name for name, size in sizes.items() if size == -1]
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) == 1 and known > 0 and count % known == 0:
        sizes[free[0]] = count // known
    if any(size < 1 for size in sizes.values()) or int(np.prod(list(sizes.values()))) != count:
        raise UserError(
            f"{named} does not fit {count} device(s): make the sizes multiply to that number, or "
            "leave one of them -1."
        )
    if jax.process_count() > 1 and jax.local_device_count() % sizes["tensor"]:
        raise UserError(
            f"config.mesh.tensor={sizes['tensor']} does not divide the "
            f"{jax.local_device_count()} device(s) of a process: use a divisor."
        )
    arranged = _arranged(devices, tuple(sizes.values()))
    # Explicit axes (JAX's default) refuse the reshapes around attention; Auto lets XLA place them.
    return Mesh(arranged, tuple(sizes), axis_types=(AxisType.Auto,) * 3)


def _preset(name: str, sizes: dict[str, int], devices: Sequence[Any]) -> dict[str, int]:
    if name not in PRESETS:
        raise UserError(f"config.mesh.preset {name!r} is none of {', '.join(PRESETS)}.")
    if sizes != {"data": -1, "fsdp": 1, "tensor": 1}:
        raise UserError(
            f"config.mesh.preset={name} sets the sizes of the axes: leave data, fsdp and tensor as "
            "they are, or leave the preset out."
        )
    islands = _groups(devices, "slice_index")
    if islands == 1:
        islands = _groups(devices, "process_index")
    return dict(zip(sizes, (size or islands for size in PRESETS[name]), strict=True))


def _groups(devices: Sequence[Any], attribute: str) -> int:
    """Into how many groups an attribute of the devices divides them; CPUs have no slices."""
    return len({getattr(device, attribute, 0) for device in devices})


def _arranged(devices: Sequence[Any], sizes: tuple[int, int, int]) -> np.ndarray:
    """The devices as [data, fsdp, tensor], neighbours of the machine beside each other.

    Raises:
        UserError: an axis other than `data` would reach from one slice into another.
    """
    # Two-dimensional tori have no axis of their own for each of ours.
    split = {"allow_split_physical_axes": True}
    slices = _groups(devices, "slice_index")
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, **split)
    data, fsdp, tensor = sizes
    if data % slices:
        raise UserError(
            f"config.mesh.data={data} is not a multiple of the {slices} slices, between which only "
            "the batch is split: set config.mesh.preset=hybrid."
        )
    inner, outer = (data // slices, fsdp, tensor), (slices, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, **split)


def weight_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """The PartitionSpec of one weight, by its diffusers path and shape."""
    axes: list[str | None] = [None] * len(shape)
    if mesh.shape["tensor"] > 1:
        for pattern, dimension in _TENSOR_RULES:
            if re.search(pattern, path) and shape[dimension] % mesh.shape["tensor"] == 0:
                axes[dimension] = "tensor"
    if mesh.shape["fsdp"] > 1 and np.prod(shape, dtype=np.int64) >= _MIN_FSDP_SIZE:
        for dimension in np.argsort(shape, kind="stable")[::-1]:
            if axes[dimension] is None and shape[dimension] % mesh.shape["fsdp"] == 0:
                axes[dimension] = "fsdp"
                break
    return P(*axes)


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf; a leaf is placed by the last string key on its path.

    Optimizer moments and averaged weights hold the same paths as the weights, so the same rule
    places them beside each other. Scalars are replicated.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
        return NamedSharding(mesh, weight_spec(names[-1] if names else "", leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, tree)


def put_tree(tree: Any, shardings: Any) -> Any:
    """Host arrays (the same on every process) to global arrays, each process filling its shards."""

    def put(array: Any, sharding: NamedSharding) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, tree, shardings)


def put_batch(
    batch: Mapping[str, Shaped[np.ndarray, "b ..."]], mesh: Mesh, accumulate: int = 1
) -> dict[str, jax.Array]:
    """This process's rows of a batch to global arrays split over `data` and `fsdp`.

    Args:
        batch: arrays whose first axis counts this process's examples.
        mesh: where the batch goes.
        accumulate: above 1, the batch is cut into so many micro-batches along a new first axis.
            Each takes a contiguous part of every process's rows, which makes it a contiguous part
            of the global stream: the same examples on any number of devices and processes.
    """
    if accumulate == 1:
        sharding = NamedSharding(mesh, BATCH)
    else:
        sharding = NamedSharding(mesh, P(None, *BATCH))
        batch = {k: x.reshape(accumulate, -1, *x.shape[1:]) for k, x in batch.items()}
    # With several processes JAX takes this for an implicit transfer, which the loop forbids.
    with jax.transfer_guard_host_to_device("allow"):
        return {
            name: jax.make_array_from_process_local_data(sharding, array)
            for name, array in batch.items()
        }


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def batch_devices(mesh: Mesh) -> int:
    """How many ways a batch is split; batch sizes must be multiples of it."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
