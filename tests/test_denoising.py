"""The denoising method: its noises, its loss and its prediction, against torch and diffusers."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from test_methods import depth_batch, nchw
from torch_parity import from_torch, normal, params_of, randomise

from jaxpercept.diffusion.noise import multi_resolution, per_example
from jaxpercept.diffusion.timesteps import sample_timesteps
from jaxpercept.errors import UserError
from jaxpercept.methods import build_method
from jaxpercept.methods.one_step import to_signed

SIZE, ROWS = (16, 24), 3
LATENT = (8, 12, 4)
VAE = tiny_model.COMPONENTS["vae"]
NARROW = tiny_model.COMPONENTS["unet"]
WIDE = dataclasses.replace(NARROW, in_channels=8)


def method(noise="image", *, name="denoising", scheduler=None, batch_size=0, **options):
    unet = NARROW if noise == "image" else WIDE
    options |= {"noise": noise} if name == "denoising" else {}
    return build_method(
        tiny_model.description(
            components={"unet": unet, "vae": VAE},
            scheduler={**tiny_model.SCHEDULER, "clip_sample": False, **(scheduler or {})},
            method={"name": name, **options},
        ),
        batch_size=batch_size,
    )


@pytest.fixture(scope="module")
def networks():
    """Random torch networks, UNets by their input channels, and the weights of all."""
    rng = np.random.default_rng()
    vae = randomise(AutoencoderKL.from_config(VAE.to_dict()), rng)
    weights = {"vae": params_of(vae, method().model.vae.shapes)}
    weights["prompt"] = {"embedding": normal(rng, 1, 2, tiny_model.WIDTH)}
    unets, params = {}, {}
    for channels, noise in ((4, "image"), (8, "gaussian")):
        unet = UNet2DConditionModel.from_config(method(noise).model.unet.config.to_dict())
        unets[channels] = randomise(unet, rng)
        shapes = method(noise).model.unet.shapes
        params[channels] = {**weights, "unet": params_of(unets[channels], shapes)}
    return unets, vae, params


def latent(vae, pixels):
    """Of an NHWC image in [-1, 1]."""
    return VAE.scaling_factor * vae.encode(nchw(pixels)).latent_dist.mean


def encoded(vae, batch):
    """The latents of the image and of the depth, and which cells count."""
    batch = jax.tree.map(np.asarray, batch)
    near, far = (batch["depth_range"][:, i, None, None, None] for i in (0, 1))
    depth = np.clip((batch["depth"] - near) / (far - near) * 2 - 1, -1, 1).repeat(3, -1)
    holes = F.max_pool2d(nchw(~batch["valid"]).float(), 2, 2).bool()
    image = batch["rgb"].astype(np.float32) / 127.5 - 1
    return latent(vae, image), latent(vae, depth), ~holes.repeat(1, 4, 1, 1)


# ---- multi-resolution noise ----------------------------------------------------------------------


@functools.cache
def many(shape):
    return jax.jit(jax.vmap(lambda key, s: multi_resolution(key, shape, s)))


def marigold_noise(key, shape, strength):
    """Marigold's loop with torch's interpolation, given the ratios and grids drawn here."""
    h, w, c = shape
    rows, columns, room = h, w, [h, w]
    noise = nchw(np.array(jax.random.normal(jax.random.fold_in(key, 0), shape))[None]).double()
    levels = []
    for level in range(10):
        key_ratio, key_grid = jax.random.split(jax.random.fold_in(key, level + 1))
        ratio = float(jax.random.uniform(key_ratio, minval=2.0, maxval=4.0))
        rows, columns = (max(1, int(side / ratio**level)) for side in (rows, columns))
        room = [max(side // 2**level, 1) for side in room]
        grid = np.array(jax.random.normal(key_grid, (*room, c)))[None, :rows, :columns]
        up = F.interpolate(nchw(grid).double(), (h, w), mode="bilinear", align_corners=False)
        noise = noise + up * strength**level
        levels.append((rows, columns))
        if rows == 1 or columns == 1:
            break
    return from_torch(noise / noise.std())[0], levels


@pytest.mark.parametrize(
    "shape", [(12, 16, 4), (15, 10, 4), (60, 80, 2), (16, 64, 2), (1, 9, 3), (2, 2, 1)]
)
def test_multi_resolution_noise_is_marigold_s(rng, shape):
    keys = jax.random.split(jax.random.key(int(rng.integers(2**31))), 6)
    strengths = jnp.float32([0, 0.1, 0.45, 0.7, 0.9, 1])
    ours = many(shape)(keys, strengths)
    seen = set()
    for key, strength, noise in zip(keys, np.asarray(strengths).tolist(), ours, strict=True):
        expected, levels = marigold_noise(key, shape, strength)
        np.testing.assert_allclose(noise, expected, atol=2e-5)
        seen.add(tuple(levels))
        assert levels[0] == shape[:2]
    if shape[0] == 60:  # 60 -> 15 to 30 -> 1 to 7 and so on
        assert len(seen) > 1
    if shape[0] == 16:  # one side ends it
        assert any(levels[-1][1] > 1 for levels in seen)


def test_its_moments(rng):
    """Unit variance in each example; the stronger, the more alike are neighbours."""
    keys = jax.random.split(jax.random.key(int(rng.integers(2**31))), 200)
    alike = []
    for strength in (0.0, 0.5, 0.9):
        noise = np.asarray(many((12, 16, 4))(keys, np.full(200, strength, np.float32)))
        np.testing.assert_allclose(noise.std(axis=(1, 2, 3), ddof=1), 1, rtol=1e-5)
        assert abs(noise.mean()) < 0.05
        alike.append((noise[:, :, 1:] * noise[:, :, :-1]).mean())
    assert abs(alike[0]) < 0.02  # two noises of full size, no more
    assert alike[1] > 0.05
    assert alike[2] > alike[1] + 0.05


@pytest.mark.parametrize("annealed", [True, False])
def test_each_example_has_the_noise_of_its_own_timestep(rng, annealed):
    m = method("multi_resolution", noise_strength=0.8, annealed=annealed)
    key, index = jax.random.key(int(rng.integers(2**31))), jnp.array([5, 0, 7], jnp.int32)
    timesteps = jnp.array([0, 400, 999], jnp.int32)
    ours = m._noise(key, index, timesteps, (12, 16, 4))
    share = np.float32(timesteps) / 1000 if annealed else np.ones(3, np.float32)
    keys = per_example(key, index, lambda k: k)
    np.testing.assert_allclose(ours, many((12, 16, 4))(keys, 0.8 * share), atol=1e-5)


def test_noise_belongs_to_the_example(rng):
    key, index = jax.random.key(int(rng.integers(2**31))), jnp.array([7, 0, 7, 3], jnp.int32)
    first, zero, again, third = np.asarray(per_example(key, index, jax.random.uniform))
    assert first == again
    assert len({first, zero, third}) == 3
    other = np.asarray(per_example(jax.random.fold_in(key, 1), index, jax.random.uniform))
    assert other[0] != first


# ---- the loss ------------------------------------------------------------------------------------


def inputs_of(rng):
    """A batch and a key."""
    key = jax.random.key(int(rng.integers(2**31)))
    return jax.tree.map(jnp.asarray, depth_batch(rng, ROWS)), key


@pytest.mark.parametrize("noise", ["image", "gaussian", "multi_resolution"])
def test_the_loss_is_that_of_torch(networks, rng, noise):
    unets, vae, params = networks
    channels = 4 if noise == "image" else 8
    beta = {"prediction_type": str(rng.choice(["v_prediction", "epsilon", "sample"]))}
    beta |= {"beta_start": 0.0034, "beta_end": 0.048}
    m = method(noise, scheduler=beta, timesteps="uniform")
    loss_fn = jax.jit(m.loss)
    batch, key = inputs_of(rng)
    loss, terms = loss_fn(params[channels], batch, key)
    assert terms.keys() == {"latent_mse"}
    assert float(terms["latent_mse"]) == float(loss)

    key_t, key_noise = jax.random.split(key)
    t = sample_timesteps("uniform", key_t, batch["index"], m.solver.schedule)
    with torch.no_grad():
        image, depth, cells = encoded(vae, batch)
        drawn = image
        if noise == "gaussian":
            draw = functools.partial(jax.random.normal, shape=LATENT)
            drawn = nchw(np.asarray(per_example(key_noise, batch["index"], draw)))
        elif noise == "multi_resolution":
            keys = per_example(key_noise, batch["index"], lambda k: k)
            rows = zip(keys, np.asarray(t), strict=True)
            drawn = [marigold_noise(k, LATENT, 0.9 * int(s) / 1000)[0] for k, s in rows]
            drawn = nchw(np.stack(drawn)).float()
        theirs, t = DDIMScheduler.from_config(m.solver.schedule.to_config()), torch.tensor(t)
        x = theirs.add_noise(depth, drawn, t)
        inputs = x if channels == 4 else torch.cat([image, x], dim=1)
        prompt = torch.tensor(params[4]["prompt"]["embedding"]).repeat(ROWS, 1, 1)
        output = unets[channels](inputs, t, prompt).sample
        wanted = {
            "v_prediction": theirs.get_velocity(depth, drawn, t),
            "epsilon": drawn,
            "sample": depth,
        }[beta["prediction_type"]]
        expected = F.mse_loss(output[cells], wanted[cells]).item()
    assert float(loss) == pytest.approx(expected, rel=5e-5)

    # Rows come in any order, and each has the randomness of its own index.
    order = rng.permutation(ROWS)
    turned = loss_fn(params[channels], {k: x[order] for k, x in batch.items()}, key)[0]
    assert float(turned) == pytest.approx(float(loss), rel=1e-5)
    every = [
        loss_fn(params[channels], {k: x[np.array([i] * ROWS)] for k, x in batch.items()}, key)[0]
        for i in range(ROWS)
    ]
    shares = cells.float().mean(dim=(1, 2, 3)).numpy()
    assert float(loss) == pytest.approx(np.average(every, weights=shares), rel=1e-5)
    other = loss_fn(params[channels], {**batch, "index": batch["index"] + 1}, key)[0]
    assert abs(float(other) - float(loss)) > 1e-4 * float(loss)


@pytest.mark.parametrize(
    ("use", "policy"), [("loss", "addp_depth"), ("importance", "ddim_noise:5")]
)
def test_losses_are_weighed_by_their_timesteps(networks, rng, use, policy):
    """Each example's squared errors have a factor; the mean is over all valid cells as ever."""
    unets, vae, params = networks
    m = method("gaussian", timesteps=policy, timestep_use=use, batch_size=ROWS)
    batch, key = inputs_of(rng)
    loss, terms = jax.jit(m.loss)(params[8], batch, key)

    key_t, key_noise = jax.random.split(key)
    schedule, index = m.solver.schedule, batch["index"]
    drawn_by = "uniform" if use == "loss" else policy
    t = np.asarray(sample_timesteps(drawn_by, key_t, index, schedule, strata=ROWS))
    weights = {
        "loss": np.array([1, 1, 3, 7, 13, 14, 8, 4, 22, 33])[t // 100] / 10.6,
        "importance": 1 / (1000 * m.timesteps.distribution(schedule)[t]),
    }[use]
    with torch.no_grad():
        image, depth, cells = encoded(vae, batch)
        draw = functools.partial(jax.random.normal, shape=LATENT)
        noise = nchw(np.asarray(per_example(key_noise, index, draw)))
        theirs, t = DDIMScheduler.from_config(schedule.to_config()), torch.tensor(t)
        inputs = torch.cat([image, theirs.add_noise(depth, noise, t)], dim=1)
        prompt = torch.tensor(params[4]["prompt"]["embedding"]).repeat(ROWS, 1, 1)
        error = unets[8](inputs, t, prompt).sample - theirs.get_velocity(depth, noise, t)
        squared = torch.where(cells, error**2, 0).sum(dim=(1, 2, 3)).numpy() / cells.sum().item()
    assert float(loss) == pytest.approx(weights @ squared, rel=5e-5)
    assert float(terms["latent_mse"]) == pytest.approx(squared.sum(), rel=5e-5)


def test_what_the_losses_expect(networks, rng):
    """Importance weights give the loss of uniform timesteps, and two uses the same loss.

    Exactly: of eight strata each of four timesteps has as many as its probability, and where the
    image is the noise nothing else is random.
    """
    _, _, params = networks
    batch, key = inputs_of(rng)
    batch = {name: x[jnp.zeros(8, jnp.int32)] for name, x in batch.items()}
    batch["index"] = 8 * int(rng.integers(1000)) + jnp.arange(8)
    schedule = {"num_train_timesteps": 4, "beta_start": 0.1, "beta_end": 0.6}

    def expected(use, occurrences):
        options = {"timesteps": "weighted:4,1,1,2", "timestep_use": use, "num_steps": 2}
        m = method("image", scheduler=schedule, batch_size=8, **options)
        t, _ = m._draw(jax.random.split(key)[0], batch["index"])
        np.testing.assert_array_equal(np.bincount(t), occurrences)
        loss, terms = jax.jit(m.loss)(params[4], batch, key)
        return float(loss), float(terms["latent_mse"])  # of what was drawn, without weights

    weighed, uniform = expected("loss", [2, 2, 2, 2])
    corrected, drawn = expected("importance", [4, 1, 1, 2])
    assert weighed == pytest.approx(drawn, rel=1e-5)
    assert corrected == pytest.approx(uniform, rel=1e-5)


def test_timesteps_are_stratified_over_the_batch_of_an_update():
    schedule = {"num_train_timesteps": 64}
    index, key = jnp.arange(32, 48), jax.random.key(0)
    options = {"timesteps": "uniform", "scheduler": schedule, "batch_size": 16}
    t, weights = method(**options)._draw(key, index)
    np.testing.assert_array_equal(np.sort(t) // 4, np.arange(16))
    np.testing.assert_array_equal(weights, 1)
    for changes in ({"stratified": False}, {"batch_size": 0}):
        t, _ = method(**{**options, **changes})._draw(key, index)
        assert len(set(np.asarray(t) // 4)) < 16


def test_blending_with_beta_one_is_the_one_step_method(networks, rng):
    _, _, params = networks
    one = {"beta_start": 1.0, "beta_end": 1.0}
    batch, key = inputs_of(rng)
    blend = method("image", scheduler=one, timesteps="uniform", num_steps=1)
    step = method(name="one_step", latent_weight=1.0)

    @functools.partial(jax.jit, static_argnums=0)
    def run(m, params):
        image = m.perception.encode(params, to_signed(batch["rgb"]))
        return m.loss(params, batch, key)[0], m.perception.predict(params, image)[1]

    ours, theirs = run(blend, params[4]), run(step, params[4])
    assert float(ours[0]) == pytest.approx(float(theirs[0]), rel=1e-6)
    np.testing.assert_allclose(ours[1], theirs[1], atol=1e-5)


# ---- predictions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("noise", "output"), [("image", "x0"), ("gaussian", "sample")])
def test_a_prediction_takes_the_steps_of_diffusers(networks, rng, noise, output):
    unets, vae, params = networks
    channels = 4 if noise == "image" else 8
    m = method(noise, timesteps="uniform", num_steps=3, output=output)
    rgb = rng.uniform(-1, 1, (2, *SIZE, 3)).astype(np.float32)
    start = normal(rng, 2, *LATENT)

    @jax.jit
    def predict(params, rgb, start):
        image = m.perception.encode(params, rgb)
        return m.perception.predict(params, image, None if noise == "image" else start)

    decoded, ours = predict(params[channels], rgb, start)
    scheduler = DDIMScheduler.from_config(m.solver.schedule.to_config())
    scheduler.set_timesteps(3)
    prompt = torch.tensor(params[4]["prompt"]["embedding"]).repeat(2, 1, 1)
    with torch.no_grad():
        image = latent(vae, rgb)
        x = image if noise == "image" else nchw(start)
        for t in scheduler.timesteps:
            inputs = x if noise == "image" else torch.cat([image, x], dim=1)
            step = scheduler.step(unets[channels](inputs, t, prompt).sample, t, x)
            x, x0 = step.prev_sample, step.pred_original_sample
        expected = x0 if output == "x0" else x
        picture = vae.decode(expected / VAE.scaling_factor).sample
    np.testing.assert_allclose(ours, from_torch(expected), rtol=0, atol=1e-4)
    np.testing.assert_allclose(decoded, from_torch(picture), rtol=0, atol=2e-4)


# ---- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"noise": "pink"}, "method.noise is 'pink': use multi_resolution or gaussian or image"),
        ({"output": "eps"}, "method.output is 'eps': use x0 or sample"),
        ({"noise_strength": 1.5}, "noise_strength is 1.5"),
        ({"timesteps": "fixed:1000"}, "1000"),
        ({"timesteps": "ddim:1001"}, "1001"),
        ({"timestep_use": "weigh"}, "use is 'weigh': use sample or loss or importance"),
        ({"timestep_use": "importance", "timesteps": "fixed:3"}, "never or hardly ever"),
        ({"batch_size": 8}, "has the key 'batch_size'"),
        ({"num_steps": 0}, "0"),
        ({"num_steps": 2000}, "2000"),
        ({"decoder": "vae"}, "has the key 'decoder'"),
        ({"pixel_weights": {}}, "has the key 'pixel_weights', which denoising has not"),
        ({"solver": None}, "has the key 'solver'"),
    ],
)
def test_options_that_do_not_fit_are_named(options, complaint):
    described = tiny_model.description(
        components={"unet": WIDE, "vae": VAE},
        method={"name": "denoising", "timesteps": "uniform", "noise": "gaussian", **options},
    )
    with pytest.raises(UserError, match=complaint):
        build_method(described)


def test_networks_and_tasks_that_do_not_fit_are_named():
    def built(unet, task="depth", **options):
        method = {"name": "denoising", "noise": "gaussian", **options.pop("method", {})}
        described = tiny_model.description(
            components={"unet": unet, "vae": VAE}, method=method, task=task, **options
        )
        return build_method(described)

    with pytest.raises(UserError, match="write DDIMScheduler into"):
        method("image", scheduler={"_class_name": "EulerAncestralDiscreteScheduler"})
    method("gaussian", scheduler={"_class_name": "EulerAncestralDiscreteScheduler"})
    with pytest.raises(UserError, match="UNet of 8 input channels, this one has 4"):
        built(NARROW)
    with pytest.raises(UserError, match="pose has no image to denoise: use the method one_step"):
        built(WIDE, "pose")
    with pytest.raises(UserError, match="semantic has no image"):
        built(WIDE, "semantic", task_options={"palette": "scenes", "logits": True})
    corrupted = {"method": {"corruption": "increasing"}}
    with pytest.raises(UserError, match="targets of normals cannot be corrupted: set config"):
        built(WIDE, "normals", **corrupted)
    assert built(WIDE, "dis", **corrupted).corrupts
    assert built(WIDE, "normals").fields == ("rgb", "normals", "valid", "index")
