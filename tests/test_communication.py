"""What compiled programs send: by hand, on programs whose collectives are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxpercept.training.communication import Collective, collectives, sent_by_kind

DEVICES, WIDTH = 8, 64


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def program(function, mesh, shapes, specs, out):
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    jitted = jax.jit(function, out_shardings=NamedSharding(mesh, out))
    return jitted.lower(*arrays).compile().as_text()


def test_a_gradient_is_summed_over_all_devices(mesh):
    text = program(
        lambda w, x: x.T @ (x @ w), mesh, [(WIDTH, WIDTH), (16, WIDTH)],
        [P(), P(("data", "fsdp"))], P(),
    )  # fmt: skip
    assert collectives(text, DEVICES) == [Collective("all-reduce", WIDTH**2 * 4, DEVICES)]
    assert sent_by_kind(text, DEVICES) == {"all-reduce": 2 * 7 / 8 * WIDTH**2 * 4}


def test_a_weight_is_gathered_within_its_group(mesh):
    text = program(
        lambda w, x: jnp.tanh(x @ w), mesh, [(WIDTH, WIDTH), (16, WIDTH)],
        [P("fsdp"), P(("data", "fsdp"))], P(("data", "fsdp")),
    )  # fmt: skip
    assert collectives(text, DEVICES) == [Collective("all-gather", WIDTH**2 * 4, 4)]
    assert sent_by_kind(text, DEVICES) == {"all-gather": 3 / 4 * WIDTH**2 * 4}


def test_what_a_loop_sends_counts_as_often_as_it_runs(mesh):
    def loop(w, xs):
        def body(total, x):
            return total + x.T @ jnp.tanh(x @ w), None

        # Each pass needs the sum of all devices.
        def passes(total, x):
            total, _ = body(total, x)
            return jnp.tanh(jax.lax.with_sharding_constraint(total, NamedSharding(mesh, P()))), None

        return jax.lax.scan(passes, jnp.zeros_like(w), xs)[0]

    text = program(
        loop, mesh, [(WIDTH, WIDTH), (5, 16, WIDTH)], [P(), P(None, ("data", "fsdp"))], P()
    )
    found = [c for c in collectives(text, DEVICES) if c.bytes == WIDTH**2 * 4]
    assert [(c.kind, c.times) for c in found] == [("all-reduce", 5)]


def test_one_device_sends_nothing():
    text = jax.jit(lambda x: x @ x.T).lower(jnp.zeros((4, 4))).compile().as_text()
    assert collectives(text, 1) == []
    assert sent_by_kind(text, 1) == {}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "  %ar = (f32[8,4]{1,0}, /*index=1*/bf16[16]{0}) all-reduce(%a, %b), "
            "replica_groups={{0,1},{2,3}}",
            Collective("all-reduce", 8 * 4 * 4 + 32, 2),
        ),
        (
            "  %g = (bf16[2,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%a), "
            "replica_groups=[2,4]<=[8]",
            Collective("all-gather", 64, 4),
        ),
        (
            "  ROOT %s = f32[2]{0} reduce-scatter(%a), replica_groups=[1,8]<=[8], to_apply=%add",
            Collective("reduce-scatter", 8, 8),
        ),
        (
            "  %p = pred[6]{0} collective-permute(%a), source_target_pairs={{0,1},{1,0}}",
            Collective("collective-permute", 6, 2),
        ),
        (
            "  %t = f32[4]{0} all-to-all(%a), channel_id=1, replica_groups=mesh['a'=4,'b'=6], "
            "device_ids=([24]) {'a','b':(1)2}, dimensions={0}",
            Collective("all-to-all", 16, 8),
        ),
        ("  %d = f32[8]{0} all-gather-done(%g)", None),
        ("  %m = f32[8]{0} multiply(%all-reduce.1, %b)", None),
    ],
)
def test_lines_of_other_machines(line, expected):
    found = collectives(f"ENTRY %main (a: f32[1]) -> f32[1] {{\n{line}\n}}", DEVICES)
    assert found == ([] if expected is None else [expected])


@pytest.mark.parametrize(
    ("kind", "sent"),
    [("all-reduce", 150), ("all-gather", 75), ("reduce-scatter", 300), ("all-to-all", 75),
     ("collective-permute", 100)],
)  # fmt: skip
def test_rings(kind, sent):
    assert Collective(kind, 100, 4).sent == sent
    assert Collective(kind, 100, 4, times=3).sent == 3 * sent
    assert Collective(kind, 100, 1).sent == 0
