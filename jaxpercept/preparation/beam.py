"""Running work on Apache Beam: in this process, in several of this machine, or anywhere."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxpercept.errors import UserError


def run(
    work: Callable[[int], None], items: Sequence[int], *, workers: int, options: str, log: Path
) -> None:
    """Calls `work` for all items, in any order, on the workers of a runner.

    Args:
      work: picklable; what it raises ends the run.
      workers: processes of this machine; 1 is this one.
      options: of Beam, which name another runner; then `workers` is of no importance.
      log: file for what the processes of this machine say.

    Raises:
      UserError: Beam is not installed, or does not take the options, or a run on other processes
        failed.
    """
    beam = _import_beam()
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner
    from apache_beam.transforms.environments import SubprocessSDKEnvironment

    own_processes = not options and workers > 1
    runner = None
    if own_processes:
        # Beam's workers say much on stderr.
        command = f"{shlex.quote(sys.executable)} -m apache_beam.runners.worker.sdk_worker_main"
        runner = FnApiRunner(
            SubprocessSDKEnvironment.from_command_string(
                f"{command} >> {shlex.quote(str(log))} 2>&1"
            )
        )
    elif not options:
        runner = FnApiRunner()
    flags = shlex.split(options) or [f"--direct_num_workers={workers}"]
    try:
        with beam.Pipeline(runner=runner, options=PipelineOptions(flags)) as pipeline:
            shards = pipeline | "items" >> beam.Create(items) | "spread" >> beam.Reshuffle()
            shards | "work" >> beam.Map(work)
    except SystemExit as error:  # of Beam's own parser, which has said why
        raise UserError(f"Beam does not take the options {options!r}; see above.") from error
    except Exception as error:
        if _interrupted(error):
            raise KeyboardInterrupt from error
        if runner is not None and not own_processes:
            raise  # from this process: the traceback says where
        where = f"; the workers' log is {log}" if own_processes else ""
        raise UserError(f"The run on Beam failed ({_last_line(error)}){where}.") from error


def _import_beam():
    # It warns of parts of Google's cloud that are not installed, on import and in every run.
    logging.getLogger("apache_beam").setLevel(logging.ERROR)
    logging.disable(logging.WARNING)
    try:
        import apache_beam
        import apache_beam.runners.portability.fn_api_runner
    except ImportError as error:
        raise UserError(
            "Preparing needs Apache Beam; install it with `pip install 'jaxpercept[prepare]'`."
        ) from error
    finally:
        logging.disable(logging.NOTSET)
    return apache_beam


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is what Beam has made an error of its own of."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
