r"""Fine-tune a latent diffusion checkpoint for perception.

    python -m jaxpercept.train --config=configs/depth.py
    python -m jaxpercept.train --config=configs/depth.py:nyuv2 --config.data_dir=DIR
    python -m jaxpercept.train --config=configs/depth.py --workdir=runs/mine --config.steps=500
    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=16 python -m jaxpercept.train --config=configs/depth.py \
        --config.mesh.fsdp=16 --dry_run

The part after the colon names a preset; `--config.KEY=VALUE` changes any key of the config. The
same command again continues the run in its workdir, also after a crash. Several hosts (TPU pods,
SLURM, GKE, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID) find each other.

In Python, with the files of `configs/` where modules are looked for:

    from configs import depth
    from jaxpercept.train import train

    train(depth.get_config("nyuv2"), "runs/mine")
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from pathlib import Path

import jax
from absl import flags, logging
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from jaxpercept import cli
from jaxpercept.inference.observers import evaluation_observer, picture_observer
from jaxpercept.methods import PERCEPTION
from jaxpercept.training import loop
from jaxpercept.training.dry_run import dry_run, report
from jaxpercept.training.step import State

FLAGS = flags.FlagValues()
config_flags.DEFINE_config_file(
    "config", None, "A file of configs/, FILE[:PRESET].", flag_values=FLAGS
)
flags.DEFINE_string(
    "workdir",
    None,
    "Where the run lives; default: runs/FILE[-PRESET]. Continued if it exists.",
    flag_values=FLAGS,
)
flags.DEFINE_boolean(
    "dry_run",
    False,
    "Compile the step, say what memory it needs and what it sends, and stop. With "
    "JAX_NUM_CPU_DEVICES=N and JAX_PLATFORMS=cpu: for N devices that are not there.",
    flag_values=FLAGS,
)
OWN_FLAGS = tuple(FLAGS)
REQUIRED = ("config",)


def default_workdir(config_file: str) -> Path:
    """`configs/depth.py:nyuv2` -> `runs/depth-nyuv2`."""
    file, _, preset = config_file.partition(":")
    return Path("runs") / "-".join(filter(None, [Path(file).stem, preset]))


def train(
    config: ConfigDict, workdir: str | os.PathLike[str], *, mesh: Mesh | None = None
) -> State:
    """Train as `config` says, or continue what `workdir` holds, and evaluate.

    Args:
        config: of a file of `configs/`, or `jaxpercept.config.base_config()` with changes.
        workdir: where the run lives (docs/architecture.md has its files).
        mesh: None for all devices, arranged as `config.mesh` says.

    Returns:
        The final state.

    Raises:
        UserError, Interrupted: as `training.loop.train`.
    """
    workdir = Path(workdir)
    observer = picture_observer
    if config.method.name in PERCEPTION:
        observer = functools.partial(evaluation_observer, workdir=workdir)
    if not config.evaluation.dataset:
        observer = None
    return loop.train(config, workdir, observer=observer, mesh=mesh)


def main() -> int:
    """Read the flags, train, evaluate.

    Returns:
        The exit status: 143, as for a process that SIGTERM ended, where SIGTERM came.
    """
    config = FLAGS.config
    name = config_flags.get_config_filename(FLAGS["config"])
    cli.initialize_distributed()
    workdir = Path(FLAGS.workdir) if FLAGS.workdir else default_workdir(name)
    logging.info("%d device(s): %s", jax.device_count(), jax.devices()[0].device_kind)
    if FLAGS.dry_run:
        print(report(dry_run(config)))
        return 0
    try:
        train(config, workdir)
    except loop.Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        return 128 + signal.SIGTERM
    logging.info("done: %s", workdir)
    return 0


if __name__ == "__main__":
    cli.run(main, required=REQUIRED, flag_values=FLAGS)
