"""Whole runs of the loop in this process: what they give, write, and refuse."""

import gc
import json
import logging
import os
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from tiny_run import base_of_module, data_of_module  # noqa: F401

from jaxpercept.checkpoints.description import Description
from jaxpercept.checkpoints.load import latest_step, load_model, merge_params
from jaxpercept.errors import UserError
from jaxpercept.inference.pipeline import PerceptionPipeline
from jaxpercept.training import loop, sharding
from jaxpercept.training.checkpointing import Checkpoints
from jaxpercept.training.loop import Interrupted, train
from jaxpercept.training.metric_writer import MetricWriter

STEPS = 20


@pytest.fixture(scope="module")
def config(base, data):
    return tiny_run.config(
        base,
        steps=STEPS,
        accumulate=2,
        save_every=8,
        ema_decay=0.9,
        eval_every=15,
        data__augment={"flip": 0.5, "brightness": 0.2},
        method={"name": "one_step", "latent_weight": 1.0},
        **tiny_run.on_folder(data),
    )


class Run:
    """A finished run on some devices, observed by something that counts."""

    def __init__(self, config, workdir, devices, **mesh):
        self.config, self.workdir, self.seen = config, workdir, []
        self.mesh = sharding.make_mesh(devices=jax.devices()[:devices], **mesh)
        self.state = train(config, workdir, mesh=self.mesh, observer=self.observer)

    def observer(self, setup, mesh):
        def observe(step, weights, writer):
            self.seen.append((step, jax.tree.map(np.asarray, weights)))
            return {"scenes/abs_rel": float(step)}

        return observe


@pytest.fixture(scope="module")
def one(config, tmp_path_factory):
    return Run(config, tmp_path_factory.mktemp("one") / "run", 1)


@pytest.fixture(scope="module")
def eight(config, tmp_path_factory):
    before, sharding._MIN_FSDP_SIZE = sharding._MIN_FSDP_SIZE, 64
    yield Run(config, tmp_path_factory.mktemp("eight") / "run", 8, fsdp=2, tensor=2)
    sharding._MIN_FSDP_SIZE = before


# ---- real runs -----------------------------------------------------------------------------------


def test_eight_devices_train_like_one(one, eight):
    expected = tiny_run.curve(one.workdir)
    assert len(expected) == STEPS
    np.testing.assert_allclose(tiny_run.curve(eight.workdir), expected, rtol=1e-4)
    assert expected[-1] < 0.9 * expected[0]


def test_only_what_is_to_be_trained_changes(one, base):
    _, before = load_model(str(base))
    _, after = load_model(str(one.workdir))
    assert after.keys() == before.keys()
    for part in ("vae", "prompt"):
        tiny_run.assert_bit_equal(after[part], before[part])
    changed = [not np.array_equal(before["unet"][k], after["unet"][k]) for k in before["unet"]]
    assert np.mean(changed) > 0.9


def test_a_workdir_opens_as_numpy_arrays(eight):
    description, params = load_model(str(eight.workdir))
    assert latest_step(eight.workdir) == STEPS
    assert description.task == "depth"
    assert description.method["name"] == "one_step"
    assert description.resolution == tiny_run.SIZE
    assert all(type(x) is np.ndarray for x in jax.tree.leaves(params))
    # The averaged weights are the ones to predict with.
    tiny_run.assert_bit_equal(params["unet"], eight.state["ema"]["unet"])
    assert not np.array_equal(
        params["unet"]["conv_in.kernel"], eight.state["params"]["unet"]["conv_in.kernel"]
    )


def test_reading_a_workdir_logs_nothing(one, caplog):
    with caplog.at_level(logging.WARNING, logger="absl"):
        load_model(str(one.workdir))
    assert caplog.messages == []


def test_a_workdir_predicts(one, rng):
    pipe = PerceptionPipeline.from_pretrained(one.workdir)
    image = rng.integers(0, 256, (*tiny_run.SIZE, 3)).astype(np.uint8)
    out = pipe(image, batch_size=8)
    assert out.prediction.shape == (1, *tiny_run.SIZE, 1)
    assert out.step == STEPS
    assert np.isfinite(out.prediction).all()


@pytest.mark.parametrize("devices", [1, 2])
def test_what_eight_devices_saved_is_restored_on_fewer(eight, devices):
    mesh = sharding.make_mesh(devices=jax.devices()[:devices], fsdp=devices)
    shardings = sharding.tree_shardings(eight.state, mesh)
    abstract = jax.eval_shape(lambda: eight.state)
    iterator = iter(loop.open_data(eight.config, loop.set_up(eight.config)))
    checkpoints = Checkpoints(eight.workdir, keep=2)
    restored = checkpoints.restore(STEPS, abstract, shardings, iterator)
    checkpoints.close()
    tiny_run.assert_bit_equal(restored, eight.state)
    for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding == wanted
    if devices == 2:
        kernel = restored["params"]["unet"]["conv_in.kernel"]
        assert kernel.size == 2 * kernel.addressable_shards[0].data.size
    assert iterator.get_state() == {"next_example": STEPS * 8}


def test_evaluations_come_when_asked_and_see_all_averaged_weights(one):
    assert [step for step, _ in one.seen] == [15, STEPS]
    _, params = load_model(str(one.workdir))
    tiny_run.assert_bit_equal(one.seen[-1][1], params)
    scored = {line["step"]: line for line in tiny_run.metrics(one.workdir)}
    assert {step for step, line in scored.items() if "scenes/abs_rel" in line} == {15, STEPS}
    assert scored[STEPS]["scenes/abs_rel"] == STEPS


def test_what_a_run_writes(eight):
    names = {path.name for path in eight.workdir.iterdir()}
    assert names >= {"jaxpercept.json", "checkpoints", "frozen", "metrics.jsonl", "run.json"}
    # Saves are due after 8, 16 and 20 steps; two are kept.
    assert {path.name for path in (eight.workdir / "checkpoints").iterdir()} == {"16", "20"}
    facts = tiny_run.facts(eight.workdir)
    assert facts["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
    assert facts["compile_seconds"] > 0
    assert facts["flops"] > 1e6
    assert facts["temporary_bytes"] > 0
    # Gradients are summed over the two copies of the batch's halves, whatever else is sent.
    assert facts["sent_bytes"]["all-reduce"] > 0
    size = sum(x.size for x in jax.tree.leaves(eight.state["params"]))
    assert facts["trained_weights"] == size
    for line in tiny_run.metrics(eight.workdir):
        assert line.keys() >= {"step", "loss", "latent_mse", "grad_norm", "learning_rate"}
        assert line.keys() >= {"step_seconds", "images_per_second"}
        assert 0 <= line["input_wait"] <= 1
    rates = tiny_run.curve(eight.workdir, "learning_rate")
    np.testing.assert_allclose(rates[:3], [0, 5e-4, 1e-3], rtol=1e-6)


def test_data_that_do_not_keep_up_are_told_of_once(base, tmp_path, caplog, monkeypatch):
    take = loop.TrainIterator.__next__
    monkeypatch.setattr(loop.TrainIterator, "__next__", lambda self: time.sleep(0.3) or take(self))
    monkeypatch.setattr(loop, "_WARM", 1)
    with caplog.at_level(logging.WARNING):
        train(tiny_run.config(base, steps=4), tmp_path)
    (message,) = [r.getMessage() for r in caplog.records if "keep up" in r.getMessage()]
    assert "num_workers" in message
    lines = tiny_run.metrics(tmp_path)
    # A step is reported when the batch after the next is there; after the last none is waited for.
    waited = [line["input_wait"] * line["step_seconds"] for line in lines]
    assert min(waited[:2]) > 0.29
    assert max(waited[2:]) < 0.29


def test_flops_count_every_micro_batch(one, eight):
    """Per device: an eighth of what one device does."""
    per_step = [tiny_run.facts(run.workdir)["flops"] for run in (one, eight)]
    assert per_step[1] == pytest.approx(per_step[0] / 8)


# ---- continuing ----------------------------------------------------------------------------------


def test_a_finished_run_is_only_evaluated_again(one, monkeypatch):
    monkeypatch.setattr(loop, "compile_step", None)
    lines = tiny_run.metrics(one.workdir)
    again = Run(one.config, one.workdir, 1)
    tiny_run.assert_bit_equal(again.state, one.state)
    assert [step for step, _ in again.seen] == [STEPS]
    assert tiny_run.metrics(one.workdir)[:-1] == lines


def test_another_run_is_refused_by_dotted_keys_and_nothing_is_touched(one, monkeypatch):
    files = {p: p.stat().st_mtime_ns for p in one.workdir.rglob("*") if p.is_file()}
    other = one.config.copy_and_resolve_references()
    other.optimizer.learning_rate = 0.5
    other.data.augment.flip = 0.0
    other.method.latent_weight = 2.0
    with pytest.raises(UserError) as caught:
        train(other, one.workdir, mesh=one.mesh)
    message = str(caught.value)
    assert "data.augment.flip (0.5, now 0.0)" in message
    assert "method.latent_weight (1.0, now 2.0)" in message
    assert "optimizer.learning_rate (0.001, now 0.5)" in message
    assert "another --workdir" in message
    assert message.count("now") == 3
    assert {p: p.stat().st_mtime_ns for p in one.workdir.rglob("*") if p.is_file()} == files


def test_another_architecture_is_refused(one, tmp_path):
    description = Description.load(one.workdir)
    unet = type(description.components["unet"]).from_dict(
        {**description.components["unet"].to_dict(), "layers_per_block": 2}
    )
    other = Description(
        **{**vars(description), "components": {**description.components, "unet": unet}}
    )
    with pytest.raises(UserError, match=r"unet.layers_per_block \(1, now 2\)"):
        loop.refuse_other_run(one.workdir, other)


def test_a_run_may_be_made_longer_and_moved(one, caplog):
    def continued(**changes):
        config = {**json.loads(one.config.to_json()), "steps": 27, **changes}
        kept = {**vars(Description.load(one.workdir)), "config": config}
        loop.refuse_other_run(one.workdir, Description(**kept))

    optimizer, data = (json.loads(one.config[key].to_json()) for key in ("optimizer", "data"))
    # The decay ended with the run, and still does.
    data["num_workers"] = 3
    data["options"]["folder"]["data_dir"] = "/elsewhere"
    with caplog.at_level(logging.INFO, logger="absl"):
        continued(optimizer={**optimizer, "decay_steps": 27}, data=data, eval_every=0)
    assert "steps was 20, now 27" in caplog.messages
    assert "optimizer.decay_steps was 20, now 27" in caplog.messages
    assert "data.options.folder.data_dir" in caplog.text
    with pytest.raises(UserError, match=r"optimizer.decay_steps \(20, now 25\)"):
        continued(optimizer={**optimizer, "decay_steps": 25})
    with pytest.raises(UserError, match=r"data.mixture.scenes \(None, now 1.0\)"):
        continued(data={**data, "mixture": {"folder": 1.0, "scenes": 1.0}})


def test_an_unfinished_save_is_never_seen(one, base, tmp_path):
    """What a kill in the middle of a save leaves behind is passed over, by all that read."""
    workdir = tmp_path / "run"
    shutil.copytree(one.workdir, workdir)
    steps = workdir / "checkpoints"
    shutil.move(steps / "20", steps / "20.orbax-checkpoint-tmp")
    shutil.rmtree(steps / "20.orbax-checkpoint-tmp" / "state")
    assert latest_step(workdir) == 16
    checkpoints = Checkpoints(workdir, keep=2)
    assert checkpoints.latest_step() == 16
    checkpoints.close()
    shutil.rmtree(steps / "16")
    assert latest_step(workdir) is None
    with pytest.raises(UserError, match="holds no finished checkpoint yet"):
        load_model(str(workdir))


# Reads that were under way when the first one failed end after Orbax has closed its event loop,
# and say so from their threads, whenever they end.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_is_named(one, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(one.workdir, workdir)
    for path in (workdir / "checkpoints" / "20" / "params").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[:10])
    for read in (
        lambda: load_model(str(workdir)),
        lambda: train(one.config, workdir, mesh=one.mesh),
    ):
        with pytest.raises(UserError, match=r"20/params holds no complete Orbax .* earlier one"):
            read()
    time.sleep(1)
    gc.collect()


def test_metrics_of_steps_to_be_repeated_are_removed(tmp_path):
    writer = MetricWriter(tmp_path)
    for step in range(1, 6):
        writer.scalars(step, {"loss": float(step), "score": float("nan")})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    MetricWriter(tmp_path, start=3).close()
    lines = tiny_run.metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0] == {"step": 1, "loss": 1.0, "score": None}


# ---- the loop itself, with a step that only counts -----------------------------------------------


class FakeStep:
    """Takes the place of the compiled step; `at` maps a step to what happens in it."""

    def __init__(self, monkeypatch, at=None):
        self.at, self.taken, self.events = at or {}, 0, []
        facts = {"flops": 0.0}
        monkeypatch.setattr(loop, "compile_step", lambda *_: (self, facts))
        scalars = MetricWriter.scalars

        def log(writer, step, values):
            self.events.append(("log", step))
            scalars(writer, step, values)

        monkeypatch.setattr(MetricWriter, "scalars", log)

    def __call__(self, state, frozen, batch):
        self.taken += 1
        self.events.append(("step", self.taken))
        happening = self.at.get(self.taken, lambda: 0.5)()
        loss = jax.device_put(np.float32(0.5 if happening is None else happening))
        return state, {"loss": loss, "grad_norm": loss, "learning_rate": loss}


@pytest.fixture
def quick(base, data):
    return tiny_run.config(base, steps=6, save_every=2, **tiny_run.on_folder(data))


def on_one_device(config, workdir):
    return train(config, workdir, mesh=sharding.make_mesh(devices=jax.devices()[:1]))


def test_metrics_are_read_one_step_late(quick, tmp_path, monkeypatch):
    step = FakeStep(monkeypatch)
    on_one_device(quick, tmp_path)
    expected = [("step", 1)]
    for n in range(2, 7):
        expected += [("step", n), ("log", n - 1)]
    assert step.events == [*expected, ("log", 6)]


def test_the_loop_moves_nothing_between_host_and_device_unasked(quick, tmp_path, monkeypatch):
    guards = []
    step = FakeStep(monkeypatch, {3: lambda: guards.append(jax.config.jax_transfer_guard)})
    monkeypatch.setattr(loop, "not_finite", lambda *_: guards.append(jax.config.jax_transfer_guard))
    on_one_device(quick, tmp_path)
    assert step.taken == 6
    assert set(guards) == {"disallow"}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_stays_infinite_stops_the_run_before_it_is_saved(
    quick, tmp_path, monkeypatch, value
):
    quick.recover = {"skips": 0, "rollbacks": 0}
    FakeStep(monkeypatch, {4: lambda: value})
    with pytest.raises(UserError, match=r"loss is not finite at step 4: .*learning_rate"):
        on_one_device(quick, tmp_path)
    assert latest_step(tmp_path) == 2
    assert [line["step"] for line in tiny_run.metrics(tmp_path)] == [1, 2, 3]


def test_some_steps_that_are_not_finite_are_left_out(quick, tmp_path, monkeypatch, caplog):
    nan = dict.fromkeys((2, 3, 5, 6), lambda: np.nan)
    step = FakeStep(monkeypatch, nan)
    quick.recover = {"skips": 2, "rollbacks": 0}
    with caplog.at_level(logging.WARNING):
        on_one_device(quick, tmp_path)
    assert step.taken == 6
    assert latest_step(tmp_path) == 6
    told = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert [message.split(":")[0][-1] for message in told] == ["2", "3", "5", "6"]
    assert told[0].endswith("Examples: 8, 9, 10, 11, 12, 13, 14, 15")
    lines = tiny_run.metrics(tmp_path)
    assert [line.get("skipped_steps") for line in lines] == [None, 1, 2, 2, 3, 4]
    assert [line["loss"] for line in lines] == [0.5, None, None, 0.5, None, None]
    # A step that was left out is not saved, unless it is the last.
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"4", "6"}


def test_after_too_many_it_goes_back_and_on_with_other_data(quick, tmp_path, monkeypatch, caplog):
    step = FakeStep(monkeypatch, dict.fromkeys((4, 5, 6), lambda: np.inf))
    quick.recover = {"skips": 1, "rollbacks": 1}
    with caplog.at_level(logging.WARNING):
        on_one_device(quick, tmp_path)
    # Steps 1 to 5, the next one in flight, back to step 2, then 3 (infinite as well) to 6.
    assert "back to step 2" in caplog.text
    lines = tiny_run.metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert step.taken == 10
    assert latest_step(tmp_path) == 6
    told = [r.getMessage() for r in caplog.records if "Examples" in r.getMessage()]
    # No example is seen twice: the seventh batch is what step 3 gets the second time.
    assert told[0].endswith(", ".join(map(str, range(24, 32))))


def test_it_goes_back_once_and_never_before_the_first_checkpoint(quick, tmp_path, monkeypatch):
    FakeStep(monkeypatch, dict.fromkeys(range(4, 30), lambda: np.nan))
    quick.recover = {"skips": 1, "rollbacks": 1}
    with pytest.raises(UserError, match="loss is not finite at step 4: start anew"):
        on_one_device(quick, tmp_path / "a")
    assert latest_step(tmp_path / "a") == 2
    FakeStep(monkeypatch, dict.fromkeys(range(1, 30), lambda: np.nan))
    with pytest.raises(UserError, match="at step 2, before the first checkpoint: start anew"):
        on_one_device(quick, tmp_path / "b")
    assert latest_step(tmp_path / "b") is None


def test_sigterm_saves_and_stops(quick, tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGTERM)
    FakeStep(monkeypatch, {3: lambda: os.kill(os.getpid(), signal.SIGTERM)})
    with pytest.raises(Interrupted, match="after step 3; the state is saved"):
        on_one_device(quick, tmp_path)
    assert latest_step(tmp_path) == 3
    assert signal.getsignal(signal.SIGTERM) is handler
    rest = FakeStep(monkeypatch)
    on_one_device(quick, tmp_path)
    assert rest.taken == 3
    assert [line["step"] for line in tiny_run.metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_an_unreadable_image_is_named_once_and_counted(quick, data, tmp_path, monkeypatch, caplog):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "rgb" / "05.png").write_bytes(b"not an image")
    quick.data.options.folder.data_dir = str(tmp_path / "data")
    FakeStep(monkeypatch)
    with caplog.at_level(logging.WARNING, logger="absl"):
        on_one_device(quick, tmp_path / "run")
    assert len([m for m in caplog.messages if "05" in m]) == 1
    # 6 steps of 8 draw each of 12 images 4 times.
    assert tiny_run.metrics(tmp_path / "run")[-1]["skipped_examples"] == 4


def test_the_first_batch_is_described(quick, tmp_path, monkeypatch, caplog):
    FakeStep(monkeypatch)
    with caplog.at_level(logging.INFO, logger="absl"):
        on_one_device(quick, tmp_path)
    line = next(m for m in caplog.messages if m.startswith("first batch"))
    assert "% of the pixels valid, depth 0.5" in line


def test_frozen_weights_of_a_continued_run_come_from_its_workdir(
    quick, base, tmp_path, monkeypatch
):
    """The checkpoint it started from may have changed since."""
    moving = tmp_path / "moving"
    shutil.copytree(base, moving)
    quick.checkpoint = str(moving)
    FakeStep(monkeypatch)
    on_one_device(quick, tmp_path / "run")
    _, before = load_model(str(tmp_path / "run"))
    shutil.rmtree(moving)
    tiny_run.base(moving)
    quick.steps = 8
    frozen = []

    class Watch(FakeStep):
        def __call__(self, state, weights, batch):
            frozen.append(weights)
            return super().__call__(state, weights, batch)

    Watch(monkeypatch)
    state = on_one_device(quick, tmp_path / "run")
    tiny_run.assert_bit_equal(merge_params(frozen[0], state["params"]), before)


def test_random_weights_differ_between_components_and_seeds(tmp_path):
    def weights(seed):
        c = tiny_run.autoencoder_config(seed=seed)
        return loop.initial_weights(c, loop.set_up(c))[0]["vae"]

    first, second = weights(1), weights(2)
    tiny_run.assert_bit_equal(first, weights(1))
    assert not np.array_equal(first["encoder.conv_in.kernel"], second["encoder.conv_in.kernel"])


def test_weights_are_kept_in_the_dtypes_of_the_config(base):
    c = tiny_run.config(base, frozen_dtype="bfloat16")
    trained, frozen = loop.initial_weights(c, loop.set_up(c))
    assert {x.dtype for x in jax.tree.leaves(trained)} == {np.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(frozen)} == {jnp.dtype("bfloat16")}
