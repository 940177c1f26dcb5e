"""What the doctor says of what this package writes: workdirs, Orbax and StableHLO exports."""

import shutil

import grain
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import tiny_model
import tiny_run
import torch
import torch_checkpoints
from checkup import check, edit, refused_alike

from jaxpercept.checkpoints import diffusers, orbax
from jaxpercept.checkpoints.load import load_model
from jaxpercept.inference.stablehlo import save_stablehlo
from jaxpercept.training.checkpointing import Checkpoints


def test_an_orbax_export(tmp_path, rng):
    folder = tiny_model.save(tmp_path / "export", rng)
    report = check(folder)
    assert report["kind"] == "Orbax export"
    assert report["problems"] == report["unused_files"] == []
    description, params = load_model(str(folder))
    assert report["components"].keys() == params.keys() == {"unet", "vae", "prompt"}
    for name, weights in params.items():
        assert report["components"][name]["tensors"] == len(weights)
        assert report["components"][name]["bytes"] == sum(w.nbytes for w in weights.values())
    plan = report["pipeline"]
    assert plan["runs"]
    assert (plan["family"], plan["task"], plan["timesteps"]) == ("genpercept", "depth", [1])
    assert plan["processing_resolution"] == max(description.resolution)
    assert "leave --task out" in refused_alike(folder, task="normals")

    params["unet"]["conv_in.kernel"][0, 0] = np.nan
    params["prompt"]["embedding"][0, 0, :3] = np.inf
    del params["vae"]["quant_conv.bias"]
    params["vae"]["extra.bias"] = np.ones(2, np.float32)
    params["vae"]["encoder.conv_in.bias"] = np.ones(3, np.float32)
    orbax.save_params(folder / orbax.WEIGHTS, params)
    parts = check(folder)["components"]
    assert parts["unet"]["non_finite"] == {"conv_in.kernel": {"nan": 32, "infinite": 0}}
    assert parts["prompt"]["non_finite"] == {"embedding": {"nan": 0, "infinite": 3}}
    assert parts["vae"]["missing"] == ["quant_conv.bias"]
    assert parts["vae"]["unexpected"] == ["extra.bias"]
    assert parts["vae"]["misshaped"] == ["encoder.conv_in.bias [3] instead of [8]"]

    orbax.save_params(
        folder / orbax.WEIGHTS, {**params, "prompt": {"embedding": np.ones((1, 2, 5))}}
    )
    prompt = check(folder)["components"]["prompt"]
    assert prompt["misshaped"] == ["prompt/embedding [1, 2, 5] instead of [1, tokens, 8]"]

    orbax.save_params(folder / orbax.WEIGHTS, {k: v for k, v in params.items() if k != "prompt"})
    assert "lacks prompt" in check(folder)["pipeline"]["reason"]
    for content in ("[1]", '{"format": 99}'):
        (folder / "jaxpercept.json").write_text(content)
        assert "jaxpercept.json" in check(folder)["problems"][0]
    (folder / "jaxpercept.json").unlink()
    report = check(folder)
    assert "which says what the model is" in "".join(report["problems"])
    assert report["components"]["unet"]["tensors"] == len(params["unet"])


def test_arrays_that_cannot_be_read_are_named(tmp_path, rng):
    folder = tiny_model.save(tmp_path / "export", rng)
    files = [path for path in (folder / orbax.WEIGHTS).rglob("d/*") if path.is_file()]
    max(files, key=lambda path: path.stat().st_size).unlink()
    report = check(folder)
    parts = report["components"].values()
    lost = [problem for part in parts for problem in part["problems"]]
    assert lost
    assert all("cannot be read" in problem for problem in lost)
    assert sum(part["tensors"] for part in parts) + len(lost) == 289
    assert report["problems"] == [
        f"{name}: {problem}"
        for name, part in report["components"].items()
        for problem in part["problems"]
    ]
    assert not report["pipeline"]["runs"]


def test_a_damaged_index_of_arrays_is_one_sentence(tmp_path, rng, capfd):
    folder = tiny_model.save(tmp_path / "export", rng)
    for file in (folder / orbax.WEIGHTS / "d").iterdir():
        file.unlink()
    report = check(folder)
    assert len(report["problems"]) == 1
    assert "holds no complete Orbax checkpoint" in report["problems"][0]
    assert "Traceback" not in capfd.readouterr().err


def test_a_training_workdir(tmp_path, rng):
    base, workdir = tiny_run.base(tmp_path / "base"), tmp_path / "run"
    description, params = load_model(str(base))
    checkpoints = Checkpoints(workdir, keep=3)
    description.save(workdir)
    # A run that trains a part of the UNet.
    trained = {"unet": {k: v for k, v in params["unet"].items() if "up_blocks" in k}}
    total = len(params["unet"])
    params["unet"] = {k: v for k, v in params["unet"].items() if "up_blocks" not in k}
    orbax.save_params(workdir / "frozen", params)

    class Position(grain.DatasetIterator):
        def __next__(self):
            raise StopIteration

        def get_state(self):
            return {"next_example": 0}

        def set_state(self, state):
            pass

    for step in (3, 12):
        state = {"params": jax.tree.map(jnp.asarray, trained), "step": jnp.int32(step)}
        checkpoints.save(step, state, Position())
    checkpoints.close()
    (workdir / "metrics.jsonl").touch()
    (workdir / "checkpoints/20.orbax-checkpoint-tmp").mkdir()
    (workdir / "checkpoints/13").mkdir()
    report = check(workdir)
    assert report["kind"] == "training workdir"
    assert (report["newest_step"], report["steps"]) == (12, [3, 12])
    assert report["problems"] == report["unused_files"] == []
    assert "checkpoints/13 is a save that was not finished" in report["warnings"][0]
    assert "20.orbax-checkpoint-tmp" in report["warnings"][1]
    assert report["pipeline"]["runs"]
    assert report["components"].keys() == {"unet", "vae", "prompt"}
    assert report["components"]["unet"]["files"] == ["frozen", "checkpoints/12/params"]
    assert report["components"]["unet"]["tensors"] == total
    assert report["components"]["vae"]["files"] == ["frozen"]

    (workdir / "checkpoints/12/params/_METADATA").unlink()
    report = check(workdir)
    assert "remove it where a run has an earlier one" in report["problems"][0]
    assert report["components"]["vae"]["problems"] == []
    shutil.rmtree(workdir / "checkpoints")
    assert "holds no finished checkpoint yet" in check(workdir)["problems"][0]


def test_a_stablehlo_export(tmp_path, rng, monkeypatch):
    # jax writes programs with the package flatbuffers, which is not everywhere.
    kept = {}

    def serialize(self):
        kept[b"program"] = self
        return b"program"

    monkeypatch.setattr(jax.export.Exported, "serialize", serialize)
    monkeypatch.setattr(jax.export, "deserialize", lambda content: kept[bytes(content)])
    folder = tmp_path / "program"
    description = tiny_model.description()
    save_stablehlo(folder, description, tiny_model.params(rng), size=(32, 48))
    description.save(folder)
    report = check(folder)
    assert report["kind"] == "StableHLO export"
    assert report["problems"] == report["unused_files"] == []
    assert report["pipeline"]["role"] == "program"
    assert report["components"].keys() == {"unet", "vae", "prompt"}

    def change(tensors):
        tensors["vae/quant_conv.bias"][1] = np.nan
        tensors["unet/conv_in.bias"] = torch.ones(3)

    edit(folder / "weights.safetensors", change)
    parts = check(folder)["components"]
    assert parts["vae"]["non_finite"] == {"quant_conv.bias": {"nan": 1, "infinite": 0}}
    assert parts["unet"]["misshaped"] == ["conv_in.bias [3] instead of [8]"]
    (folder / "model.stablehlo").write_bytes(b"progr")
    assert "model.stablehlo cannot be read" in check(folder)["problems"][0]

    def deserialize(content):
        raise ImportError("Please install 'flatbuffers'")

    monkeypatch.setattr(jax.export, "deserialize", deserialize)
    report = check(folder)
    assert "'flatbuffers'" in report["warnings"][0]
    assert [problem.partition(":")[0] for problem in report["problems"]] == ["vae"]


def test_a_diffusers_folder_with_a_description(tmp_path):
    """As convert writes it of a one-step model: the description says what it predicts."""
    torch_checkpoints.write_checkpoint(tmp_path)
    components = diffusers.read_configs(tmp_path).configs
    tiny_model.description(components=components).save(tmp_path)
    report = check(tmp_path)
    assert report["kind"] == "diffusers folder"
    assert report["pipeline"]["runs"]
    assert report["pipeline"]["family"] == "genpercept"
    assert report["problems"] == report["unused_files"] == []
