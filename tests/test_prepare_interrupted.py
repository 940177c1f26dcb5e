"""Preparations that are stopped, run out of disk, or run in several processes."""

import signal
import subprocess
import sys
import time

import pytest
from preparing import assert_same_records, folder_of

from jaxpercept.data.datasets import open_dataset
from jaxpercept.data.prepared import read_header
from jaxpercept.errors import UserError
from jaxpercept.preparation import shards
from jaxpercept.preparation.pipeline import prepare


def hashes(folder):
    splits = read_header(folder)["splits"]
    return {split: facts["shard_sha256"] for split, facts in splits.items()}


def test_only_what_is_missing_is_written_again(tmp_path, rng, monkeypatch):
    folder_of(tmp_path / "raw", rng)
    arguments = ("folder", tmp_path / "raw", tmp_path / "to")
    folder = prepare(*arguments, shard_size=2)
    before = hashes(folder)
    calls = []
    write = shards._write_records
    monkeypatch.setattr(
        shards, "_write_records", lambda plan, shard: calls.append(shard) or write(plan, shard)
    )
    assert prepare(*arguments, shard_size=2) == folder
    assert calls == []
    files = sorted(folder.glob("*array_record*"))
    files[1].write_bytes(files[1].read_bytes()[:-1])  # torn
    files[2].unlink()
    (folder / "progress/all-00003.json").write_text('{"finger')
    with pytest.raises(UserError, match="prepare it again"):
        open_dataset("folder", data_dir=tmp_path / "to")[0]
    prepare(*arguments, shard_size=2)
    assert sorted(calls) == [1, 2, 3]
    assert hashes(folder) == before
    with pytest.raises(UserError, match="of other files or flags; choose another"):
        prepare(*arguments, shard_size=3)
    with pytest.raises(UserError, match="not folder with"):
        prepare(*arguments, targets=[])


# What is started in the background of a shell ignores SIGINT.
_SLOW = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from jaxpercept.preparation import shards
from jaxpercept import cli, prepare
check = shards.check
shards.check = lambda record: time.sleep(0.2) or check(record)
cli.run(prepare.main, required=prepare.REQUIRED, flag_values=prepare.FLAGS)
"""


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_preparation_goes_on(tmp_path, rng, kill):
    folder_of(tmp_path / "raw", rng)
    whole = prepare("folder", tmp_path / "raw", tmp_path / "whole", shard_size=2)
    to = tmp_path / "to"
    flags = ["--dataset=folder", f"--from={tmp_path / 'raw'}", f"--to={to}", "--shard_size=2"]
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", _SLOW, *flags])
    folder, deadline = to / "folder/1.0.0", time.monotonic() + 120
    while len(list(folder.glob("progress/*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(kill)
    assert process.wait(60) == (-9 if kill == signal.SIGKILL else 130)
    done = len(list(folder.glob("progress/*.json")))
    assert 2 <= done < 4
    with pytest.raises(UserError, match="not prepared completely"):
        open_dataset("folder", data_dir=to)
    prepare("folder", tmp_path / "raw", to, shard_size=2)
    assert hashes(folder) == hashes(whole)
    raw = open_dataset("folder", data_dir=tmp_path / "raw")
    assert_same_records(open_dataset("folder", data_dir=to), raw)


_SMALL_FILES = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, 70_000))
from jaxpercept import cli, prepare
cli.run(prepare.main, required=prepare.REQUIRED, flag_values=prepare.FLAGS)
"""


def test_a_full_disk_is_named_and_nothing_is_lost(tmp_path, rng):
    folder_of(tmp_path / "raw", rng, count=4, size=(120, 160))
    to = tmp_path / "to"
    flags = ["--dataset=folder", f"--from={tmp_path / 'raw'}", f"--to={to}", "--shard_size=2"]
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _SMALL_FILES, *flags],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    assert process.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "array_record" in process.stderr
    assert "Traceback" not in process.stderr
    assert not list((to / "folder/1.0.0").glob("*writing*"))
    prepare("folder", tmp_path / "raw", to, shard_size=2)
    raw = open_dataset("folder", data_dir=tmp_path / "raw")
    assert_same_records(open_dataset("folder", data_dir=to), raw)


def test_several_processes_write_the_same(tmp_path, rng, capfd):
    folder_of(tmp_path / "raw", rng)
    one = prepare("folder", tmp_path / "raw", tmp_path / "one", shard_size=2)
    two = prepare("folder", tmp_path / "raw", tmp_path / "two", shard_size=2, workers=2)
    assert hashes(one) == hashes(two)
    assert (two / "progress/workers.log").stat().st_size > 0
    assert capfd.readouterr().err == ""
