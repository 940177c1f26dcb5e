r"""Fine-tune a latent diffusion checkpoint for perception.

    python -m jaxpercept.train --config=configs/depth.py
    python -m jaxpercept.train --config=configs/depth.py:nyuv2 --config.data_dir=DIR
    python -m jaxpercept.train --config=configs/depth.py --workdir=runs/mine --config.steps=500
    JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=16 python -m jaxpercept.train --config=configs/depth.py \
        --config.mesh.fsdp=16 --dry_run

The part after the colon names a preset; `--config.KEY=VALUE` changes any key of the config. The
same command again continues the run in its workdir, also after a crash. Several hosts (TPU pods,
SLURM, GKE, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID) find each other.
"""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import jax
from absl import flags, logging
from ml_collections import config_flags

from jaxpercept import cli
from jaxpercept.inference.observers import evaluation_observer, picture_observer
from jaxpercept.methods import PERCEPTION
from jaxpercept.training.dry_run import dry_run, report
from jaxpercept.training.loop import Interrupted, Observer, train

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
    observer: Callable[..., Observer] | None = picture_observer
    if config.method.name in PERCEPTION:
        observer = functools.partial(evaluation_observer, workdir=workdir)
    if not config.evaluation.dataset:
        observer = None
    try:
        train(config, workdir, observer=observer)
    except Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        return 128 + signal.SIGTERM
    logging.info("done: %s", workdir)
    return 0


if __name__ == "__main__":
    cli.run(main, required=REQUIRED, flag_values=FLAGS)
