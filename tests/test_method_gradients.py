"""One training step of GenPercept: its loss and all gradients as torch computes them in float64.

The networks are those of diffusers and transformers, the losses are written out here from the
paper and its code, and nothing of this package is in the reference but the drawn timesteps.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from dpt_torch import TorchHead
from torch_parity import normal, randomise
from torch_parity import to_torch as nchw

from jaxpercept.checkpoints import rules
from jaxpercept.checkpoints.load import merge_params
from jaxpercept.diffusion.schedule import GENPERCEPT
from jaxpercept.diffusion.timesteps import sample_timesteps
from jaxpercept.methods import build_method
from jaxpercept.models.dpt import DPTConfig
from jaxpercept.training.optim import split_params

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE, ROWS = (18, 26), 3  # latents of 9 x 13, which a UNet of two levels halves to 5 x 7
UNET, VAE = tiny_model.COMPONENTS["unet"], tiny_model.COMPONENTS["vae"]
TWO_LEVELS = dataclasses.replace(
    UNET,
    block_out_channels=(8, 12),
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
)
ONE_LEVEL = dataclasses.replace(
    VAE,
    norm_num_groups=1,
    block_out_channels=(8,),
    down_block_types=("DownEncoderBlock2D",),
    up_block_types=("UpDecoderBlock2D",),
)
HEAD = DPTConfig.beside(TWO_LEVELS, 1)


@dataclasses.dataclass(frozen=True)
class Case:
    """A method's networks and options, what it trains, and its loss in torch."""

    task: str
    options: dict
    trainable: tuple[str, ...]
    loss: Callable
    unet: Any = UNET
    vae: Any = VAE
    head: Any = None

    @property
    def components(self):
        parts = {"unet": self.unet, "vae": self.vae, "head": self.head}
        return {name: config for name, config in parts.items() if config is not None}


# ---- the reference -------------------------------------------------------------------------------


class Kink(Exception):
    """A value so close to where a loss has no slope that float32 may be on its other side."""


def smooth(distance, margin=1e-5):
    if distance.numel() and distance.detach().abs().min() < margin:
        raise Kink


def median(x):
    return x.median() if x.numel() else torch.ones((), dtype=x.dtype)


def ssi(p, g, m):
    """Least squares; an image whose best scale is negative is aligned by its medians instead."""
    total = 0
    for a, b, w in zip(p, g, m.bool(), strict=True):
        if not w.any():
            continue
        a, b, usable = a[w], b[w], (w & (b > 0))[w]
        system = torch.stack([a, torch.ones_like(a)], dim=1)
        scale, shift = torch.linalg.solve(system.T @ system, system.T @ b)
        smooth(scale, 1e-4)
        aligned = scale * a + shift
        if scale <= 0:
            aligned = a * median(b[usable]) / (median(a[usable]) + 1e-8)
        smooth(aligned - b)
        total = total + (aligned - b).abs().sum()
    return total / m.sum()


def gradient(p, g, m):
    d = m * (p - g)
    total = 0
    for axis in (2, 3):
        n = m.shape[axis] - 1
        pairs = m.narrow(axis, 0, n) * m.narrow(axis, 1, n)
        slope = d.diff(dim=axis)
        smooth(slope[pairs.bool()])
        total = total + (pairs * slope.abs()).sum()
    return total / m.sum()


def mse(p, g, m):
    return (((p - g) * m) ** 2).sum() / m.sum()


def latents(vae, pixels):
    return vae.config.scaling_factor * vae.encode(pixels).latent_dist.mean


def depth_target(batch):
    near, far = (nchw(batch["depth_range"][:, i, None, None, None]) for i in (0, 1))
    return ((nchw(batch["depth"]) - near) / (far - near) * 2 - 1).clamp(-1, 1)


def decoded(nets, batch, timesteps, context):
    """The UNet's output on the image's latent, and the image decoded from its negative."""
    z = latents(nets["vae"], nchw(batch["rgb"]))
    output = nets["unet"](z, timesteps, context).sample
    return output, nets["vae"].decode(-output / nets["vae"].config.scaling_factor).sample


def depth_loss(nets, batch, *conditions):
    """GenPercept's main runs of depth, mse + 0.5 ssi + 2 grad in [1, 3]; 3 times the latent loss.

    The latter over the cells all of whose pixels are valid.
    """
    output, image = decoded(nets, batch, *conditions)
    target = depth_target(batch)
    valid = nchw(batch["valid"]).to(target.dtype)
    velocity = -latents(nets["vae"], target.repeat(1, 3, 1, 1))
    cells = F.max_pool2d(1 - valid, 2, 2).repeat(1, 4, 1, 1) == 0
    p, g = image.mean(1, keepdim=True) + 2, target + 2
    pixel = mse(p, g, valid) + 0.5 * ssi(p, g, valid) + 2 * gradient(p, g, valid)
    return 3 * F.mse_loss(output[cells], velocity[cells]) + pixel


def angular_loss(nets, batch, *conditions):
    _, p = decoded(nets, batch, *conditions)
    g = nchw(batch["normals"])
    mask = (g != 0).any(1) & nchw(batch["valid"])[:, 0]
    cosine = F.cosine_similarity(p, g, dim=1)[mask]
    smooth(cosine.abs() - (1 - 1e-4), 1e-6)
    return cosine.clamp(-1 + 1e-4, 1 - 1e-4).arccos().mean()


def head_loss(nets, batch, timesteps, context):
    """The head reads the up blocks; its map is brought to the image's size."""
    features = []
    hooks = [
        block.register_forward_hook(lambda module, args, out: features.append(out))
        for block in nets["unet"].up_blocks
    ]
    nets["unet"](latents(nets["vae"], nchw(batch["rgb"])), timesteps, context)
    for hook in hooks:
        hook.remove()
    p = F.interpolate(nets["head"](features)[:, None], SIZE, mode="bilinear")
    target = depth_target(batch)
    return mse(p, target, nchw(batch["valid"]).to(target.dtype))


CASES = {
    "depth, latent and decoded": Case(
        "depth",
        {"latent_weight": 3.0, "pixel_weights": {"mse": 1.0, "ssi": 0.5, "grad": 2.0}},
        ("unet/", "vae/decoder", "vae/post_quant_conv"),
        depth_loss,
    ),
    "normals": Case(
        "normals",
        {"latent_weight": 0.0, "pixel_weights": {"angular": 1.0}},
        ("unet/",),
        angular_loss,
        unet=dataclasses.replace(UNET, norm_num_groups=1),
        vae=ONE_LEVEL,
    ),
    "head": Case(
        "depth",
        {"latent_weight": 0.0, "pixel_weights": {"mse": 1.0}, "decoder": "dpt"},
        ("unet/", "head/"),
        head_loss,
        unet=TWO_LEVELS,
        head=HEAD,
    ),
}


@pytest.fixture(scope="module")
def one_thread():
    """Torch's threads wait for each other where others work."""
    threads = torch.get_num_threads()
    yield torch.set_num_threads(1)
    torch.set_num_threads(threads)


# ---- both sides ----------------------------------------------------------------------------------


def draw_batch(rng):
    """Depth and normals with holes, one image without any valid pixel."""
    valid = rng.random((ROWS, *SIZE, 1)) > 0.1
    valid[1, 4:11, 8:19] = False
    valid[2] = rng.random() < 0.5
    depth = rng.gamma(2.0, 2.0, (ROWS, *SIZE, 1)) + 0.5
    # All of an image about alike, lest the pixels' gradients cancel until rounding remains.
    normals = rng.normal(size=(ROWS, 1, 1, 3)) + 0.3 * rng.normal(size=(ROWS, *SIZE, 3))
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    normals[rng.random((ROWS, *SIZE)) < 0.1] = 0
    return {
        "rgb": rng.uniform(-1, 1, (ROWS, *SIZE, 3)).astype(np.float32),
        "depth": depth.astype(np.float32),
        "depth_range": np.quantile(depth, (0.02, 0.98), axis=(1, 2, 3)).T.astype(np.float32),
        "normals": normals.astype(np.float32),
        "valid": valid,
        "index": rng.permutation(ROWS).astype(np.int32),
    }


def draw_networks(case, rng):
    """Those of diffusers and transformers."""
    make = {"unet": UNet2DConditionModel.from_config, "vae": AutoencoderKL.from_config}
    nets = {k: make[k](case.components[k].to_dict()) for k in ("unet", "vae")}
    if case.head is not None:
        keys = "neck_hidden_sizes fusion_hidden_size add_projection use_bias_in_fusion_residual"
        nets["head"] = TorchHead(**{k: case.head.to_dict()[k] for k in keys.split()})
    for net in nets.values():
        randomise(net, rng)
    if case.head is not None:
        # Far above all targets: of errors of both signs, rounding at the ReLUs would remain.
        nets["head"].head.head[4].bias += 5
    return nets


def derive(case, nets, batch, timesteps, context, dtype):
    """The loss at a precision; the gradients are then in the networks returned."""

    cast = lambda x: x.astype(dtype) if x.dtype == np.float32 else x  # noqa: E731
    nets = {name: copy.deepcopy(net).requires_grad_(True) for name, net in nets.items()}
    context = torch.tensor(cast(context)).repeat(ROWS, 1, 1)
    for net in nets.values():
        for parameter in net.parameters():
            parameter.data = parameter.data.to(context.dtype)
    loss = case.loss(nets, {k: cast(x) for k, x in batch.items()}, torch.tensor(timesteps), context)
    loss.backward()
    return loss.item(), nets


def worst(case, left, right):
    """The largest difference of two gradients in torch, relative to each tensor's largest entry."""
    parts = {name.partition("/")[0] for name in case.trainable}
    exact = {(k, n): p.grad for k in parts for n, p in right[k].named_parameters()}
    return max(
        float((p.grad - exact[k, n]).abs().max() / exact[k, n].abs().max())
        for k in parts
        for n, p in left[k].named_parameters()
        if exact[k, n] is not None and exact[k, n].any() and not n.endswith("to_k.bias")
    )


def ported(shapes, module, read):
    """What `read` gives of a torch module's parameters, for the paths of `shapes`."""
    wanted = {rules.torch_name(path, len(shape.shape)) for path, shape in shapes.items()}
    tensors = {n: read(p).numpy() for n, p in module.named_parameters() if n in wanted}
    return rules.to_jax(shapes, tensors)


@pytest.fixture(scope="module", params=CASES)
def case(request):
    """`(case, method, step)`: the loss and the gradients, compiled once for all seeds."""
    chosen = CASES[request.param]
    options = {"name": "one_step", **chosen.options}
    described = tiny_model.description(
        components=chosen.components, task=chosen.task, method=options
    )
    method = build_method(described)

    @jax.jit
    def step(trainable, frozen, batch, key):
        def loss(trainable):
            return method.loss(merge_params(frozen, trainable), batch, key)[0]

        return jax.value_and_grad(loss)(trainable)

    return chosen, method, step


def draw(case, timesteps_of, rng):
    """Networks, inputs, and the loss and the gradients in float64.

    They are drawn until float32 can tell: in many small random networks rounding alone moves
    torch's own gradients by more than 1e-4.
    """
    for _ in range(40):
        nets, batch = draw_networks(case, rng), draw_batch(rng)
        key = jax.random.key(int(rng.integers(2**31)))
        context = 1.5 * normal(rng, 1, 4, tiny_model.WIDTH)
        inputs = batch, timesteps_of(key, batch), context
        try:
            loss, exact = derive(case, nets, *inputs, np.float64)
            rounded = derive(case, nets, *inputs, np.float32)[1]
        except Kink:
            continue
        if worst(case, rounded, exact) < 3e-5:
            return nets, batch, key, context, loss, exact
    raise AssertionError("no well-conditioned problem was drawn")


@pytest.mark.parametrize("seed", range(4))
def test_a_step_is_that_of_torch_in_float64(case, rng, seed):
    # Of many draws with a head, one has a ReLU on whose two sides ours and the exact one lie.
    for _ in range(3 if case[0].head is not None else 1):
        wrong = differences(*case, rng)
        if not wrong:
            break
    assert not wrong


def differences(chosen, method, step, rng):
    """Parameters whose gradients are not those of torch: (component, path, relative error)."""

    def timesteps_of(key, batch):
        key_t, index = jax.random.split(key)[0], jnp.asarray(batch["index"])
        return np.asarray(sample_timesteps(method.timesteps, key_t, index, GENPERCEPT))

    nets, batch, key, context, expected, exact = draw(chosen, timesteps_of, rng)
    networks = {name: getattr(method.model, name) for name in nets}
    params = {
        name: ported(network.shapes, nets[name], lambda p: p.detach())
        for name, network in networks.items()
    }
    params["prompt"] = {"embedding": context}
    loss, gradients = step(*split_params(params, chosen.trainable), batch, key)

    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == {part.partition("/")[0] for part in chosen.trainable}
    wrong = []
    for name, ours in gradients.items():
        shapes = {path: networks[name].shapes[path] for path in ours}
        theirs = ported(shapes, exact[name], lambda p: p.grad)
        most = max(np.abs(x).max() for x in theirs.values())
        for path, gradient in ours.items():
            largest = np.abs(theirs[path]).max()
            error = np.abs(np.asarray(gradient, np.float64) - theirs[path]).max()
            if path.endswith("to_k.bias"):  # cancels in the softmax
                assert largest < 1e-12 * most, path
                assert error < 1e-6 * most, path
            elif error > 1e-4 * largest:
                wrong.append((name, path, error / largest))
    return wrong
