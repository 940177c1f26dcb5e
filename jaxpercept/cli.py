"""What the commands share: flags, `--help`, and errors that read as one line."""

from __future__ import annotations

import ast
import logging as python_logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import flags, logging

from jaxpercept.diffusion.guidance import COMBINE
from jaxpercept.errors import UserError

_PACKAGE = str(Path(__file__).parent)


def run(
    main: Callable[[], int | None],
    *,
    required: Sequence[str] = (),
    flag_values: flags.FlagValues = flags.FLAGS,
) -> NoReturn:
    """Run a command and exit: `call` with this process's arguments."""
    status = call(main, sys.argv, required=required, flag_values=flag_values)
    others = set(threading.enumerate()) - {threading.main_thread()}
    if status and not all(thread.daemon for thread in others):
        # A save that failed leaves a thread of Orbax behind, which waits for minutes for a signal
        # that never comes.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def call(
    main: Callable[[], int | None],
    argv: Sequence[str],
    *,
    required: Sequence[str] = (),
    flag_values: flags.FlagValues = flags.FLAGS,
) -> int:
    """Parse flags, run `main` and turn a `UserError` into one line on stderr.

    Args:
        main: the command; its module's docstring is what `--help` prints before the flags.
        argv: the program's name and its arguments.
        required: flags that must be given.
        flag_values: where the command's flags are defined. A command with flags of its own can be
            imported beside another one that uses the same names.

    Returns:
        The exit status: what `main` returns (None: 0), 1 for a user's error, 130 for Ctrl-C.
    """
    if any(argument in ("-h", "--h", "-help", "--help") for argument in argv[1:]):
        print(_help(main, flag_values))
        return 0
    try:
        _parse(argv, required, flag_values)
        show_messages()
        return int(main() or 0)
    except UserError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def define_opening_flags(flag_values: flags.FlagValues) -> None:
    """The flags that say what else belongs to a checkpoint."""
    text = {
        "task": "What the checkpoint predicts, where its files do not say: depth, disparity, "
        "normals, dis, matting, seg, semantic, referring or pose. Of a generalist: which of its "
        "tasks is wanted, depth, normals, segment, detect or referring.",
        "family": "How, where its files do not say: genpercept, rgb_blending, marigold, e2e_ft, "
        "lotus_d, lotus_g or instruct_pix2pix.",
        "base": "The text-to-image checkpoint that has what this one lacks, such as GenPercept's.",
        "vae": "An autoencoder instead of the checkpoint's own; a tiny one (TAESD) is faster.",
        "decoder": "An autoencoder that decodes instead of the checkpoint's own.",
        "lora": "Low-rank additions to the UNet, as peft or diffusers save them: a folder or file.",
    }
    for name, meaning in text.items():
        flags.DEFINE_string(name, None, meaning, flag_values=flag_values)


def define_network_flags(flag_values: flags.FlagValues) -> None:
    """The flags that say what the networks of a checkpoint read, and how."""
    flags.DEFINE_string(
        "prompt",
        "",
        "What the network reads, where there is a text encoder; default: as it was trained.",
        flag_values=flag_values,
    )
    flags.DEFINE_integer(
        "vae_tile",
        0,
        "The autoencoder works in overlapping tiles of so many pixels; 0: in one piece.",
        flag_values=flag_values,
    )
    flags.DEFINE_integer(
        "pad_multiple",
        0,
        "Pad to multiples of so many pixels, such as 64: images of many sizes then share few "
        "compiled programs, and predictions change a little; 0: as little as possible.",
        flag_values=flag_values,
    )
    text = {
        "text_guidance": "How strongly the prompt pulls, for models that look for what it names",
        "image_guidance": "How strongly the image pulls, for those of InstructPix2Pix",
    }
    for name, meaning in text.items():
        flags.DEFINE_float(name, None, f"{meaning}; default: the model's.", flag_values=flag_values)


def define_model_flags(flag_values: flags.FlagValues) -> None:
    """The flags by which commands open a checkpoint and predict with it."""
    define_opening_flags(flag_values)
    define_network_flags(flag_values)
    flags.DEFINE_integer(
        "num_inference_steps",
        None,
        "Denoising steps; default: the model's.",
        flag_values=flag_values,
    )
    flags.DEFINE_integer(
        "ensemble_size",
        1,
        "Predictions for each image that are merged into one; for models that draw noise.",
        flag_values=flag_values,
    )
    flags.DEFINE_boolean(
        "flip", False, "Also predict for the mirrored image, and merge.", flag_values=flag_values
    )
    flags.DEFINE_integer("seed", 0, "Of the noise.", flag_values=flag_values)
    flags.DEFINE_float(
        "correction_guidance",
        None,
        "How strongly a correction pushes away from what is unwanted; default: the model's.",
        flag_values=flag_values,
    )
    flags.DEFINE_enum(
        "correction",
        None,
        COMBINE,
        "How a correction goes with the other guidance, see docs/inference.md; default: add.",
        flag_values=flag_values,
    )


def own_flags(main: Callable[[], Any], flag_values: flags.FlagValues) -> list[flags.Flag]:
    """The flags of a command in the order they were defined, without those of libraries."""
    module = sys.modules[main.__module__]
    own = flag_values.flags_by_module_dict()
    names = {main.__module__, module.__name__, sys.argv[0], getattr(module, "__file__", "")}
    names.add(__name__)  # the flags that several commands share
    return [flag for name, group in own.items() if name in names for flag in group]


def integers(name: str, values: Sequence[str]) -> list[int]:
    """The whole numbers of a flag that takes a list.

    Raises:
        UserError: one of them is none, or negative.
    """
    if not all(value.isdigit() for value in values):
        raise UserError(f"--{name}={','.join(values)} are not whole numbers.")
    return [int(value) for value in values]


def key_values(flag: str, pairs: Sequence[str]) -> dict[str, Any]:
    """The KEY=VALUE pairs of a flag, values read as Python's literals or else as text.

    Raises:
        UserError: a pair is none.
    """
    values = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--{flag} {pair!r} is no KEY=VALUE.")
        try:
            values[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            values[key] = value
    return values


def height_and_width(flag: str, text: str) -> tuple[int, int]:
    """ "480x640" as (480, 640).

    Raises:
        UserError: it is none, or zero.
    """
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise UserError(f"--{flag} {text} is not HEIGHTxWIDTH: write it as 480x640.")
    return int(parts[0]), int(parts[1])


def initialize_distributed() -> None:
    """Join the other processes of a multi-process run, if this is one.

    TPU pods, SLURM and Open MPI are recognised by their environment; anywhere else set
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    if jax.distributed.is_initialized():
        return
    if "JAX_NUM_PROCESSES" in os.environ:
        jax.distributed.initialize(
            coordinator_address=os.environ["JAX_COORDINATOR_ADDRESS"],
            num_processes=int(os.environ["JAX_NUM_PROCESSES"]),
            process_id=int(os.environ["JAX_PROCESS_ID"]),
        )
        return
    sizes = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
    several = any(int(os.environ.get(name) or 1) > 1 for name in sizes)
    pod = "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_NUM_SLICES" in os.environ
    if several or pod:
        jax.distributed.initialize()


def show_messages() -> None:
    """This package's log messages, plain; other libraries' only from warnings on.

    Commands do so by themselves; in a notebook it shows how a training goes.
    """
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # absl complains of messages before that
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    handler = logging.get_absl_handler()
    handler.setFormatter(python_logging.Formatter("%(message)s"))
    handler.addFilter(_is_for_the_user)


def _parse(argv: Sequence[str], required: Sequence[str], flag_values: flags.FlagValues) -> None:
    # Libraries define flags too (absl's logging, Grain) and refuse to work before a parse.
    for name in flags.FLAGS:
        # Some are listed twice, by a short name as well.
        if name not in flag_values and name == flags.FLAGS[name].name:
            flag_values[name] = flags.FLAGS[name]
    try:
        rest = flag_values(list(argv))
    except flags.Error as error:
        raise UserError(f"{_cause(error)}: see --help.") from error
    except (AttributeError, KeyError) as error:
        # How ml_collections reports a key that a config does not have; elsewhere it is a bug.
        if "ml_collections" not in traceback.extract_tb(error.__traceback__)[-1].filename:
            raise
        raise UserError(_unknown_key(error, argv)) from error
    flags.FLAGS.mark_as_parsed()
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: options are written --name=value.")
    for name in required:
        value = flag_values[name].value
        if value is None or value == "":
            raise UserError(f"--{name} is required: see --help.")
        # ml_collections reports a missing config file when a key is first read: too late.
        if type(value).__name__ == "_ErrorConfig":
            raise UserError(f"--{name} cannot be read ({vars(value)['_error']}): see --help.")


def _cause(error: Exception) -> str:
    """The sentence that matters: config files report a whole traceback, its last line is it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and "Traceback" in str(error):
        return f"{lines[0].split(': Error')[0]} failed with {lines[-1]}"
    return " ".join(lines).rstrip(".")


def _unknown_key(error: Exception, argv: Sequence[str]) -> str:
    while isinstance(error.args[0], Exception):
        error = error.args[0]
    key, _, suggestion = str(error.args[0]).partition("\n")
    names = [argument.split("=")[0] for argument in argv[1:]]
    given = [name for name in names if name.endswith(f".{key.strip(chr(39))}")]
    return f"the config has no key {given[0] if given else key}. {suggestion}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _is_for_the_user(record: python_logging.LogRecord) -> bool:
    return record.levelno >= python_logging.WARNING or record.pathname.startswith(_PACKAGE)


def _help(main: Callable[[], Any], flag_values: flags.FlagValues) -> str:
    """The module's docstring, then its flags."""
    lines = [(sys.modules[main.__module__].__doc__ or "").strip(), "", "flags:"]
    for flag in own_flags(main, flag_values):
        default = "" if flag.default in (None, "") else f" (default: {flag.default})"
        lines.append(f"  --{flag.name}: {flag.help.strip()}{default}")
    return "\n".join(lines)
