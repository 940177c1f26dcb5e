r"""Pre-train the built-in checkpoint: a small text-to-image latent diffusion model, from scratch.

    python -m jaxpercept.pretrain --config=configs/pretrain.py --data_dir=tiny_imagenet \
        --workdir=runs/pretrain --output=jaxpercept/assets/sd-tiny

A tokenizer on the captions, the stages of the config (the autoencoder, then the UNet with the text
encoder in its latent space), and the export to a diffusers folder in float16. Each stage is a
training run like any other, so the same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging

from jaxpercept import cli
from jaxpercept.checkpoints import diffusers, diffusers_write
from jaxpercept.checkpoints.load import load_model
from jaxpercept.checkpoints.tokenizer import train_tokenizer
from jaxpercept.data.datasets import open_dataset
from jaxpercept.errors import UserError
from jaxpercept.inference.observers import picture_observer
from jaxpercept.training.loop import train

FLAGS = flags.FlagValues()
flags.DEFINE_string("config", "configs/pretrain.py", "File with get_config(stage).", FLAGS)
flags.DEFINE_string("workdir", "runs/pretrain", "Where the stages' runs live.", FLAGS)
flags.DEFINE_string("data_dir", None, "Folder of Tiny ImageNet: images.zip, classes.json.", FLAGS)
flags.DEFINE_string("output", None, "The diffusers folder to write.", FLAGS)
for _name, _default, _help in (
    ("steps", 0, "Steps of each stage, to try it out; 0: as configured."),
    ("batch_size", 0, "Images a step; 0: as configured."),
    ("num_workers", -1, "Processes that prepare data; -1: as configured."),
):
    flags.DEFINE_integer(_name, _default, _help, flag_values=FLAGS)
OWN_FLAGS = tuple(FLAGS)
REQUIRED = ("data_dir", "output")

_CAPTIONS = 4000  # of each dataset, for the tokenizer
_VOCABULARY = 1024


def pretrain(
    get_config: Any,
    stages: Sequence[str],
    *,
    data_dir: str,
    workdir: Path,
    output: Path,
    overrides: dict[str, Any] | None = None,
) -> None:
    """Run all stages.

    Args:
        get_config: stage -> config.
        stages: the autoencoder's stage, then those of the diffusion model, each from the one
            before.
        data_dir: the folder of the natural images.
        workdir: gets `tokenizer/` and a run's workdir a stage.
        output: the diffusers folder to write.
        overrides: values to change in every config.
    """
    tokenizer, before, scaling_factor = workdir / "tokenizer", "", 1.0
    if not (tokenizer / "vocab.json").exists():
        datasets = {name for stage in stages for name in get_config(stage).data.mixture}
        _train_tokenizer(tokenizer, sorted(datasets), data_dir)
    for stage in stages:
        config = get_config(stage)
        config.update({**(overrides or {}), "data_dir": data_dir, "checkpoint": before})
        if before:
            config.tokenizer = str(tokenizer)
            config.architecture.vae.scaling_factor = scaling_factor
        logging.info("stage %s: %d steps of %d", stage, config.steps, config.batch_size)
        train(config, workdir / stage, observer=picture_observer)
        if not before:
            # Latents of unit variance are what the noise schedule expects.
            scaling_factor = round(1 / _latent_std(workdir / stage), 4)
            logging.info("scaling factor of the latents: %s", scaling_factor)
        before = str(workdir / stage)

    description, params = load_model(before)
    diffusers_write.save(
        output,
        diffusers.Checkpoint(
            configs=description.components,
            params=params,
            scheduler=description.scheduler,
            tokenizer_dir=tokenizer,
        ),
        dtype="float16",
    )
    logging.info("wrote %s", output)


def _train_tokenizer(folder: Path, datasets: Iterable[str], data_dir: str) -> None:
    texts = [text for name in datasets for text in _captions(name, data_dir)]
    settings = train_tokenizer(texts, folder, vocab_size=_VOCABULARY)
    logging.info("tokenizer: %s", settings)


def _captions(dataset: str, data_dir: str) -> list[str]:
    """Captions spread evenly over a dataset."""
    records = open_dataset(dataset, data_dir=data_dir, resolution=(24, 32))
    # Neighbouring scenes are as different as any two; images of one class lie side by side.
    stride = max(min(len(records), 100_000) // _CAPTIONS, 1)
    return [records[i]["caption"] for i in range(0, _CAPTIONS * stride, stride) if i < len(records)]


def _latent_std(workdir: Path) -> float:
    """The standard deviation of the latents at the end of the autoencoder's training."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    stds = [line["latent_std"] for line in lines if "latent_std" in line][-5:]
    return sum(stds) / len(stds)


def main() -> None:
    """Read the flags and run the stages."""
    overrides: dict[str, Any] = {}
    if FLAGS.steps:
        overrides["steps"] = FLAGS.steps
    if FLAGS.batch_size:
        overrides["batch_size"] = FLAGS.batch_size
    if FLAGS.num_workers >= 0:
        overrides["data"] = {"num_workers": FLAGS.num_workers}
    if not Path(FLAGS.config).is_file():
        raise UserError(f"--config {FLAGS.config} is no file: give configs/pretrain.py.")
    module = runpy.run_path(FLAGS.config)
    pretrain(
        module["get_config"],
        module["STAGES"],
        data_dir=FLAGS.data_dir,
        workdir=Path(FLAGS.workdir),
        output=Path(FLAGS.output),
        overrides=overrides,
    )


if __name__ == "__main__":
    cli.run(main, required=REQUIRED, flag_values=FLAGS)
