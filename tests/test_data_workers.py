"""Worker processes that are killed or stopped: others take their place, and no batch is lost."""

import itertools
import logging
import multiprocessing
import os
import signal

import numpy as np
import pytest

from jaxpercept.data import pipeline
from jaxpercept.data.pipeline import make_train_dataset
from jaxpercept.errors import UserError


def batches(num_workers, seed, timeout=0.0):
    return iter(
        make_train_dataset(
            [("scenes", 1.0, {})],
            resolution=(24, 32),
            batch_size=4,
            seed=seed,
            num_workers=num_workers,
            timeout=timeout,
        )
    )


def assert_same_batches(found, expected, count):
    for _ in range(count):
        batch, other = next(found), next(expected)
        assert batch.keys() == other.keys()
        for name, value in other.items():
            np.testing.assert_array_equal(batch[name], value, err_msg=name)


def failures(caplog):
    messages = [record.getMessage() for record in caplog.records]
    return [message for message in messages if "workers failed" in message]


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)]
)
def test_workers_are_replaced(rng, caplog, number):
    seed = int(rng.integers(1000))
    found = batches(2, seed, timeout=20.0 if number == signal.SIGSTOP else 0.0)
    expected = batches(0, seed)
    assert found.worker_memory() == 0
    assert_same_batches(found, expected, 2)
    assert 2e7 < found.worker_memory() < 4e9
    assert expected.worker_memory() == 0
    os.kill(multiprocessing.active_children()[0].pid, number)
    with caplog.at_level(logging.WARNING):
        assert_same_batches(found, expected, 12)
    (message,) = failures(caplog)
    assert ("nothing came for 20 s" if number == signal.SIGSTOP else "exit code -9") in message
    assert found.get_state() == {"next_example": 4 * 14}
    found.close()
    expected.close()
    assert not multiprocessing.active_children()
    assert found.worker_memory() == 0


def test_workers_that_go_on_failing_end_the_run_with_a_sentence(rng, monkeypatch):
    monkeypatch.setattr(pipeline, "_RESTARTS", 0)
    found = batches(1, int(rng.integers(1000)))
    next(found)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"failed 1 times in a row .*num_workers=0"):
        list(itertools.islice(found, 9))
    found.close()
