"""Worker processes that die or hang: found out, ended, so that others can take their place."""

from __future__ import annotations

import math
import mmap
import multiprocessing
import multiprocessing.process
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LOOKS = 4  # in the time that is waited


class WorkersFailed(Exception):
    """The worker processes are gone; what they were asked for was not delivered."""


class Watchdog:
    """Ends the worker processes that keep this one waiting for too long.

    Args:
        seconds: how long one wait may take; 0 for ever.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._others = {child.pid for child in multiprocessing.active_children()}
        self._deadline, self._barked = math.inf, False
        self._end = threading.Event()
        if seconds:
            threading.Thread(target=self._watch, daemon=True).start()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within: waiting for worker processes that were started after this object.

        Raises:
            WorkersFailed: they were ended for taking too long, or died.
        """
        self._deadline = time.monotonic() + self.seconds if self.seconds else math.inf
        try:
            yield
        except RuntimeError as error:  # of Grain, whose workers are gone
            if self._barked:
                raise WorkersFailed(f"nothing came for {self.seconds:g} s") from error
            if "terminated unexpectedly" in str(error):
                raise WorkersFailed(str(error)) from error
            raise
        finally:
            self._deadline = math.inf

    def memory(self) -> int:
        """Bytes that all workers have in memory, 0 where the system does not say."""
        return sum(_resident(child.pid) for child in self._workers())

    def close(self) -> None:
        """Stop watching."""
        self._end.set()

    def _watch(self) -> None:
        while not self._end.wait(min(1.0, self.seconds / _LOOKS)):
            if time.monotonic() > self._deadline:
                self._barked = True
                for child in self._workers():
                    child.kill()
                return

    def _workers(self) -> list[multiprocessing.process.BaseProcess]:
        return [c for c in multiprocessing.active_children() if c.pid not in self._others]


def _resident(pid: int) -> int:
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except OSError:  # another system, or a process that has just ended
        return 0
    return int(pages) * mmap.PAGESIZE
