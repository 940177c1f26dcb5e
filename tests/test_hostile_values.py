"""Values in config.json and its like that no model can have: one sentence, at no cost."""

import json
import shutil
import time
import tracemalloc
from pathlib import Path

import pytest
import torch_checkpoints
from hostile import (
    BILLION,
    INDEX,
    OWN,
    SCHEDULER,
    TEXT,
    TOKENIZER,
    UNET,
    VAE,
    Compiles,
    broken_checkpoints,  # noqa: F401
    change,
    nothing_compiles,
    refusal,
    refused_or_ready,
    remove,
    through_convert,
    through_pipeline,
    whole_checkpoints,  # noqa: F401
    write,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpercept import PerceptionPipeline

# ---- configs -------------------------------------------------------------------------------------

NESTED = "[" * 900 + "]" * 900


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (file, content)
        for file in (UNET, VAE, TEXT, INDEX, SCHEDULER, OWN)
        for content in ("", "{", "[]", "5", b"\xff\xfe{}", "[" * 10**5, f'{{"a": {NESTED}}}',
                        '{"a": ' + "9" * 5000 + "}")
    ],
)  # fmt: skip
def test_files_that_are_no_json_object(broken, file, content):
    folder = broken("export" if file == OWN else "depth", write(file, content))
    message = refusal(folder)
    assert f"WORK/source/{file}" in message
    assert "JSON" in message


@pytest.mark.parametrize(
    ("file", "values"),
    [
        (UNET, {"block_out_channels": [BILLION, BILLION], "norm_num_groups": 1}),
        (UNET, {"block_out_channels": [8 * 10**30, 8 * 10**30]}),
        (UNET, {"in_channels": 10**12}),
        (UNET, {"cross_attention_dim": 10**18}),
        (UNET, {"layers_per_block": BILLION}),
        (UNET, {"transformer_layers_per_block": BILLION}),
        (UNET, {"transformer_layers_per_block": [1, BILLION]}),
        (UNET, {"transformer_layers_per_block": 200, "layers_per_block": 200}),
        (
            UNET,
            {
                "block_out_channels": [16] * 2000,
                "down_block_types": ["DownBlock2D"] * 2000,
                "up_block_types": ["UpBlock2D"] * 2000,
                "attention_head_dim": 4,
            },
        ),
        (VAE, {"block_out_channels": [BILLION, BILLION], "norm_num_groups": 1}),
        (VAE, {"layers_per_block": BILLION}),
        (TEXT, {"vocab_size": 10**12}),
        (TEXT, {"hidden_size": 10**12}),
        (TEXT, {"num_hidden_layers": BILLION}),
        (SCHEDULER, {"num_train_timesteps": 10**12}),
        (INDEX, {"default_denoising_steps": 10**12}),
    ],
)
def test_absurd_sizes_cost_neither_memory_nor_time(broken, file, values):
    folder = broken("depth", change(file, **values))
    tracemalloc.start()
    start = time.monotonic()
    message = refusal(folder)
    assert time.monotonic() - start < 10
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()
    assert f"WORK/source/{file.split('/')[0]}" in message


def test_absurd_sizes_of_a_tiny_autoencoder(broken):
    levels = 2000
    content = {"_class_name": "AutoencoderTiny"}
    content |= {f"{part}_block_out_channels": [8] * levels for part in ("encoder", "decoder")}
    content |= {f"num_{part}_blocks": [0] * levels for part in ("encoder", "decoder")}
    message = refusal(broken("depth", write(VAE, json.dumps(content))))
    assert "The AutoencoderTiny of WORK/source/vae" in message


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        (UNET, '{"norm_eps": Infinity}', "the number inf"),
        (UNET, '{"norm_eps": NaN}', "the number nan"),
        (VAE, '{"scaling_factor": 1e999}', "the number inf"),
        (VAE, '{"scaling_factor": 1' + "0" * 400 + "}", "the number 1000"),
        (UNET, '{"in_channels": "8"}', "in_channels='8'"),
        (UNET, '{"in_channels": true}', "in_channels=True"),
        (UNET, '{"block_out_channels": {"a": 1}}', "block_out_channels={'a': 1}"),
        (UNET, '{"block_out_channels": [[16], 32]}', "block_out_channels=[[16], 32]"),
        (UNET, '{"attention_head_dim": 0}', "attention_head_dim=0"),
        (UNET, '{"a\\n\\u001b[2Jb": 1}', r"'a\n\x1b[2Jb' is not supported"),
        (UNET, '{"_class_name": "a\\n\\u001b[2Jb"}', "describes a a [2Jb"),
        (UNET, '{"_class_name": ["unet", "Evil"]}', "describes a ['unet', 'Evil']"),
        (UNET, '{"auto_map": {"AutoModel": "evil.Evil"}}', "'auto_map' is not supported"),
        (VAE, '{"latent_channels": null}', "latent_channels=None"),
        (TEXT, '{"hidden_act": "os.system"}', "hidden_act='os.system'"),
    ],
)
def test_configs_of_wrong_types_and_values(broken, file, text, words):
    folder = broken("depth")
    content = json.loads((folder / file).read_text()) | json.loads(text)
    write(file, json.dumps(content))(folder)
    message = refusal(folder)
    assert f"WORK/source/{file}" in message
    assert words in message


def test_networks_that_do_not_belong_together(broken, tmp_path):
    """Each whole in itself; SD 1's text encoder in SD 2's folder is such a pair."""
    folder = broken("depth")
    network = torch_checkpoints.unet("marigold", cross_attention_dim=48)
    network.save_pretrained(folder / "unet")
    assert "puts out 32 channels, and the UNet takes 48" in refusal(folder)
    shutil.rmtree(folder)
    folder = broken("depth")
    network = torch_checkpoints.unet(
        "marigold", class_embed_type="projection", projection_class_embeddings_input_dim=6
    )
    network.save_pretrained(folder / "unet")
    message = refusal(
        folder, lambda folder, _: PerceptionPipeline.from_pretrained(folder, family="lotus_g")
    )
    assert "a task vector of 6 values, and lotus_g models give 4" in message


# ---- model_index.json and scheduler_config.json --------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prediction_type", ["depth"]),
        ("prediction_type", "../depth"),
        ("default_denoising_steps", "4"),
        ("default_denoising_steps", -5),
        ("default_denoising_steps", 2.5),
        ("default_processing_resolution", "x"),
        ("default_processing_resolution", BILLION),
        ("default_processing_resolution", -64),
        ("scale_invariant", "no"),
        ("shift_invariant", 1),
        ("target_properties", ["albedo"]),
        ("target_properties", {"target_names": "albedo"}),
        ("target_properties", {"target_names": ["../../albedo"]}),
        ("target_properties", {"target_names": ["a"], "a": "b"}),
        ("target_properties", {"target_names": ["a"], "a": {"sub_target_names": 5}}),
    ],
)
def test_model_index_of_wrong_values(broken, key, value):
    message = refusal(broken("depth", change(INDEX, **{key: value})))
    assert f"WORK/source/{INDEX} has " in message
    assert "which is not " in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_class_name", ["a", "b"]),
        ("num_train_timesteps", 0),
        ("num_train_timesteps", "1000"),
        ("num_train_timesteps", 1000.5),
        ("num_train_timesteps", True),
        ("beta_start", float("nan")),
        ("beta_end", float("inf")),
        ("beta_end", 1.5),
        ("beta_end", "0.1"),
        ("beta_start", None),
        ("trained_betas", 5),
        ("trained_betas", ["a"]),
        ("trained_betas", [float("nan")] * 1000),
        ("steps_offset", "1"),
        ("steps_offset", BILLION),
        ("steps_offset", -BILLION),
        ("clip_sample", "yes"),
        ("clip_sample_range", float("nan")),
        ("rescale_betas_zero_snr", "no"),
        ("set_alpha_to_one", None),
        ("prediction_type", ["a"]),
        ("timestep_spacing", {}),
    ],
)
@pytest.mark.parametrize("enter", [through_pipeline, through_convert])
def test_schedules_of_wrong_values(broken, key, value, enter):
    message = refusal(broken("depth", change(SCHEDULER, **{key: value})), enter)
    assert f"WORK/source/{SCHEDULER} has {key}=" in message


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler"),
        ({"_class_name": "DPMSolverMultistepScheduler"}, "cannot be sampled with"),
        ({"evil": 1}, "unsupported key 'evil'"),
        ({"trained_betas": [0.5] * 9}, "trained_betas has 9 values"),
        ({"steps_offset": 500, "timestep_spacing": "leading"}, "reach timestep"),
        ({"prediction_type": "epsilon"}, "cannot recover the image"),
    ],
)
@pytest.mark.parametrize("enter", [through_pipeline, through_convert])
def test_schedules_that_cannot_be_sampled(broken, values, words, enter):
    message = refusal(broken("depth", change(SCHEDULER, **values)), enter)
    assert message.startswith("WORK/source: ")
    assert words in message


def test_a_missing_schedule(broken):
    assert f"WORK/source: {SCHEDULER} is missing" in refusal(broken("depth", remove(SCHEDULER)))


# ---- tokenizers ----------------------------------------------------------------------------------


def other_ids(step: int):
    def attack(folder: Path) -> None:
        path = folder / "tokenizer/vocab.json"
        vocabulary = json.loads(path.read_text())
        path.write_text(json.dumps({token: i + step for token, i in vocabulary.items()}))

    return attack


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        (remove("tokenizer"), "lacks tokenizer/vocab.json, tokenizer/merges.txt"),
        (remove("tokenizer/vocab.json"), "lacks tokenizer/vocab.json;"),
        (write("tokenizer/vocab.json", "{"), "damaged tokenizer"),
        (write("tokenizer/vocab.json", "[]"), "damaged tokenizer"),
        (write("tokenizer/vocab.json", '{"a": "b"}'), "damaged tokenizer"),
        (write("tokenizer/vocab.json", "[" * 10**5), "damaged tokenizer"),
        (write("tokenizer/merges.txt", "a b c\nqq\n"), "damaged tokenizer"),
        (write("tokenizer/merges.txt", b"\xff\xfe\x00"), "damaged tokenizer"),
        (write(TOKENIZER, "{"), "damaged tokenizer"),
        (write(TOKENIZER, "[" * 10**5), "damaged tokenizer"),
        (write("tokenizer/special_tokens_map.json", "{"), "damaged tokenizer"),
        (write("tokenizer/tokenizer.json", "{"), "damaged tokenizer"),
        (change(TOKENIZER, model_max_length=-3), "model_max_length is -3"),
        (change(TOKENIZER, model_max_length=1), "model_max_length is 1"),
        (change(TOKENIZER, model_max_length="x"), "model_max_length is 'x'"),
        (other_ids(1000), "tokens that the text encoder does not know (it has 201)"),
        (other_ids(BILLION), "tokens that the text encoder does not know"),
    ],
)
def test_broken_tokenizers(broken, attack, words):
    message = refusal(broken("depth", attack))
    assert "WORK/source" in message
    assert words in message


@pytest.mark.parametrize("length", [10**30, None])
def test_a_tokenizer_without_a_length(broken, length):
    """It cuts nothing off; the positions of the text encoder do."""
    with pytest.raises(Compiles), nothing_compiles():
        PerceptionPipeline.from_pretrained(
            broken("depth", change(TOKENIZER, model_max_length=length))
        )


# ---- any value at all ----------------------------------------------------------------------------

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats()
    | st.sampled_from(["", "depth", "linear", "../x", "a\nb", "x" * 5000])
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2)
    ),
    max_leaves=5,
)


def places(content, path=()):
    """All paths in a JSON value."""
    yield path
    if isinstance(content, dict | list):
        for key in content if isinstance(content, dict) else range(len(content)):
            yield from places(content[key], (*path, key))


def replaced(content, path, value):
    if not path:
        return value
    copy = content.copy()
    copy[path[0]] = replaced(content[path[0]], path[1:], value)
    return copy


@pytest.mark.parametrize("file", [UNET, VAE, TEXT, INDEX, SCHEDULER, OWN])
def test_any_value_is_refused_or_makes_a_model(whole, tmp_path_factory, file):
    name = "export" if file == OWN else "depth"
    folder = Path(shutil.copytree(whole / name, tmp_path_factory.mktemp("fuzz") / "source"))
    content = json.loads((folder / file).read_text())

    @settings(max_examples=20, deadline=None)
    @given(path=st.sampled_from(list(places(content))), value=ANYTHING)
    def check(path, value):
        (folder / file).write_text(json.dumps(replaced(content, path, value)))
        refused_or_ready(folder)

    check()
