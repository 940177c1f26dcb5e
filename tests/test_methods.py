"""The methods' losses and predictions, against the same written out with torch diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel

from jaxpercept.checkpoints import diffusers, diffusers_write
from jaxpercept.diffusion.noise import per_example
from jaxpercept.diffusion.schedule import GENPERCEPT
from jaxpercept.diffusion.timesteps import TimestepPolicy, sample_timesteps
from jaxpercept.errors import UserError
from jaxpercept.methods import build_method
from jaxpercept.methods.one_step import to_signed
from jaxpercept.models.config import AutoencoderTinyConfig, CLIPTextConfig
from jaxpercept.models.dpt import DPTConfig
from jaxpercept.models.functional import functional

TEXT = CLIPTextConfig(
    hidden_size=tiny_model.WIDTH,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    hidden_act="gelu",
    max_position_embeddings=8,
    vocab_size=40,
)
COMPONENTS = {**tiny_model.COMPONENTS, "text_encoder": TEXT}
SIZE = (16, 24)
SCALE = COMPONENTS["vae"].scaling_factor


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Random weights here, and in torch modules read from a diffusers folder written from them."""
    rng = np.random.default_rng()
    shapes = functional(TEXT).shapes
    text = {path: 0.3 * rng.normal(size=s.shape).astype(np.float32) for path, s in shapes.items()}
    params = {**tiny_model.params(rng), "text_encoder": text}
    folder = tmp_path_factory.mktemp("model")
    diffusers_write.save(folder, diffusers.Checkpoint(configs=COMPONENTS, params=params))
    modules = {
        "unet": UNet2DConditionModel.from_pretrained(folder / "unet"),
        "vae": AutoencoderKL.from_pretrained(folder / "vae"),
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder"),
    }
    for module in modules.values():
        module.eval()
    modules["vae"].requires_grad_(False)
    return params, modules


def method(name: str = "one_step", **options):
    return build_method(
        tiny_model.description(components=COMPONENTS, method={"name": name, **options})
    )


def depth_batch(rng, rows: int = 3):
    """Metres, with holes: one latent cell's worth, single pixels, and half an image."""
    valid = rng.random((rows, *SIZE, 1)) > 0.02
    valid[0, 4:8, 6:8] = False
    valid[1, :, :12] = False
    depth = rng.uniform(0.5, 9.0, (rows, *SIZE, 1)).astype(np.float32) * valid
    ranges = [np.quantile(d[v], (0.02, 0.98)) for d, v in zip(depth, valid, strict=True)]
    return {
        "rgb": rng.integers(0, 256, (rows, *SIZE, 3)).astype(np.uint8),
        "depth": depth,
        "valid": valid,
        "depth_range": np.asarray(ranges, np.float32),
        "index": jnp.asarray(rng.integers(0, 10_000, rows), jnp.int32),
    }


def nchw(x) -> torch.Tensor:
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)


def image(batch) -> torch.Tensor:
    return nchw(batch["rgb"]).float() / 255 * 2 - 1


def latent(modules, pixels: torch.Tensor) -> torch.Tensor:
    return modules["vae"].encode(pixels).latent_dist.mean * SCALE


def genpercept(params, modules, batch, timesteps):
    """GenPercept's training forward pass: the output f, the v target, the decoded prediction."""
    near, far = (nchw(batch["depth_range"][:, i, None, None, None]) for i in (0, 1))
    scaled = ((nchw(batch["depth"]) - near) / (far - near) * 2 - 1).clamp(-1, 1)
    valid = nchw(batch["valid"])
    target = torch.where(valid, scaled, scaled).repeat(1, 3, 1, 1)
    prompt = torch.tensor(params["prompt"]["embedding"]).repeat(len(timesteps), 1, 1)
    output = modules["unet"](latent(modules, image(batch)), timesteps, prompt).sample
    v_target = -latent(modules, target)
    cells = ~F.max_pool2d((~valid).float(), 2, 2).bool().repeat(1, 4, 1, 1)
    decoded = modules["vae"].decode(-output / SCALE).sample.mean(1, keepdim=True)
    return output, v_target, cells, decoded, target[:, :1], valid


@pytest.fixture(scope="module")
def one_step(model):
    """`(method, gradient)`: with both losses, compiled once for the whole file."""
    m = method(latent_weight=0.7, pixel_weights={"mse": 1.3})

    @jax.jit
    def gradient(unet, rest, batch, key):
        def loss(unet):
            return m.loss({**rest, "unet": unet}, batch, key)

        return jax.value_and_grad(loss, has_aux=True)(unet)

    return m, lambda params, batch, key: gradient(
        params["unet"], {k: v for k, v in params.items() if k != "unet"}, batch, key
    )


def test_the_one_step_loss_and_its_gradient_are_genpercept_s(model, one_step, rng):
    params, modules = model
    m, gradient = one_step
    batch, key = depth_batch(rng), jax.random.key(int(rng.integers(1000)))
    (loss, terms), grads = gradient(params, batch, key)

    key_t, _ = jax.random.split(key)
    t = torch.tensor(np.asarray(sample_timesteps(m.timesteps, key_t, batch["index"], GENPERCEPT)))
    f, v, cells, decoded, target, valid = genpercept(params, modules, batch, t)
    latent_mse = F.mse_loss(f[cells], v[cells])
    pixel_mse = F.mse_loss(decoded[valid], target[valid])
    total = 0.7 * latent_mse + 1.3 * pixel_mse
    modules["unet"].zero_grad()
    total.backward()

    assert float(terms["latent_mse"]) == pytest.approx(latent_mse.item(), rel=2e-5)
    assert float(terms["mse"]) == pytest.approx(1.3 * pixel_mse.item(), rel=2e-5)
    assert float(loss) == pytest.approx(total.item(), rel=2e-5)
    # The pixel loss reaches the UNet through the decoder, which itself is not trained.
    theirs = {k: p.grad for k, p in modules["unet"].named_parameters()}
    assert all(p.grad is None for p in modules["vae"].parameters())
    for path, ours in grads.items():
        name = path.replace(".kernel", ".weight").replace(".scale", ".weight")
        expected = theirs[name].numpy()
        if path.endswith("kernel"):
            expected = expected.transpose(2, 3, 1, 0) if expected.ndim == 4 else expected.T
        scale = max(np.abs(expected).max(), 1e-3)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * scale, err_msg=path)


def test_one_step_randomness_belongs_to_the_example(model, one_step, rng):
    params, _ = model
    batch, key = depth_batch(rng), jax.random.key(3)
    (loss, _), _ = one_step[1](params, batch, key)
    order = rng.permutation(3)
    (turned, _), _ = one_step[1](params, {k: x[order] for k, x in batch.items()}, key)
    assert float(turned) == pytest.approx(float(loss), rel=1e-5)
    (other_index, _), _ = one_step[1](params, {**batch, "index": batch["index"] + 1}, key)
    (other_key, _), _ = one_step[1](params, batch, jax.random.key(4))
    assert abs(float(other_index) - float(loss)) > 1e-4 * float(loss)
    assert abs(float(other_key) - float(loss)) > 1e-4 * float(loss)


def test_empty_masks_and_constant_depth_give_a_finite_gradient(model, one_step, rng):
    batch = depth_batch(rng)
    batch["depth_range"][0] = 2.0
    batch["valid"][1:] = False
    (loss, _), grads = one_step[1](model[0], batch, jax.random.key(0))
    assert float(loss) == 0.0
    assert all(np.all(np.asarray(g) == 0) for g in grads.values())


def test_one_step_prediction_is_one_unet_pass_at_the_inference_timestep(model, rng):
    params, modules = model
    batch = depth_batch(rng, rows=2)
    m = method(inference_timestep=500)

    @jax.jit
    def predict(params, rgb):
        image = m.perception.encode(params, to_signed(rgb))
        return m.perception.predict(params, image)

    ours, ours_latent = predict(params, batch["rgb"])
    with torch.no_grad():
        f, *_ = genpercept(params, modules, batch, torch.tensor([500, 500]))
        decoded = modules["vae"].decode(-f / SCALE).sample
    np.testing.assert_allclose(ours_latent, -f.permute(0, 2, 3, 1), rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours, decoded.permute(0, 2, 3, 1), rtol=0, atol=1e-4)


def test_the_denoising_loss_is_that_of_latent_diffusion(model, rng):
    params, modules = model
    prediction_type = str(rng.choice(["epsilon", "v_prediction"]))
    scheduler = {**tiny_model.SCHEDULER, "prediction_type": prediction_type}
    m = build_method(
        tiny_model.description(
            components=COMPONENTS,
            scheduler=scheduler,
            method={"name": "text_to_image", "empty_ids": [38, 39, 39, 39], "caption_dropout": 0.5},
        )
    )
    rows = 6
    batch = {
        "rgb": rng.integers(0, 256, (rows, *SIZE, 3)).astype(np.uint8),
        "input_ids": rng.integers(0, 38, (rows, 4)).astype(np.int32),
        "index": jnp.asarray(rng.permutation(rows), jnp.int32),
    }
    key = jax.random.key(int(rng.integers(1000)))
    loss, terms = jax.jit(m.loss)(params, batch, key)
    assert float(terms["mse"]) == float(loss)

    key_t, key_noise, key_drop, _ = jax.random.split(key, 4)
    shape = (SIZE[0] // 2, SIZE[1] // 2, 4)
    noise = per_example(key_noise, batch["index"], lambda k: jax.random.normal(k, shape))
    dropped = np.asarray(per_example(key_drop, batch["index"], jax.random.uniform)) < 0.5
    t = sample_timesteps(TimestepPolicy(), key_t, batch["index"], m.model.schedule)
    noise, t = nchw(noise), torch.tensor(np.asarray(t))
    ids = np.where(dropped[:, None], [38, 39, 39, 39], batch["input_ids"])
    theirs = DDIMScheduler.from_config(scheduler)
    with torch.no_grad():
        z = latent(modules, image(batch))
        text = modules["text_encoder"](torch.tensor(ids)).last_hidden_state
        output = modules["unet"](theirs.add_noise(z, noise, t), t, text).sample
        target = noise if prediction_type == "epsilon" else theirs.get_velocity(z, noise, t)
    assert float(loss) == pytest.approx(F.mse_loss(output, target).item(), rel=5e-5)


def test_an_edit_is_one_step_from_the_source(model, rng):
    params, modules = model
    m = method(
        "text_to_image",
        empty_ids=[38, 39, 39, 39],
        caption_dropout=0.0,
        edit_share=1.0,
        edit_weight=7.0,
    )
    assert "source" in m.fields
    assert "source" not in method("text_to_image").fields
    batch = {
        "rgb": rng.integers(0, 256, (4, *SIZE, 3)).astype(np.uint8),
        "source": rng.integers(0, 256, (4, *SIZE, 3)).astype(np.uint8),
        "input_ids": rng.integers(0, 38, (4, 4)).astype(np.int32),
        "index": jnp.asarray(rng.permutation(4), jnp.int32),
    }
    key = jax.random.key(int(rng.integers(1000)))
    loss, _ = jax.jit(m.loss)(params, batch, key)
    edited = jax.jit(m.edit)(params, batch["source"], batch["input_ids"])
    with torch.no_grad():
        z = latent(modules, image(batch))
        source = latent(modules, image({"rgb": batch["source"]}))
        text = modules["text_encoder"](torch.tensor(batch["input_ids"])).last_hidden_state
        output = modules["unet"](source, torch.full((4,), 999), text).sample
        decoded = modules["vae"].decode(-output / SCALE).sample.clip(-1, 1)
    assert float(loss) == pytest.approx(7 * F.mse_loss(output, -z).item(), rel=5e-5)
    np.testing.assert_allclose(edited, decoded.permute(0, 2, 3, 1), rtol=0, atol=1e-4)

    # What is as clear as its source is denoised like any other example.
    clear = batch | {"source": batch["rgb"]}
    plain = method("text_to_image", empty_ids=[38, 39, 39, 39], caption_dropout=0.0)
    assert float(jax.jit(m.loss)(params, clear, key)[0]) == pytest.approx(
        float(jax.jit(plain.loss)(params, clear, key)[0]), rel=1e-6
    )


def test_the_autoencoder_s_loss(model, rng):
    params, modules = model
    m = method("autoencoder", gradient_weight=0.6, cell_weight=0.3, kl_weight=0.2)
    batch = {
        "rgb": rng.integers(0, 256, (3, *SIZE, 3)).astype(np.uint8),
        "index": jnp.array([5, 2, 9], jnp.int32),
    }
    key = jax.random.key(int(rng.integers(1000)))
    loss, terms = jax.jit(m.loss)(params, batch, key)
    shape = (SIZE[0] // 2, SIZE[1] // 2, 4)
    noise = nchw(per_example(key, batch["index"], lambda k: jax.random.normal(k, shape)))
    with torch.no_grad():
        posterior = modules["vae"].encode(image(batch)).latent_dist
        out = modules["vae"].decode(posterior.mean + posterior.std * noise).sample
        d = out - image(batch)
        l1 = d.abs().mean()
        edges = (d.diff(dim=2).abs().sum() + d.diff(dim=3).abs().sum()) / d.numel()
        cells = F.avg_pool2d(d, 2).abs().mean()
        kl = posterior.kl().sum() / posterior.mean.numel()
    assert float(terms["l1"]) == pytest.approx(l1.item(), rel=2e-5)
    assert float(terms["gradient"]) == pytest.approx(edges.item(), rel=2e-5)
    assert float(terms["cells"]) == pytest.approx(cells.item(), rel=2e-5)
    assert float(terms["kl"]) == pytest.approx(kl.item(), rel=2e-5)
    assert float(terms["latent_std"]) == pytest.approx(
        posterior.mean.std(correction=0).item(), rel=2e-5
    )
    total = l1 + 0.6 * edges + 0.3 * cells + 0.2 * kl
    assert float(loss) == pytest.approx(total.item(), rel=2e-5)


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("two_step", {}, "'two_step' is unknown: use one of one_step"),
        ("one_step", {"latnet_weight": 1.0}, "latnet_weight"),
        ("one_step", {"timesteps": "sometimes"}, "'sometimes'"),
        ("one_step", {"timesteps": "fixed:1000"}, "1000"),
        ("one_step", {"inference_timestep": 1000}, "inference_timestep"),
        ("one_step", {"pixel_weights": {"mae": 1.0}}, "'mae'"),
        ("one_step", {"latent_weight": 0.0}, "no loss"),
        ("one_step", {"latent_weight": -1.0}, "gives latent_weight the weight -1.0: give 0 or"),
        ("one_step", {"pixel_weights": {"mse": float("nan")}}, "gives mse the weight nan"),
        ("one_step", {"decoder": "unet"}, "decoder is 'unet': use vae, dpt or tiny"),
        ("one_step", {"decoder": "dpt"}, "needs head"),
        ("text_to_image", {"caption_dropout": 1.5}, "caption_dropout is 1.5"),
        ("text_to_image", {"edit_share": -0.5}, "edit_share is -0.5"),
        ("autoencoder", {"latent_weight": 1.0}, "'latent_weight'"),
    ],
)
def test_options_that_do_not_fit_are_named_before_anything_runs(name, options, complaint):
    with pytest.raises(UserError, match=complaint):
        method(name, **options)


@pytest.mark.parametrize(
    ("task", "options", "complaint"),
    [
        ("pose", {}, "three channels and pose needs 17: set config.method.decoder to dpt"),
        ("normals", {"uncertainty": True}, "three channels and normals needs 4"),
        ("semantic", {"palette": "scenes", "logits": True}, "three channels and semantic needs"),
        ("seg", {}, "'seg' cannot be trained yet: use depth, "),
    ],
)
def test_tasks_that_no_image_can_hold_are_named(task, options, complaint):
    with pytest.raises(UserError, match=complaint):
        build_method(tiny_model.description(task=task, task_options=options))


def test_a_head_must_have_the_task_s_channels():
    head = DPTConfig.beside(COMPONENTS["unet"], 1)

    def built(**options):
        method = {"name": "one_step", "decoder": "dpt", "latent_weight": 0.0, **options}
        components = {**tiny_model.COMPONENTS, "head": head}
        return build_method(
            tiny_model.description(components=components, method=method, task="normals")
        )

    with pytest.raises(UserError, match="gives 1 channels and normals needs 3"):
        built(pixel_weights={"angular": 1.0})
    head = DPTConfig.beside(COMPONENTS["unet"], 3)
    with pytest.raises(UserError, match=r"predicts no latent: set .*latent_weight to 0"):
        built(latent_weight=1.0)
    assert built(pixel_weights={"angular": 1.0}).perception.recipe.head == "dpt"


def test_networks_that_do_not_fit_are_named():
    unet, vae = COMPONENTS["unet"], COMPONENTS["vae"]
    one_step = {"name": "one_step"}
    with pytest.raises(UserError, match="needs vae, which random does not hold"):
        build_method(tiny_model.description(components={"unet": unet}, method=one_step))
    wide = type(unet).from_dict({**unet.to_dict(), "in_channels": 8})
    with pytest.raises(UserError, match="takes 8 and gives 4"):
        build_method(tiny_model.description(components={"unet": wide, "vae": vae}))
    tiny = {"vae": AutoencoderTinyConfig()}
    with pytest.raises(UserError, match="trains an AutoencoderKL, and random holds an Autoencoder"):
        build_method(tiny_model.description(components=tiny, method={"name": "autoencoder"}))


def test_a_model_can_be_trained_in_bfloat16(model, rng):
    """Losses stay in float32 and close to those of float32 networks."""
    m = build_method(tiny_model.description(), dtype=jnp.bfloat16)
    batch = depth_batch(rng)
    shapes = jax.eval_shape(m.loss, model[0], batch, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
