"""Every preset of `configs/` builds, and each variation changes what it says and nothing else."""

from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import config_flags
from tiny_run import data_of_module  # noqa: F401

from jaxpercept import presets
from jaxpercept.checkpoints.description import Description
from jaxpercept.checkpoints.load import describe, tokenizer_folder
from jaxpercept.config import check_config
from jaxpercept.data.datasets import DATASETS
from jaxpercept.data.row import TARGETS
from jaxpercept.diffusion.timesteps import TimestepPolicy
from jaxpercept.errors import UserError
from jaxpercept.models.config import UNetConfig, VAEConfig
from jaxpercept.tasks import TASKS
from jaxpercept.training.optim import make_optimizer, split_params
from jaxpercept.training.setup import set_up

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


MODULES = {path.stem: presets.load(path) for path in CONFIGS}
PRESETS = [(stem, name) for stem, module in MODULES.items() for name in presets.names(module)]
FULL_SIZE = ("stable-diffusion-2-1", "stable-diffusion-2", "instruct-pix2pix")


@pytest.fixture(scope="module")
def sd21():
    """Stable Diffusion 2.1's networks, without weights."""
    return {
        "unet": UNetConfig.from_dict(
            {
                "block_out_channels": [320, 640, 1280, 1280],
                "attention_head_dim": [5, 10, 20, 20],
                "cross_attention_dim": 1024,
                "use_linear_projection": True,
                "sample_size": 96,
            }
        ),
        "vae": VAEConfig.from_dict(
            {
                "block_out_channels": [128, 256, 512, 512],
                "layers_per_block": 2,
                "down_block_types": ["DownEncoderBlock2D"] * 4,
                "up_block_types": ["UpDecoderBlock2D"] * 4,
            }
        ),
    }


# ---- every preset --------------------------------------------------------------------------------


def test_there_are_presets_for_every_task():
    tasks = {MODULES[stem].get_config(name).task for stem, name in PRESETS}
    parts = {name for name in TASKS if ":" in name}  # of the generalist
    assert {name for name, task in TASKS.items() if task.fields} - parts <= tasks
    assert len(PRESETS) > 80


@pytest.mark.parametrize(("stem", "name"), PRESETS)
def test_a_preset_builds(stem, name, sd21, monkeypatch):
    config = MODULES[stem].get_config(name)
    check_config(config, 1)
    used = [*config.data.mixture, config.evaluation.dataset]
    assert set(used) <= {*DATASETS, ""}
    if stem == "pretrain":
        return
    if config.checkpoint.startswith("runs/"):  # of the default config: its base's networks
        config.checkpoint = "sd-tiny"
    if config.checkpoint != "sd-tiny":
        assert config.checkpoint.rpartition("/")[2] in FULL_SIZE
        given = Description(components=dict(sd21), scheduler={})
        if TASKS[config.task].reads_text:  # what a text tower is does not matter here
            given.components["text_encoder"] = describe("sd-tiny").components["text_encoder"]
            tokenizer = tokenizer_folder("sd-tiny")
            monkeypatch.setattr("jaxpercept.training.setup.tokenizer_folder", lambda _: tokenizer)
        monkeypatch.setattr("jaxpercept.training.setup.describe", lambda *a, **k: given)
    setup = set_up(config)  # refuses losses, options, networks that do not fit
    method, model = setup.method, setup.method.model

    # Something is trained, and every expression means something.
    networks = {part: getattr(model, part) for part in ("unet", "vae", "head", "decoder")}
    if "text_encoder/" in config.trainable:
        networks["text_encoder"] = model.text_encoder
    shapes = {part: network.shapes for part, network in networks.items() if network is not None}
    trained, _ = split_params(shapes, config.trainable)
    make_optimizer(config.optimizer)[0].init(jax.tree.map(lambda s: np.zeros(()), trained))
    parts = {expression.partition("/")[0] for expression in config.random_init}
    assert parts <= set(trained)

    # The datasets have what the task reads.
    targets = set(method.task.fields) & set(TARGETS)
    for dataset in used:
        assert targets <= DATASETS[dataset].provides, dataset
        assert DATASETS[dataset].splits_with(sorted(targets)), dataset
        if method.task.name == "semantic":
            assert DATASETS[dataset].labels == method.task.palette
    if setup.description.lora and not name.startswith("sd21"):
        added = sum(np.prod(s.shape) for p, s in trained["unet"].items())
        assert added < 3 * sum(np.prod(s.shape) for s in model.unet.shapes.values())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("preset", "arguments"),
    [
        ("depth.py", {"task_options.vertical_gradient": True, "method.pixel_weights.vnl": 0.5}),
        ("normals.py:dpt", {"task_options.full_z_range": False, "method.inference_timestep": 7}),
        ("pose.py", {"task_options.sigma": 0.25, "evaluation.limit": 3}),
        ("seg.py", {"task_options.palette": "nyu40", "lora.rank": 4}),
        ("depth.py:sd21", {"data.options.hypersim.data_dir": "/h", "data_dir": "/d"}),
        ("depth.py:nyuv2", {"data.options.nyuv2.list_file": "mine.txt", "data.augment.gamma": 0.5}),
        (
            "depth.py:nyuv2",
            {"data.options.nyuv2.crop": "none", "data.options.nyuv2.max_depth": 9.0},
        ),
        (
            "depth.py",
            {"data.augment.rgb_resize": "nearest", "evaluation.processing_resolution": 64},
        ),
        ("normals.py:sd21", {"data.options.vkitti.normals_axes": "left_up_back"}),
        ("seg.py:sd21", {"data.options.genpercept.list_file": "jsons"}),
        ("pose.py:sd21", {"data.options.coco_keypoints.persons": "largest"}),
        ("pose.py", {"architecture.head.final_activation": "relu"}),
        ("ablation.py:marigold", {"method.noise_strength": 0.5, "method.output": "sample"}),
        ("ablation.py:marigold", {"method.corruption": "increasing"}),
        (
            "ablation.py:marigold",
            {"method.timesteps": "ddim:10", "method.timestep_use": "importance"},
        ),
        (
            "ablation.py:noise_0034",
            {"method.timesteps": "weighted:1,0.5,3", "method.stratified": False},
        ),
        ("depth.py", {"method.timesteps": "p2:0.5,2"}),
        ("depth.py:folder", {"data.options.folder.depth_scale": 5.0, "evaluation.limit": 2}),
        ("dis.py:masks", {"data.options.masks.held_out": 0.3}),
    ],
)
def test_what_the_docs_name_can_be_changed_on_the_command_line(monkeypatch, preset, arguments):
    """A flag changes what the config has already, and nothing else."""
    path = CONFIGS[0].parent / preset
    argv = ["train", f"--config={path}", *(f"--config.{k}={v}" for k, v in arguments.items())]
    monkeypatch.setattr("sys.argv", argv)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    values(argv)
    expected = MODULES[path.stem.partition(".")[0]].get_config(*preset.split(":")[1:])
    expected.update_from_flattened_dict(arguments)
    assert values.config.to_dict() == expected.to_dict()
    if timesteps := arguments.get("method.timesteps"):
        method = set_up(values.config).method
        assert method.timesteps == TimestepPolicy.parse(timesteps)
    if "data_dir" in arguments:
        options = values.config.data.options.to_dict()
        folders = {name: own["data_dir"] for name, own in options.items()}
        assert folders == {k: f"/{k[0] if k == 'hypersim' else 'd'}" for k in folders}
        assert set(folders) == {"hypersim", "vkitti", "nyuv2"}


def test_unknown_names_are_refused():
    with pytest.raises(
        ValueError, match=r"configs/depth\.py has the presets scenes, nyuv2, folder"
    ):
        MODULES["depth"].get_config("sd3")
    with pytest.raises(UserError, match="depth has no loss 'angular'"):
        presets.losses(presets.one_step("depth"), angular=1.0)
    weights = presets.losses(presets.one_step("depth"), mse=2.0, ssi=1.0).method.pixel_weights
    assert {k: w for k, w in weights.items() if w} == {"mse": 2.0, "ssi": 1.0}
    assert presets.losses(presets.one_step("depth"), mse=1.0).method.latent_weight == 0


def test_optimisation_of_the_paper():
    """recipes: Adam, 3e-5 falling by IterExponential over 25,000 of 30,000, batches of 32."""
    c = MODULES["depth"].get_config("sd21")
    assert (c.steps, c.batch_size, c.accumulate) == (30_000, 32, 4)
    o = c.optimizer
    assert (o.learning_rate, o.schedule, o.decay_steps) == (3e-5, "iter_exponential", 25_000)
    assert (o.final_ratio, o.warmup_steps, o.clip_norm, o.weight_decay) == (0.01, 100, 0.0, 0.0)
    weights = {k: w for k, w in c.method.pixel_weights.items() if w}
    assert weights == {"mse": 1.0, "ssi": 0.5, "grad": 2.0}
    assert c.method.latent_weight == 0
    assert c.method.timesteps == "uniform"
