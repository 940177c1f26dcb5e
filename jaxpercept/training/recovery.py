"""Steps whose loss or gradient is not finite: left out, and after several, gone back from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from jaxpercept.errors import UserError

_ADVICE = (
    "start anew in another --workdir with a lower config.optimizer.learning_rate or with "
    "config.optimizer.clip_norm=1."
)


class Diverged(Exception):
    """So many steps in a row were not finite that the run goes back to its last checkpoint."""


class Recovery:
    """Counts steps that are not finite and decides what to do.

    The train step itself leaves their gradients out, so that weights stay finite. This says so in
    the log, with the examples that took part, and ends what does not get better.

    Args:
        skips: so many in a row are left out; the next one raises `Diverged`.
        rollbacks: so often in a run; then it raises a UserError.
    """

    def __init__(self, skips: int, rollbacks: int):
        self.skips, self.rollbacks = skips, rollbacks
        self.skipped, self._in_a_row = 0, 0

    def look(self, step: int, metrics: Mapping[str, Any], index: np.ndarray) -> None:
        """Look at the metrics of the next step.

        Args:
            step, metrics: its number; its `loss` and `grad_norm`, on the host.
            index: where this process's examples of its batch lie in the global stream.

        Raises:
            Diverged: it is one too many in a row.
            UserError: so it is, and the run may not go back again.
        """
        name = not_finite(metrics)
        if name is None:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        self.skipped += 1
        complaint = f"the {name} is not finite at step {step}"
        if self._in_a_row > self.skips:
            self._in_a_row = 0
            if not self.rollbacks:
                raise UserError(f"{complaint}: {_ADVICE}")
            self.rollbacks -= 1
            raise Diverged(complaint)
        logging.warning(
            "%s: its gradient is left out. Examples: %s", complaint, ", ".join(map(str, index))
        )


def not_finite(metrics: Mapping[str, Any]) -> str | None:
    """The name of the metric that is not finite, if one of those that decide is not."""
    return next((n for n in ("loss", "grad_norm") if not np.isfinite(metrics[n])), None)


def nowhere_to_go(error: Diverged) -> UserError:
    """What to raise where there is no checkpoint to go back to."""
    return UserError(f"{error}, before the first checkpoint: {_ADVICE}")
