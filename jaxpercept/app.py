r"""A web page for trying models: drop an image, say what to look for, correct what was found.

    python -m jaxpercept.app --checkpoint=runs/referring
    python -m jaxpercept.app --checkpoint=runs/referring,runs/depth,runs/normals
    python -m jaxpercept.app --checkpoint=timbrooks/instruct-pix2pix --task=referring \
        --num_inference_steps=20

It needs Gradio: pip install 'jaxpercept[app]'. The page is served to this machine alone, at
http://127.0.0.1:7860; --host=0.0.0.0 serves it to everybody who reaches the machine, without a
password. Nothing is loaded from the network, and nothing is sent there. The models are compiled
before the page is ready; with JAX_COMPILATION_CACHE_DIR set, only the first time.
"""

from __future__ import annotations

import contextlib
import importlib
import socket
from collections.abc import Sequence
from typing import Any

from absl import flags, logging

from jaxpercept import cli
from jaxpercept.errors import UserError
from jaxpercept.inference.opening import DTYPES
from jaxpercept.webpage.examples import SIZE
from jaxpercept.webpage.models import open_models
from jaxpercept.webpage.models import warm_up as warm
from jaxpercept.webpage.uploads import Limits

FLAGS = flags.FlagValues()
flags.DEFINE_multi_string(
    "checkpoint",
    None,
    "What to predict with: several separated by commas, or the flag several times.",
    flag_values=FLAGS,
)
flags.DEFINE_string("host", "127.0.0.1", "Address to serve at.", flag_values=FLAGS)
flags.DEFINE_integer(
    "port",
    7860,
    "Port to serve at; 0: any that is free.",
    lower_bound=0,
    upper_bound=65535,
    flag_values=FLAGS,
)
flags.DEFINE_float("max_upload_mb", 20.0, "Largest file that is accepted.", flag_values=FLAGS)
flags.DEFINE_float(
    "max_upload_mp", 40.0, "Largest picture that is accepted, in million pixels.", flag_values=FLAGS
)
flags.DEFINE_boolean(
    "warm_up", True, "Compile before the page is ready, not at the first visit.", flag_values=FLAGS
)
cli.define_opening_flags(FLAGS)
flags.DEFINE_integer(
    "num_inference_steps", None, "Denoising steps; default: the models'.", flag_values=FLAGS
)
flags.DEFINE_integer(
    "processing_resolution",
    None,
    "Long side in pixels the networks work at; default: the models'.",
    flag_values=FLAGS,
)
flags.DEFINE_enum("dtype", "float32", DTYPES, "Compute dtype.", flag_values=FLAGS)
OWN_FLAGS = tuple(FLAGS)
REQUIRED = ("checkpoint",)
_OPENING = ("task", "family", "base", "vae", "decoder", "lora")


def app(
    checkpoint: str | Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    max_upload_mb: float = 20.0,
    max_upload_mp: float = 40.0,
    warm_up: bool = True,
    num_inference_steps: int | None = None,
    processing_resolution: int | None = None,
    **opening: Any,
) -> None:
    """Serve the page until Ctrl-C.

    Args:
        checkpoint, host, port, max_upload_mb, max_upload_mp: the flags of these names.
        warm_up, num_inference_steps, processing_resolution, opening: likewise.

    Raises:
        UserError: Gradio is missing, an address is taken, or a model cannot be opened.
    """
    given = [checkpoint] if isinstance(checkpoint, str) else checkpoint
    names = [name for part in given for name in part.split(",") if name]
    told = [name for name in _OPENING if opening.get(name) is not None]
    if len(names) > 1 and told:
        raise UserError(f"--{told[0]} speaks of one checkpoint: leave it out, or give one alone.")
    limits = Limits(max_upload_mb, max_upload_mp)
    with listen(host, port) as listening:
        server = _import_server()
        opened = open_models(names, num_inference_steps, processing_resolution, **opening)
        if warm_up:
            for model in opened:
                for message in warm(model, SIZE):
                    logging.info(message)
        server.serve(opened, limits, listening)


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address, so that a wrong one is known before models are opened.

    Args:
        host: a name or an address; 0.0.0.0 for all of the machine's.
        port: 0 for any that is free.

    Raises:
        UserError: the address is not this machine's, or taken.
    """
    with contextlib.ExitStack() as unless_bound:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            listening = unless_bound.enter_context(socket.socket(found[0], socket.SOCK_STREAM))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(found[4])
        except OSError as error:
            raise UserError(
                f"cannot serve at {host}, port {port} ({error.strerror}): give another --host or "
                "--port."
            ) from error
        unless_bound.pop_all()
    return listening


def _import_server() -> Any:
    try:
        return importlib.import_module("jaxpercept.webpage.server")
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("gradio", "fastapi", "uvicorn"):
            raise
        raise UserError(
            "The page needs the package Gradio; install it with `pip install 'jaxpercept[app]'`."
        ) from error


def main() -> None:
    """Read the flags and serve."""
    app(**{name: FLAGS[name].value for name in OWN_FLAGS})


if __name__ == "__main__":
    cli.run(main, required=REQUIRED, flag_values=FLAGS)
