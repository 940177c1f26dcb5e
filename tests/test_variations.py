"""Each variation of a preset changes the weights it says, and no others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
import tiny_run
import torch
import torch_checkpoints
from tiny_model import one_device
from tiny_run import data_of_module  # noqa: F401
from transformers import CLIPTokenizer

from jaxpercept import PerceptionPipeline, presets
from jaxpercept.checkpoints import lora
from jaxpercept.checkpoints.load import load_model, merge_params
from jaxpercept.errors import UserError
from jaxpercept.inference.opening import open_perception
from jaxpercept.inference.predictor import to_signed_float
from jaxpercept.models.functional import functional
from jaxpercept.models.lora import LoraConfig, is_lora
from jaxpercept.models.vae import decode_latents
from jaxpercept.tasks.base import to_signed
from jaxpercept.training.loop import open_data, train
from jaxpercept.training.optim import make_optimizer
from jaxpercept.training.setup import initial_weights, set_up


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An export all of whose weights are random, those of norms, too."""
    return tiny_model.save(tmp_path_factory.mktemp("base") / "export", np.random.default_rng())


def tiny(base, change, **changes):
    """A preset's variation on a checkpoint of a few weights."""
    c = presets.one_step("depth")
    c.update(tiny_run.config(base, **changes).to_dict() | {"method": c.method.to_dict()})
    return change(c)


def start(c):
    return initial_weights(c, set_up(c))


def changed(before, after):
    """Names of the weights that differ."""
    return {
        f"{part}/{path}"
        for part, weights in after.items()
        for path, weight in weights.items()
        if path not in before[part] or not np.array_equal(before[part][path], weight)
    }


@pytest.mark.parametrize("scratch", [True, False])
def test_a_decoder_from_scratch_is_random_and_nothing_else(base, scratch):
    given = load_model(str(base))[1]

    def change(c):
        c = presets.losses(c, mse=1.0)
        return presets.trained_decoder(c, 0.5, scratch=scratch)

    c = tiny(base, change)
    trained, frozen = start(c)
    names = {f"vae/{path}" for path in given["vae"]}
    decoder = {name for name in names if name.startswith(("vae/decoder.", "vae/post_quant_conv."))}
    assert {f"vae/{path}" for path in trained["vae"]} == decoder
    assert {f"vae/{path}" for path in frozen["vae"]} == names - decoder
    assert changed(given, merge_params(frozen, trained)) == (decoder if scratch else set())
    if scratch:
        kernel = trained["vae"]["decoder.conv_in.kernel"]
        bound = 1 / np.sqrt(np.prod(kernel.shape[:-1]))
        assert 0.9 * bound < np.abs(kernel).max() <= bound
        again = start(c)[0]
        tiny_run.assert_bit_equal(again, trained)
    some = {"unet": ("conv_in.bias",), "vae": ("decoder.conv_in.bias", "post_quant_conv.bias")}
    trained = {part: {path: trained[part][path] for path in paths} for part, paths in some.items()}
    gradient = jax.tree.map(jnp.ones_like, trained)
    optimizer, _ = make_optimizer(c.optimizer)
    state = optimizer.init(trained)
    for _ in range(3):  # the first rate is 0
        step, state = optimizer.update(gradient, state, trained)
    rates = {path: float(jnp.abs(x).max()) for tree in step.values() for path, x in tree.items()}
    for path in some["vae"]:
        assert rates[path] == pytest.approx(0.5 * rates["conv_in.bias"], rel=1e-4)


def test_a_decoder_that_no_loss_reaches_is_not_trained_in_vain(base):
    for change in (
        presets.trained_decoder,
        lambda c: presets.trained_decoder(presets.denoising(c, "image")),
    ):
        with pytest.raises(UserError, match=r"'vae/decoder.*only losses of decoded images train"):
            start(tiny(base, change))


def test_a_unet_from_scratch(base):
    given = load_model(str(base))[1]

    def change(c):
        c.random_init = ("unet",)
        return c

    every = {f"unet/{path}" for path in given["unet"]}
    assert changed(given, merge_params(*start(tiny(base, change)))) == every


def test_a_head_is_trained_with_the_unet_or_alone(base):
    def change(c):
        return presets.dpt_head(presets.losses(c, mse=1.0))

    given = load_model(str(base))[1]
    trained, _ = start(tiny(base, change))
    assert trained.keys() == {"unet", "head"}
    assert given["unet"].keys() - trained["unet"].keys() == {
        "conv_norm_out.scale",
        "conv_norm_out.bias",
        "conv_out.kernel",
        "conv_out.bias",
    }
    alone, rest = start(tiny(base, lambda c: presets.frozen_unet(change(c))))
    tiny_run.assert_bit_equal(alone, {"head": trained["head"]})
    tiny_run.assert_bit_equal(rest["unet"], trained["unet"])
    with pytest.raises(UserError, match="latent_weight to 0"):
        set_up(tiny(base, presets.dpt_head))


def test_a_head_ends_as_the_config_says(base):
    def with_end(c, end):
        c = presets.dpt_head(presets.losses(c, mse=1.0))
        c.architecture.head.final_activation = end
        return c

    for end in (None, "identity", "relu"):
        setup = set_up(tiny(base, functools.partial(with_end, end=end)))
        head = setup.description.components["head"]
        assert head.final_activation == (end or "identity")
        assert head.out_channels == 1
    with pytest.raises(UserError, match="final_activation"):
        set_up(tiny(base, functools.partial(with_end, end="tanh")))


def test_what_is_random_is_trained(base):
    """A head, or a decoder, that stays random would spoil every prediction."""

    def frozen_head(c):
        c = presets.dpt_head(presets.losses(c, mse=1.0))
        c.trainable = ("unet/",)
        return c

    def frozen_decoder(c):
        c = presets.trained_decoder(presets.losses(c, mse=1.0), scratch=True)
        c.trainable = ("unet/", "vae/post_quant_conv")
        return c

    for change, name in ((frozen_head, "head"), (frozen_decoder, "vae/decoder")):
        with pytest.raises(UserError, match=rf"random_init names '{name}', of which .* nothing"):
            start(tiny(base, change))

    def decoder_beside_a_head(c):
        c = presets.dpt_head(presets.losses(c, mse=1.0))
        c.trainable = ("head/", "vae/decoder")
        return c

    with pytest.raises(UserError, match=r"'vae/decoder.*no loss sees beside another decoder"):
        start(tiny(base, decoder_beside_a_head))


def test_a_tiny_decoder_is_taught_by_the_autoencoder(base, data, tmp_path):
    def change(c):
        return presets.tiny_decoder(c, str(base))

    c = tiny(base, change, steps=3, **tiny_run.on_folder(data))
    setup = set_up(c)
    trained, frozen = start(c)
    assert {part: {path.split(".")[0] for path in w} for part, w in trained.items()} == {
        "decoder": {"decoder"}
    }
    params, method = jax.tree.map(jnp.asarray, merge_params(frozen, trained)), setup.method
    batch = jax.tree.map(jnp.asarray, dict(next(iter(open_data(c, setup)))))
    total, terms = method.loss(params, batch, jax.random.key(0))
    perception = method.perception
    image = perception.encode(params, to_signed(batch["rgb"]))
    timesteps = jnp.full(len(image), method.inference_timestep)
    latent = perception.one_step(params, image, timesteps)
    networks = functional(setup.description.components["decoder"]), method.model.vae
    weights = params["decoder"], params["vae"]
    student, teacher = (
        decode_latents(network, w, latent) for network, w in zip(networks, weights, strict=True)
    )
    assert student.shape == teacher.shape == batch["rgb"].shape
    difference = float(jnp.abs(student - teacher).mean())
    # The training timestep is drawn; in this network it hardly tells.
    assert float(terms["teacher"]) == pytest.approx(difference, rel=0.05)
    assert float(total) == float(terms["teacher"])

    train(c, tmp_path / "run")
    _, after = load_model(str(tmp_path / "run"))
    assert {name.split(".")[0] for name in changed(params, after)} == {"decoder/decoder"}
    photograph = np.random.default_rng().integers(0, 256, (*tiny_run.SIZE, 3)).astype(np.uint8)
    pipe = PerceptionPipeline.from_pretrained(str(tmp_path / "run"))
    out = pipe(photograph, processing_resolution=0)
    image = perception.encode(params, to_signed(jnp.asarray(photograph[None])))
    latent = perception.one_step(params, image, timesteps[:1])
    np.testing.assert_allclose(out.latent, latent, atol=1e-5)
    decoded = [
        perception.task.to_prediction(decode_latents(network, after[part], latent))
        for network, part in zip(networks, ("decoder", "vae"), strict=True)
    ]
    np.testing.assert_allclose(out.prediction, np.asarray(decoded[0]), atol=1e-4)
    assert np.abs(out.prediction - np.asarray(decoded[1])).max() > 0.01


def test_only_a_tiny_decoder_has_a_teacher(base):
    def change(c):
        c = presets.tiny_decoder(c, str(base))
        c.method.decoder, c.random_init = "vae", ()
        return c

    with pytest.raises(UserError, match="teacher_weight compares a tiny decoder"):
        set_up(tiny(base, change))


def test_lora_trains_its_factors_alone(base):
    given = load_model(str(base))[1]
    c = tiny(base, lambda c: presets.lora(c, 3))
    setup = set_up(c)
    assert setup.description.lora["rank"] == setup.description.lora["alpha"] == 3
    trained, frozen = initial_weights(c, setup)
    assert trained.keys() == {"unet"}
    layers = {path.rpartition(".lora_")[0] for path in trained["unet"]}
    assert layers == {
        path.removesuffix(".kernel")
        for path in given["unet"]
        if path.endswith(tuple(f".{to}.kernel" for to in ("to_q", "to_k", "to_v", "to_out.0")))
    }
    assert layers
    for path, factor in trained["unet"].items():
        assert (factor != 0).any() == ("lora_A" in path)
    tiny_run.assert_bit_equal(frozen, given)


def test_a_lora_workdir_opens_merged(data, tmp_path, rng):
    """It predicts as the two factors beside the frozen weight do, also one in half precision."""
    small = tiny_run.base(tmp_path / "base")
    c = tiny(small, lambda c: presets.lora(c, 2), steps=4, **tiny_run.on_folder(data))
    c.optimizer.learning_rate, c.frozen_dtype = 0.1, "bfloat16"
    state = train(c, tmp_path / "run", mesh=one_device())
    factors = jax.device_get(state["params"]["unet"])
    assert all(np.abs(f).max() > 0.01 for f in factors.values())
    pipe = PerceptionPipeline.from_pretrained(tmp_path / "run", mesh=one_device())
    assert not pipe.description.lora
    assert not any("lora" in path for path in pipe.params["unet"])
    merged, frozen = load_model(str(tmp_path / "run"))[1]["unet"], start(c)[1]["unet"]
    for layer in {path.partition(".lora_")[0] for path in factors}:
        w, a, b = (
            np.asarray(weights[f"{layer}.{name}kernel"], np.float64)
            for weights, name in ((frozen, ""), (factors, "lora_A."), (factors, "lora_B."))
        )
        np.testing.assert_allclose(merged[f"{layer}.kernel"], w + a @ b, rtol=0, atol=1e-6)
    rgb = rng.integers(0, 256, (1, *tiny_run.SIZE, 3)).astype(np.uint8)

    setup = set_up(c)
    perception, params = setup.method.perception, merge_params(*start(c), {"unet": factors})

    @jax.jit
    def predict(params, rgb):
        return perception.predict(params, perception.encode(params, to_signed_float(rgb)))[1]

    expected = predict(params, rgb)
    np.testing.assert_allclose(pipe(rgb, processing_resolution=0).latent, expected, atol=1e-4)
    untrained = predict(merge_params(params, start(c)[0]), rgb)
    assert np.abs(untrained - expected).max() > 0.01


def test_an_adapter_beside_the_checkpoint_it_was_trained_on(tmp_path, rng):
    torch_checkpoints.write_checkpoint(tmp_path / "sd")
    named = {"task": "depth", "family": "genpercept"}
    description, params = open_perception(str(tmp_path / "sd"), **named)
    config = LoraConfig(2, 6)
    shapes = functional(description.components["unet"], lora=config).shapes
    factors = {
        path: rng.normal(size=shape.shape).astype(np.float32)
        for path, shape in shapes.items()
        if is_lora(path)
    }
    lora.save(tmp_path / "adapter", config, factors)
    named["lora"] = tmp_path / "adapter"
    merged = open_perception(str(tmp_path / "sd"), **named)[1]
    layers = {path.rpartition(".lora_")[0] for path in factors}
    assert changed(params, merged) == {f"unet/{layer}.kernel" for layer in layers}
    for layer in layers:
        added = 3 * factors[f"{layer}.lora_A.kernel"] @ factors[f"{layer}.lora_B.kernel"]
        kernels = (weights["unet"][f"{layer}.kernel"] for weights in (merged, params))
        np.testing.assert_allclose(np.subtract(*kernels), added, atol=1e-5)
    pipe = PerceptionPipeline.from_pretrained(tmp_path / "sd", mesh=one_device(), **named)
    np.testing.assert_array_equal(
        pipe.params["unet"][f"{layer}.kernel"], merged["unet"][f"{layer}.kernel"]
    )
    with pytest.raises(UserError, match="nothing is not there"):
        open_perception(str(tmp_path / "sd"), **named | {"lora": tmp_path / "nothing"})


# ---- the prompt ----------------------------------------------------------------------------------


def test_the_prompt_is_what_the_text_encoder_makes_of_it(tmp_path):
    modules = torch_checkpoints.write_checkpoint(tmp_path / "sd")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "sd" / "tokenizer")
    c = tiny_run.config(tmp_path / "sd")
    lengths = []
    for prompt in ("", "a room with red", "F3@qV!k2*#Zp^n%1Lz"):
        c.prompt = prompt
        embedding = initial_weights(c, set_up(c))[1]["prompt"]["embedding"]
        ids = torch.tensor(tokenizer([prompt])["input_ids"])
        with torch.no_grad():
            expected = modules["text_encoder"](ids).last_hidden_state.numpy()
        np.testing.assert_allclose(embedding, expected, atol=2e-5)
        lengths.append(embedding.shape[1])
    assert lengths[:2] == [2, 6]
    assert lengths[2] > 6


def test_a_prompt_needs_a_text_encoder(base):
    c = tiny_run.config(base, prompt="a room")
    with pytest.raises(UserError, match=r"no text encoder for config\.prompt"):
        initial_weights(c, set_up(c))
