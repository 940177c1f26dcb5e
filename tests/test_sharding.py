"""Meshes and shardings: the same losses whatever the devices, and what each device holds."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxpercept import losses
from jaxpercept.config import base_config
from jaxpercept.diffusion.noise import per_example
from jaxpercept.errors import UserError
from jaxpercept.training import sharding
from jaxpercept.training.optim import make_optimizer
from jaxpercept.training.step import init_state, make_train_step

ROWS, CELLS, STEPS = 16, 6, 20
# Names that the rules for tensor parallelism know, and one they do not.
SHAPES = {
    "conv_in.kernel": (5, 16),
    "attn1.to_q.kernel": (16, 16),
    "attn1.to_q.bias": (16,),
    "attn1.to_out.0.kernel": (16, 16),
    "block.ff.net.0.proj.kernel": (16, 32),
    "block.ff.net.2.kernel": (32, 16),
}
MESHES = {
    "data": {"data": 8},
    "data x fsdp": {"data": 2, "fsdp": 4},
    "data x fsdp x tensor": {"data": 2, "fsdp": 2, "tensor": 2},
}


def loss(params, batch, key):
    """A masked mean, with noise that belongs to the example, before a frozen projection."""
    w = params["unet"]
    x = batch["x"] @ w["conv_in.kernel"]
    x += (
        jax.nn.gelu(x @ w["attn1.to_q.kernel"] + w["attn1.to_q.bias"][None, None])
        @ w["attn1.to_out.0.kernel"]
    )
    x += jax.nn.gelu(x @ w["block.ff.net.0.proj.kernel"]) @ w["block.ff.net.2.kernel"]
    output = x @ params["frozen"]["kernel"]
    noise = per_example(key, batch["index"], lambda k: jax.random.normal(k, output.shape[1:]))
    target = batch["target"] + 0.3 * noise
    mse = losses.mse(output[:, None], target[:, None], batch["valid"][:, None])
    return mse, {"mse": mse}


@pytest.fixture(scope="module")
def small_shards():
    """FSDP shards even the weights of a tiny network."""
    before = sharding._MIN_FSDP_SIZE
    sharding._MIN_FSDP_SIZE = 64
    yield
    sharding._MIN_FSDP_SIZE = before


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng()
    params = {
        "unet": {
            path: rng.normal(size=shape).astype(np.float32) / np.float32(np.sqrt(shape[0]))
            for path, shape in SHAPES.items()
        }
    }
    frozen = {"frozen": {"kernel": rng.normal(size=(16, 3)).astype(np.float32) / 4}}
    truth = rng.normal(size=(5, 3))
    batches = []
    for step in range(STEPS):
        x = rng.normal(size=(ROWS, CELLS, 5)).astype(np.float32)
        batch = {"x": x, "target": (x @ truth).astype(np.float32)}
        batch["valid"] = rng.random((ROWS, CELLS, 1)) > 0.4
        batch["index"] = np.arange(ROWS, dtype=np.int32) + ROWS * step
        batches.append(batch)
    return params, frozen, batches


def run(problem, mesh, accumulate):
    """The losses of all steps, and the final state."""
    params, frozen, batches = problem
    config = base_config().optimizer
    config.update({"learning_rate": 0.01, "warmup_steps": 4, "clip_norm": 0.5})
    optimizer, schedule = make_optimizer(config)

    def init(params):
        return init_state(params, optimizer, ema=True)

    shardings = sharding.tree_shardings(jax.eval_shape(init, params), mesh)
    placed = sharding.put_tree(params, shardings["params"])
    state = jax.jit(init, out_shardings=shardings)(placed)
    frozen = sharding.put_tree(frozen, sharding.tree_shardings(frozen, mesh))
    step = make_train_step(
        loss,
        optimizer,
        mesh=mesh,
        state_sharding=shardings,
        schedule=schedule,
        seed=3,
        accumulate=accumulate,
        ema_decay=0.9,
    )
    values = []
    for batch in batches:
        state, metrics = step(state, frozen, sharding.put_batch(batch, mesh, accumulate))
        values.append(float(metrics["loss"]))
    return np.array(values), state


@pytest.fixture(scope="module")
def one_device(problem, small_shards):
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return {accumulate: run(problem, mesh, accumulate) for accumulate in (1, 2)}


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_eight_devices_give_the_losses_of_one(problem, one_device, name, accumulate):
    expected, _ = one_device[accumulate]
    mesh = sharding.make_mesh(**MESHES[name])
    values, final = run(problem, mesh, accumulate)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    assert expected[-1] < 0.9 * expected[0]
    _check_shards(final, mesh)


def _check_shards(state, mesh):
    """Kernels are cut, and their moments and averages with them."""
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    adam = next(s for s in state["opt_state"] if hasattr(s, "mu"))
    for tree in (state["params"], adam.mu, adam.nu, state["ema"]):
        for path, weight in tree["unet"].items():
            ways = fsdp if weight.ndim > 1 else 1
            ways *= tensor if "conv" not in path and weight.ndim > 1 else 1
            assert weight.size == ways * weight.addressable_shards[0].data.size, path
    kernels = [x for x in jax.tree.leaves(state) if x.ndim > 1]
    held = sum(x.addressable_shards[0].data.nbytes for x in kernels)
    assert held <= sum(x.nbytes for x in kernels) / fsdp


def test_micro_batches_are_the_same_examples_on_any_layout(problem):
    """Which examples are averaged together must not depend on devices: masks weigh them."""
    batch = problem[2][0]
    for devices in (1, 4):
        mesh = sharding.make_mesh(devices=jax.devices()[:devices])
        placed = sharding.put_batch(batch, mesh, 4)["index"]
        np.testing.assert_array_equal(placed, np.arange(ROWS).reshape(4, 4))
        assert placed.sharding.spec == P(None, ("data", "fsdp"))
        np.testing.assert_array_equal(sharding.put_batch(batch, mesh)["index"], np.arange(ROWS))


def test_weight_specs(monkeypatch):
    monkeypatch.setattr(sharding, "_MIN_FSDP_SIZE", 2**14)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    large = 2**10

    def spec(path, *shape):
        return sharding.weight_spec(path, shape, mesh)

    # The largest dimension is cut; a tensor-parallel one is taken first.
    assert spec("down_blocks.0.resnets.0.conv1.kernel", 3, 3, 64, 128) == P(
        None, None, None, "fsdp"
    )
    assert spec("a.attn1.to_q.kernel", large, large) == P("fsdp", "tensor")
    assert spec("a.attn1.to_out.0.kernel", large, large) == P("tensor", "fsdp")
    assert spec("a.ff.net.0.proj.kernel", large, 8 * large) == P("fsdp", "tensor")
    assert spec("a.ff.net.2.kernel", 4 * large, large) == P("tensor", "fsdp")
    assert spec("encoder.layers.0.self_attn.q_proj.kernel", large, large) == P("fsdp", "tensor")
    # What is small, odd, or a scalar stays whole.
    assert spec("a.norm.scale", 1024) == P(None)
    assert spec("conv_in.kernel", 3, 3, 4, 8) == P(None, None, None, None)
    assert spec("a.kernel", 1025, 1025) == P(None, None)
    assert spec("", *()) == P()


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 1, 1), (8, 2, 1)])
def test_a_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(UserError, match=r"config.mesh data=.* does not fit 8 device\(s\)"):
        sharding.make_mesh(*sizes)


def test_a_mesh_of_some_devices():
    mesh = sharding.make_mesh(fsdp=2, devices=jax.devices()[2:6])
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 1}
    assert {device.id for device in mesh.devices.flat} == {2, 3, 4, 5}
    assert sharding.batch_devices(mesh) == 4


@pytest.mark.parametrize(
    ("preset", "sizes"),
    [("ddp", (8, 1, 1)), ("fsdp", (1, 8, 1)), ("fsdp_tensor", (1, 4, 2)), ("hybrid", (1, 8, 1))],
)
def test_presets(preset, sizes):
    assert tuple(sharding.make_mesh(**base_config().mesh, devices=None).shape.values()) == (8, 1, 1)
    assert tuple(sharding.make_mesh(preset=preset).shape.values()) == sizes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"preset": "zero"}, "is none of ddp, fsdp, fsdp_tensor, hybrid"),
        ({"preset": "fsdp", "tensor": 2}, "sets the sizes of the axes"),
        ({"preset": "fsdp_tensor", "devices": 3}, "does not fit 3 device"),
    ],
)
def test_a_preset_that_does_not_fit_is_refused(arguments, words):
    devices = jax.devices()[: arguments.pop("devices", 8)]
    with pytest.raises(UserError, match=words):
        sharding.make_mesh(**arguments, devices=devices)


class SomeChip:
    """What meshes are made of, with a slice or a host that no CPU has."""

    platform, device_kind = "cpu", "cpu"

    def __init__(self, id, slice_index=0, process_index=0):
        self.id, self.slice_index, self.process_index = id, slice_index, process_index


@pytest.mark.parametrize("attribute", ["slice_index", "process_index"])
def test_hybrid_keeps_weights_within_a_slice_or_else_a_host(attribute):
    rng = np.random.default_rng()
    # The devices of two groups come in any order.
    chips = [SomeChip(i, **{attribute: i % 2}) for i in rng.permutation(8)]
    if attribute == "process_index":
        chips.sort(key=lambda chip: chip.process_index)  # as jax.devices() has them
    sizes = sharding._preset("hybrid", {"data": -1, "fsdp": 1, "tensor": 1}, chips)
    assert sizes == {"data": 2, "fsdp": -1, "tensor": 1}
    mesh = sharding._arranged(chips, (2, 4, 1))
    groups = [{getattr(chip, attribute) for chip in row.ravel()} for row in mesh]
    assert groups == [{0}, {1}]
    assert {chip.id for chip in mesh.ravel()} == set(range(8))


def test_only_the_batch_is_split_between_slices():
    chips = [SomeChip(i, slice_index=i // 4) for i in range(8)]
    for sizes in ((8, 1, 1), (4, 1, 2), (2, 2, 2)):
        mesh = sharding._arranged(chips, sizes)
        assert mesh.shape == sizes
        assert [chip.slice_index for chip in mesh[:, 0, 0]] == sorted(
            chip.slice_index for chip in mesh[:, 0, 0]
        )
        for row in mesh:
            assert len({chip.slice_index for chip in row.ravel()}) == 1
    with pytest.raises(UserError, match=r"data=1 is not a multiple of the 2 slices.*hybrid"):
        sharding._arranged(chips, (1, 8, 1))
