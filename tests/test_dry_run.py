"""What a run would need, against what a run of the same config holds and sends."""

import jax
import numpy as np
import pytest
import tiny_run
from commands import door, restore_logging  # noqa: F401
from tiny_run import base_of_module, data_of_module  # noqa: F401

from jaxpercept import train as train_door
from jaxpercept.training import dry_run as module
from jaxpercept.training import sharding
from jaxpercept.training.dry_run import dry_run, expected_sent, held_bytes, report

pytestmark = pytest.mark.usefixtures("restore_logging")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """FSDP shards even the weights of a tiny network."""
    monkeypatch.setattr(sharding, "_MIN_FSDP_SIZE", 64)


def bytes_on(device, tree):
    return sum(
        shard.data.nbytes
        for x in jax.tree.leaves(tree)
        for shard in x.addressable_shards
        if shard.device == device
    )


@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 2, "fsdp": 4}])
def test_arrays_take_what_they_take(base, mesh):
    config = tiny_run.config(base, ema_decay=0.9, mesh={**mesh, "tensor": 1})
    made = sharding.make_mesh(**mesh)
    facts = dry_run(config, mesh=made)
    weights = {"net": {"kernel": np.zeros((64, 24), np.float32), "bias": np.zeros(24, np.float32)}}
    placed = sharding.put_tree(weights, sharding.tree_shardings(weights, made))
    assert held_bytes(placed) == bytes_on(jax.devices()[0], placed)
    held = facts["held_bytes"]
    assert held["averaged weights"] == held["trained weights"]
    # Two moments and some counters.
    assert 2 * held["trained weights"] <= held["optimizer"] < 2.1 * held["trained weights"] + 100
    assert held["temporary"] == facts["temporary_bytes"] > 0
    whole = 4 * facts["trained_weights"]
    share = held["trained weights"] / whole
    assert share == 1 if "fsdp" not in mesh else 0.25 <= share < 0.5
    # What XLA sends beyond the weights: masks, losses and norms.
    sent, expected = (sum(facts[f"{name}sent_bytes"].values()) for name in ("", "expected_"))
    assert sent > 0.99 * expected
    if "fsdp" not in mesh:
        assert expected == pytest.approx(2 * 7 / 8 * whole)
        assert sent < 1.1 * expected + 50_000


def test_sums_by_hand():
    mesh = sharding.make_mesh(data=2, fsdp=4)
    params = {"a.kernel": np.zeros((64, 64), np.float32), "bias": np.zeros(10, np.float32)}
    placed = sharding.put_tree(params, sharding.tree_shardings(params, mesh))
    # A weight that is split is gathered, its gradient scattered; a gradient that is not, summed:
    # as much, by ring algorithms.
    every = 64 * 64 * 4 + 40
    by_axis = {"fsdp": 2 * 3 / 4 * every, "data": 2 * 1 / 2 * every / 4}
    assert expected_sent(placed, mesh) == by_axis
    assert sum(by_axis.values()) == 2 * 7 / 8 * every
    thrice = expected_sent(placed, mesh, accumulate=3)
    assert thrice == {axis: 3 * size for axis, size in by_axis.items()}


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections
def test_the_command_writes_nothing(base, tmp_path, capsys):
    config = tiny_run.config(base, mesh={"data": -1, "fsdp": 2, "tensor": 1})
    file = tiny_run.write_config(tmp_path / "tiny.py", config)
    workdir = tmp_path / "run"
    flags = (f"--config={file}", f"--workdir={workdir}", "--dry_run")
    assert door(train_door, *flags) == 0
    text = capsys.readouterr().out
    for words in ("8 x cpu (data 4, fsdp 2, tensor 1)", "trained weights", "all-reduce", "GFLOP"):
        assert words in text
    assert not workdir.exists()


def test_the_report_adds_up():
    facts = {
        "held_bytes": {"trained weights": 3_000_000, "optimizer": 6_000_000, "batch": 0},
        "sent_bytes": {"all-reduce": 5e6, "all-gather": 1e6},
        "expected_sent_bytes": {"fsdp": 0.0, "data": 5.5e6},
        "mesh": {"data": 8}, "devices": 8, "device_kind": "TPU v5e",
        "flops": 2e12, "compile_seconds": 61.4,
    }  # fmt: skip
    lines = [line.split() for line in report(facts).splitlines()]
    assert [line[-1] for line in lines if line[0] == "all"] == ["9.0", "6.0"]
    assert not any("batch" in line or "fsdp" in line for line in lines)
    assert ["over", "data", "5.5"] in lines
    assert module.report(facts).startswith("8 x TPU v5e (data 8)")
