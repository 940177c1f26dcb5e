"""Exports of this package that are broken or say what cannot be: one sentence."""

import json

import numpy as np
import pytest
import tiny_model
import torch_checkpoints
from hostile import (
    BILLION,
    OWN,
    UNET,
    Compiles,
    broken_checkpoints,  # noqa: F401
    change,
    nothing_compiles,
    refusal,
    refused_or_ready,
    store_files,
    through_convert,
    through_load,
    through_pipeline,
    whole_checkpoints,  # noqa: F401
    write,
)

from jaxpercept import PerceptionPipeline
from jaxpercept.checkpoints import orbax
from jaxpercept.checkpoints.load import load_model
from jaxpercept.inference.opening import assemble

# ---- jaxpercept.json -----------------------------------------------------------------------------

DELETED = object()


@pytest.mark.parametrize("enter", [through_pipeline, through_convert])
@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("format", 2, "format 2, this jaxpercept reads 1: update"),
        ("format", "1", "has format '1'"),
        ("format", DELETED, "has format None"),
        ("components", DELETED, "is incomplete ('components')"),
        ("scheduler", DELETED, "is incomplete ('scheduler')"),
        ("evil", 1, "the key 'evil', which this jaxpercept does not know"),
        ("recipe", {"family": "evil"}, "The family 'evil' is unknown"),
        ("recipe", {"family": ["genpercept"]}, "family=['genpercept']"),
        ("recipe", {"family": "genpercept", "evil": 1}, "the key 'evil'"),
        ("recipe", {"family": "genpercept", "num_steps": 10**12}, "num_steps=1000000000000"),
        ("recipe", {"family": "genpercept", "timesteps": [5000]}, "one below 1000"),
        ("recipe", {"family": "genpercept", "timesteps": [5, 4]}, "takes the timesteps 5, 4"),
        ("recipe", {"family": "genpercept", "head": "dpt"}, "lacks the DPT head"),
        ("recipe", {"head": "vae"}, "a recipe of no family"),
        ("recipe", {"family": "marigold"}, "it is of another family"),
        ("recipe", 5, "recipe=5"),
        ("task", "evil", "Unknown task 'evil'"),
        ("task", ["depth"], "task=['depth']"),
        ("task_options", {"scale_invariant": "no"}, "The option 'scale_invariant'"),
        ("task_options", [1], "task_options=[1]"),
        ("method", {"name": "evil"}, "no method that predicts"),
        ("method", {"name": ["one_step"]}, "name=['one_step']"),
        ("method", {"name": "one_step", "evil": 1}, "the key 'evil'"),
        ("method", {"name": "one_step", "inference_timestep": "5"}, "inference_timestep='5'"),
        (
            "method",
            {"name": "one_step", "timesteps": "fixed:" + "9" * 3000},
            "The timestep policy 'fixed:9999",
        ),
        ("method", {"name": "one_step", "timesteps": "file:/dev/zero"}, "that is in no file"),
        ("method", {"name": "denoising", "stratified": "no"}, "stratified='no'"),
        ("method", {"name": "denoising", "timestep_use": ["loss"]}, "timestep_use=['loss']"),
        (
            "method",
            {"name": "one_step", "pixel_weights": {"mse": "x"}},
            "pixel_weights={'mse': 'x'}",
        ),
        ("resolution", "x", "resolution='x'"),
        ("resolution", [32, 48, 64], "resolution=[32, 48, 64]"),
        ("resolution", [BILLION, BILLION], "resolution=[1000000000, 1000000000]"),
        ("resolution", [32.5, 48], "resolution=[32.5, 48]"),
        ("components", {}, "not expected (2): unet/, vae/"),
        ("components", {"evil": {}}, "component 'evil' is unknown"),
        ("components", {"a\nb" * 9999: {}}, "is unknown"),
        ("components", {"unet": 5, "vae": {}}, "components={'unet': 5"),
        ("scheduler", {"num_train_timesteps": 10**12}, "num_train_timesteps=1000000000000"),
        ("scheduler", {"_class_name": "Evil"}, "_class_name='Evil'"),
        ("model_index", {"_class_name": ["a", "B"]}, "no code of a checkpoint is run"),
        ("base_checkpoint", {"a": 1}, "base_checkpoint={'a': 1}"),
        ("config", 5, "config=5"),
    ],
)
def test_descriptions_of_wrong_values(broken, key, value, words, enter):
    folder = broken("export")
    content = json.loads((folder / OWN).read_text()) | {key: value}
    content = {key: value for key, value in content.items() if value is not DELETED}
    write(OWN, json.dumps(content))(folder)
    message = refusal(folder, enter)
    assert message.startswith(("WORK/source", "The weights in WORK/source"))
    assert words in message


@pytest.mark.parametrize(
    ("component", "key", "value", "words"),
    [
        ("unet", "block_out_channels", [16], "unet/conv_in.bias [8] instead of [16]"),
        ("unet", "layers_per_block", BILLION, "layers by its config"),
        (
            "unet",
            "cross_attention_dim",
            16,
            "prompt/embedding [1, 2, 8] instead of [1, tokens, 16]",
        ),
        ("unet", "norm_eps", float("nan"), "the number nan"),
        ("vae", "block_out_channels", [8, 8, 8], None),
        ("vae", "layers_per_block", 2, "missing ("),
        ("vae", "_class_name", "Evil", "describes a Evil"),
    ],
)
def test_descriptions_of_other_networks(broken, component, key, value, words):
    folder = broken("export")
    content = json.loads((folder / OWN).read_text())
    content["components"][component][key] = value
    write(OWN, json.dumps(content))(folder)
    message = refusal(folder)
    assert message.startswith(("WORK/source", "The weights in WORK/source", "The UNet2D"))
    assert words is None or words in message


def test_a_description_beside_other_networks(broken):
    """In a diffusers folder, which names its networks twice."""
    folder = broken("depth")
    checkpoint = assemble(str(folder), None)
    tiny_model.description(
        components=checkpoint.configs,
        scheduler=checkpoint.scheduler,
        method={},
        recipe={"family": "marigold", "num_steps": 4},
    ).save(folder)
    with pytest.raises(Compiles), nothing_compiles():
        PerceptionPipeline.from_pretrained(folder)
    change(UNET, attention_head_dim=4)(folder)
    assert f"WORK/source/{UNET} and WORK/source/{OWN} describe different" in refusal(folder)


# ---- Orbax ---------------------------------------------------------------------------------------


def test_damaged_orbax_exports(whole, broken, capfd, rng):
    """Whatever file it is; some say things twice, and then the weights must be the same."""
    folder, refused = broken("export"), 0
    expected = orbax.load_params(whole / "export" / orbax.WEIGHTS)
    for file in store_files(folder):
        raw = file.read_bytes()
        file.unlink()
        if damage := rng.integers(3):
            file.write_bytes(raw[: len(raw) // 2] if damage == 1 else b"")
        if message := refused_or_ready(folder, through_load):
            refused += 1
            assert f"{folder / orbax.WEIGHTS} holds no complete Orbax checkpoint" in message
        else:
            params = load_model(str(folder))[1]
            for component, weights in expected.items():
                torch_checkpoints.assert_bit_equal(params[component], weights)
        file.write_bytes(raw)
    assert refused >= 3  # the manifest, the arrays' table and their metadata in any case
    assert "Traceback" not in capfd.readouterr().err  # of the reads that were under way


@pytest.mark.parametrize("content", ["[]", "{}", "5", "[" * 10**5, b"\xff", '{"tree_metadata": 5}'])
def test_damaged_orbax_metadata(broken, content):
    folder = broken("export", write("weights/_METADATA", content))
    assert "holds no complete Orbax checkpoint" in refusal(folder)


def test_orbax_exports_of_other_weights(broken):
    folder = broken("export")
    description, params = load_model(str(folder))

    def saved(**changes) -> str:
        orbax.save_export(folder, description, {**params, **changes})
        return refusal(folder)

    unet = params["unet"]
    message = saved(
        unet={**unet, "conv_in.bias": unet["conv_in.bias"][1:], "extra": unet["conv_in.bias"]},
        vae={
            name: array for name, array in params["vae"].items() if name != "decoder.conv_in.bias"
        },
        evil={"x": unet["conv_in.bias"]},
    )
    for part in (
        "missing (1): vae/decoder.conv_in.bias",
        "not expected (2): evil/, unet/extra",
        "of another shape (1): unet/conv_in.bias [7] instead of [8]",
        "The weights in WORK/source/weights",
    ):
        assert part in message
    assert "no array of floating-point numbers" in saved(unet={"a": np.ones(2, np.int32)})
    assert "no array of floating-point numbers" in saved(unet={"a": {"b": np.ones(2, np.float32)}})
    assert "NaN or infinite values in unet/conv_in.bias" in saved(
        unet={**unet, "conv_in.bias": np.full(8, np.nan, np.float32)}
    )
