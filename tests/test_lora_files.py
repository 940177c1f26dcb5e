"""LoRA files that diffusers and peft write are read here, and the other way round."""

import copy
import json
import struct

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import torch_checkpoints
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from lora_torch import (
    TARGETS,
    add_adapter,
    config_of,
    factors,
    only_lora,
    params_of,
    ported,
    torch_unet,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch_parity import max_abs, normal, quick_jit, to_torch

from jaxpercept.checkpoints import diffusers, lora, merging, rules
from jaxpercept.errors import UserError
from jaxpercept.models.functional import functional
from jaxpercept.models.lora import LoraConfig

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
LORA = LoraConfig(4, 10)
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def save_adapter(unet, folder):
    """diffusers: the network's own method, with settings and no prefix."""
    unet.save_lora_adapter(folder)


def save_pipeline(unet, folder):
    """diffusers: a pipeline's method, with settings and the prefix."""
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers=factors(unet),
        unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
    )


def save_script(unet, folder):
    """diffusers' training scripts: today's layers under yesterday's names, without settings."""
    layers = convert_state_dict_to_diffusers(factors(unet))
    assert f"{LAYER}.lora.down.weight" in layers
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)


def save_processors(unet, folder):
    """diffusers before 0.21: the layers belong to attention processors."""
    renamed = {}
    for key, tensor in factors(unet).items():
        attention, _, rest = key.rpartition(".to_")
        projection, factor = rest.replace("out.0", "out").split(".lora_")
        direction = {"A.weight": "down", "B.weight": "up"}[factor]
        renamed[f"unet.{attention}.processor.to_{projection}_lora.{direction}.weight"] = tensor
    folder.mkdir()
    save_file(renamed, folder / DIFFUSERS_FILE)


def save_peft(unet, folder):
    """peft: the keys and settings of a model that it wraps."""
    base = copy.deepcopy(unet)
    base.unload_lora()
    model = peft.get_peft_model(base, unet.peft_config["default"])
    tensors = {f"base_model.model.{key}": value for key, value in factors(unet).items()}
    result = peft.set_peft_model_state_dict(model, tensors)
    assert not result.unexpected_keys
    model.save_pretrained(folder)
    assert (folder / PEFT_FILE).is_file()


WITH_SETTINGS = (save_adapter, save_pipeline, save_peft)
WITHOUT = (save_script, save_processors)


def assert_same_factors(params, unet):
    network = functional(config_of(unet), lora=LORA)
    want = only_lora(params_of(unet, network))
    assert params.keys() == want.keys()
    for path, value in want.items():
        np.testing.assert_array_equal(params[path], value)
        assert params[path].dtype == np.float32


@pytest.mark.parametrize("write", [*WITH_SETTINGS, *WITHOUT])
def test_reads_what_the_libraries_write(rng, tmp_path, write):
    base = torch_unet(rng)
    unet = add_adapter(copy.deepcopy(base), LORA, rng)
    write(unet, tmp_path / "out")
    got, params = lora.load(tmp_path / "out", config_of(unet))
    assert got == (LORA if write in WITH_SETTINGS else LoraConfig(4, 4))
    assert_same_factors(params, unet)

    # What diffusers makes of the same file. (It has a reader for peft's folders in no other form.)
    file = next((tmp_path / "out").glob("*.safetensors"))
    assert lora.load(file, config_of(unet))[0] == got
    if write is save_peft:
        base = peft.PeftModel.from_pretrained(base, tmp_path / "out").merge_and_unload()
    else:
        prefix = "unet" if any(key.startswith("unet.") for key in load_file(file)) else None
        base.load_lora_adapter(file, prefix=prefix, use_safetensors=True)
        base.fuse_lora()
        base.unload_lora()
    network = functional(config_of(base))
    plain = params_of_plain(unet, network)
    merged = merging.merge({"unet": {**plain, **params}}, got)["unet"]
    for path, value in params_of_plain(base, network).items():
        assert max_abs(merged[path], value) <= 1e-6, path
    assert max_abs(merged[f"{LAYER}.kernel"], plain[f"{LAYER}.kernel"]) > 0.1


def params_of_plain(unet, network):
    state = {k: v for k, v in unet.state_dict().items() if ".lora_" not in k}
    state = {k.replace(".base_layer.", "."): v.numpy() for k, v in state.items()}
    return rules.to_jax(network.shapes, state)


@pytest.mark.parametrize("layout", ["diffusers", "peft"])
def test_the_libraries_read_what_is_written_here(rng, tmp_path, layout):
    base = torch_unet(rng)
    unet = add_adapter(copy.deepcopy(base), LORA, rng)
    network, params = ported(unet, LORA)
    file = lora.save(tmp_path / "out", LORA, params, layout=layout)
    assert file == tmp_path / "out" / (DIFFUSERS_FILE if layout == "diffusers" else PEFT_FILE)
    again, read = lora.load(tmp_path / "out", network.config)
    assert again == LORA
    assert_same_factors(read, unet)

    if layout == "diffusers":
        base.load_lora_adapter(tmp_path / "out", prefix="unet", use_safetensors=True)
        (settings,) = base.peft_config.values()
    else:
        base = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
        settings = base.peft_config["default"]
    assert (settings.r, settings.lora_alpha) == (4, 10)
    assert settings.target_modules == set(TARGETS)
    args = normal(rng, 1, 6, 8, 4), np.int32([17]), normal(rng, 1, 5, 12)
    got = quick_jit(lambda p, *args: network.bind(p)(*args))(params, *args)
    with torch.no_grad():
        want = base(to_torch(args[0]), torch.tensor([17]), torch.from_numpy(args[2])).sample
    assert max_abs(got, want) <= 1e-5


def test_a_pipeline_reads_it_without_a_word(rng, tmp_path, capfd):
    """The whole way: a base checkpoint, an adapter made here, diffusers' pipeline with both."""
    torch_checkpoints.write_checkpoint(tmp_path / "base", "sd1", seed=int(rng.integers(2**31)))
    checkpoint = diffusers.load(tmp_path / "base", components=("unet",))
    config = checkpoint.configs["unet"]
    network = functional(config, lora=LORA)
    params = {p: normal(rng, *s.shape) / 4 for p, s in only_lora(network.shapes).items()}
    lora.save(tmp_path / "adapter", LORA, params)

    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "base", safety_checker=None)
    capfd.readouterr()
    pipeline.load_lora_weights(tmp_path / "adapter")
    assert "key" not in capfd.readouterr().err.lower()
    args = normal(rng, 1, 6, 8, 4), np.int32([17]), normal(rng, 1, 5, 32)
    apply = quick_jit(lambda p, *args: network.bind(p)(*args))
    got = apply(checkpoint.params["unet"] | params, *args)
    with torch.no_grad():
        want = pipeline.unet(
            to_torch(args[0]), torch.tensor([17]), torch.from_numpy(args[2])
        ).sample
    assert max_abs(got, want) <= 1e-4 * max(1, want.abs().max())
    assert list(pipeline.unet.peft_config) == ["default_0"]


def test_rank_stabilised_scale(rng, tmp_path):
    unet = add_adapter(torch_unet(rng), LORA, rng, use_rslora=True)
    unet.save_lora_adapter(tmp_path)
    got, _ = lora.load(tmp_path, config_of(unet))
    assert got.scale == pytest.approx(10 / 2)
    layer = unet.get_submodule(LAYER)
    assert got.scale == pytest.approx(layer.scaling["default"])


@pytest.mark.parametrize(
    "targets",
    [
        ("attn1.to_q",),
        ("attn1.to_q", "attn1.to_out.0", "proj_in", "ff.net.2", "conv1"),
        ("mid_block.attentions.0.proj_in", "conv_shortcut"),
    ],
)
def test_targets_are_found_again(rng, tmp_path, targets):
    want = LoraConfig(2, 2, targets)
    unet = add_adapter(torch_unet(rng), want, rng)
    unet.save_lora_adapter(tmp_path)
    got, params = lora.load(tmp_path, config_of(unet))
    network = functional(config_of(unet), lora=got)
    assert only_lora(network.shapes) == only_lora(functional(config_of(unet), lora=want).shapes)
    tensors = {k: v.numpy() for k, v in factors(unet).items()}
    torch_checkpoints.assert_bit_equal(rules.to_torch(params), tensors)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files(rng, tmp_path, dtype):
    unet = add_adapter(torch_unet(rng), LORA, rng)
    network, params = ported(unet, LORA)
    file = lora.save(tmp_path, LORA, params, dtype=dtype)
    for key, tensor in load_file(file).items():
        assert tensor.dtype == getattr(torch, dtype)
        own = factors(unet)[key.removeprefix("unet.")]
        assert torch.equal(tensor, own.to(tensor.dtype))
    _, read = lora.load(file, network.config)
    for path, value in read.items():
        np.testing.assert_array_equal(value, params[path].astype(jnp.dtype(dtype)))


def test_saving_refuses_what_cannot_be_read_again(rng, tmp_path):
    _, params = ported(add_adapter(torch_unet(rng), LORA, rng), LORA)
    path = f"{LAYER}.lora_A.kernel"
    with pytest.raises(UserError, match=rf"unet\.{LAYER}\.lora_A\.weight .* float16"):
        lora.save(tmp_path / "a", LORA, {**params, path: 1e6 * params[path]}, dtype="float16")
    assert not list((tmp_path / "a").iterdir())
    with pytest.raises(ValueError, match="not those of"):
        lora.save(tmp_path / "b", LoraConfig(8, 8), params)
    without = {p: v for p, v in params.items() if p != path}
    with pytest.raises(ValueError, match="not those of"):
        lora.save(tmp_path / "b", LORA, without)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        lora.save(tmp_path / "file", LORA, params)


@pytest.mark.parametrize("targets", [TARGETS, ["conv1", "proj_in", "conv_shortcut", "to_q"]])
def test_a_state_dict_with_an_adapter_inside(rng, tmp_path, targets):
    """As GenPercept's LoRA runs are saved; alpha is the rank there."""
    lora_config = LoraConfig(4, 4, tuple(targets))
    unet = add_adapter(torch_unet(rng), lora_config, rng)
    unet.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert any(".base_layer." in key for key in tensors)
    tensors = {key: value.numpy() for key, value in tensors.items()}
    network = functional(config_of(unet))
    got = rules.to_jax(network.shapes, merging.merged_tensors(tensors))
    twice = rules.to_jax(network.shapes, merging.merged_tensors(tensors, alpha=8))
    plain = params_of_plain(unet, network)
    unet.fuse_lora()
    unet.unload_lora()
    for path, value in params_of_plain(unet, network).items():
        assert max_abs(got[path], value) <= 1e-6, path
        assert max_abs(twice[path], 2 * value - plain[path]) <= 1e-5, path
    assert merging.merged_tensors({"conv_in.weight": 1}) == {"conv_in.weight": 1}

    half = {key: value.astype(np.float16) for key, value in tensors.items()}
    whole = {key: value.astype(np.float32) for key, value in half.items()}
    low = rules.to_jax(network.shapes, merging.merged_tensors(half), dtype=None)
    exact = rules.to_jax(network.shapes, merging.merged_tensors(whole))
    for path, value in low.items():
        adapted = lora_config.covers(path.removesuffix(".kernel"))
        assert value.dtype == (np.float32 if adapted else np.float16)
        np.testing.assert_array_equal(value, exact[path])

    key = next(key for key in tensors if "lora_B" in key)
    layer = key.partition(".lora_B")[0]
    without = {k: v for k, v in tensors.items() if k != key}
    other = {f"{layer}.lora_A.second.weight": np.ones((4, 16))}
    for damaged in (without, {**tensors, key: np.ones(3)}, {**tensors, **other}):
        with pytest.raises(UserError, match=f"layer {layer} has base_layer, lora_A.default"):
            merging.merged_tensors(damaged)


@pytest.fixture
def adapter(rng, tmp_path):
    """The folder of an adapter that diffusers wrote, and the config of its UNet."""
    unet = add_adapter(torch_unet(rng), LORA, rng)
    save_pipeline(unet, tmp_path / "adapter")
    return tmp_path / "adapter", config_of(unet)


def edit(folder, change=None, settings=None):
    """Changes tensors in place, and the settings (None takes a setting away)."""
    file = folder / DIFFUSERS_FILE
    with safe_open(file, framework="pt") as opened:
        metadata = dict(opened.metadata())
    tensors = load_file(file)
    if change:
        change(tensors)
    if isinstance(settings, dict):
        content = json.loads(metadata["lora_adapter_metadata"])
        content |= {f"unet.{key}": value for key, value in settings.items()}
        metadata["lora_adapter_metadata"] = json.dumps(content)
    elif settings is not None:
        metadata["lora_adapter_metadata"] = settings
    save_file(tensors, file, metadata=metadata)


def refused(adapter, path=None) -> str:
    folder, config = adapter
    with pytest.raises(UserError) as error:
        lora.load(path or folder, config)
    message = str(error.value)
    assert str(folder) in message
    assert "\n" not in message
    assert len(message) < 1500
    return message


def test_tensors_that_do_not_fit(adapter):
    folder, _ = adapter
    gone, other, extra = (f"unet.{LAYER[:-1]}{p}.lora_B.weight" for p in ("q", "k", "x"))

    def change(tensors):
        del tensors[gone]
        tensors[other] = torch.ones(17, 4)
        tensors[extra] = torch.ones(16, 4)
        tensors["text_encoder.layers.0.q_proj.lora_A.weight"] = torch.ones(4, 16)
        tensors["unet.conv_in.alpha"] = torch.ones(1)

    edit(folder, change)
    message = refused(adapter)
    assert f"missing (1): {gone.removeprefix('unet.')}" in message
    assert "not expected (3): conv_in.alpha" in message
    assert "text_encoder.layers.0.q_proj" in message
    assert extra.removeprefix("unet.") in message
    assert (
        f"of another shape (1): {other.removeprefix('unet.')} [17, 4] instead of [16, 4]" in message
    )


def test_layers_that_the_settings_name_must_be_there(adapter):
    folder, _ = adapter

    def change(tensors):
        for key in [key for key in tensors if ".attn2.to_v." in key]:
            del tensors[key]

    edit(folder, change)
    assert "missing (8): down_blocks.0" in refused(adapter)
    edit(folder, settings={"target_modules": r".*attn.*"})  # then the tensors alone tell
    got, _ = lora.load(*adapter)
    assert got.targets == ("attn1.to_v", "to_k", "to_out.0", "to_q")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(adapter, value):
    edit(adapter[0], lambda t: t[f"unet.{LAYER}.lora_B.weight"][3, 1].fill_(value))
    assert f"Tensor {LAYER}.lora_B.weight of" in refused(adapter)


def test_another_models_adapter(rng, adapter):
    def rename(tensors):
        for i, key in enumerate([*tensors]):
            tensors[f"unet.x{i}.lora_{key[-8]}.weight"] = tensors.pop(key)

    folder, config = adapter
    other = config_of(torch_unet(rng, block_out_channels=(24,)))
    message = refused((folder, other))
    assert "[4, 16] instead of [4, 24]" in message
    edit(folder, rename)
    assert "for none of the layers of the UNet2DConditionModel" in refused((folder, config))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"modules_to_save": ["conv_in"]}, "modules_to_save=list"),
        ({"rank_pattern": {"mid_block": 8}}, "rank_pattern=dict"),
        ({"alpha_pattern": {"mid_block": 8}}, "alpha_pattern=dict"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"layer_replication": [[0, 4]]}, "layer_replication=list"),
        ({"peft_type": "LOHA"}, "peft_type='LOHA'"),
        ({"r": 8}, "r=8"),
        ({"something_new": True}, "something_new=True"),
        ({"something\nnew": "x" * 9999}, "something new='xxx"),
        ({"lora_alpha": "10"}, "lora_alpha='10'"),
        ({"lora_alpha": None}, "lora_alpha=None"),
        ({"lora_alpha": float("nan")}, "alpha=nan"),
        ({"lora_alpha": -4}, "alpha=-4"),
        ({"lora_alpha": 1e300}, r"alpha=1e+300"),
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        (" " * 2**23, "cannot be read as JSON"),
        ("[1]", "must be a JSON object"),
    ],
)
def test_settings_that_ask_for_more(adapter, settings, message):
    edit(adapter[0], settings=settings)
    assert message in refused(adapter)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {"mid_block": 4}, "alpha_pattern": {"mid_block": 10}},
        {"lora_dropout": 0.1, "inference_mode": True, "target_modules": [7, None, ""]},
        {"init_lora_weights": True, "exclude_modules": ["x"], "task_type": "FEATURE_EXTRACTION"},
    ],
)
def test_settings_without_effect(adapter, settings):
    edit(adapter[0], settings=settings)
    assert lora.load(*adapter)[0] == LORA


def test_layers_of_different_rank(rng, tmp_path):
    unet = add_adapter(torch_unet(rng), LORA, rng, rank_pattern={"to_v": 2})
    unet.save_lora_adapter(tmp_path)
    assert "of the ranks 2, 4" in refused((tmp_path, config_of(unet)))


def test_ranks_beyond_reason_are_not_built(adapter):
    def change(tensors):
        for key, tensor in tensors.items():
            axes = (0, 16) if "lora_A" in key else (16, 0)
            tensors[key] = tensor.new_empty(axes)

    edit(adapter[0], change, settings={"r": 0})
    assert "rank=0" in refused(adapter)


def test_names_twice(adapter):
    key = f"unet.{LAYER}.lora_A.weight"
    edit(adapter[0], lambda t: t.update({f"unet.{LAYER}_lora.down.weight": t[key].clone()}))
    assert f"holds {LAYER}.lora_A.weight twice, as" in refused(adapter)


def test_no_factors_at_all(adapter):
    edit(adapter[0], lambda t: [t.pop(k) for k in [*t]] and t.update(x=torch.ones(2)))
    assert "of no rank at all" in refused(adapter)


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-7],
        lambda raw: raw[:30],
        lambda raw: b"",
        lambda raw: struct.pack("<Q", 1 << 62) + raw[8:],
    ],
)
def test_damaged_files(adapter, damage):
    file = adapter[0] / DIFFUSERS_FILE
    file.write_bytes(damage(file.read_bytes()))
    assert f"{file} is truncated or no safetensors file" in refused(adapter)


def test_what_is_no_adapter(adapter, tmp_path):
    folder, config = adapter
    assert "is not there" in refused(adapter, folder / "nothing")
    (folder / DIFFUSERS_FILE).rename(folder / "other.safetensors")
    assert f"needs {DIFFUSERS_FILE}, or {PEFT_FILE} with adapter_config.json" in refused(adapter)
    assert lora.load(folder / "other.safetensors", config)[0] == LORA
    (folder / "pytorch_lora_weights.bin").write_bytes(b"")
    assert "pytorch_lora_weights.bin is a pickle" in refused(adapter)
    assert "is a pickle" in refused(adapter, folder / "pytorch_lora_weights.bin")
    (folder / "other.safetensors").rename(folder / PEFT_FILE)
    assert "adapter_config.json cannot be read as JSON" in refused(adapter)
