"""The file that says how a run stands: what a batch script reads instead of a launcher's exit code."""

import dataclasses
import socket
import subprocess
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch

from spd_dist.distributed.heartbeat import TITLE, Heartbeat
from spd_dist.distributed.world import World
from spd_dist.errors import ConfigError, DataError, StopRequested
from spd_dist.storage import restart
from spd_dist.storage.records import write_record
from spd_dist.storage.restart import Status, kept_status, read_status

WORLD = World(0, 2, torch.device("cpu"))


def kept_in(folder: Path, world: World = WORLD) -> AbstractContextManager[None]:
    return kept_status(folder / "status.json", Heartbeat(folder.parent / "heartbeat", world), "evaluate")


def test_a_run_that_ends_well_is_complete_and_was_running_before(tmp_path):
    assert read_status(tmp_path) is None
    with kept_in(tmp_path):
        assert read_status(tmp_path).state == "running"
    status = read_status(tmp_path)
    assert (status.state, status.until, status.world_size) == ("complete", "evaluate", 2)


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (StopRequested("stopped on request (SIGUSR1)"), "stopped", "stopped on request (SIGUSR1)"),
        (DataError("rows are missing"), "failed", "DataError: rows are missing"),
        (KeyboardInterrupt(), "failed", "KeyboardInterrupt: "),
    ],
)
def test_the_reason_of_an_end_is_kept_and_the_error_goes_on(tmp_path, error, state, reason):
    with pytest.raises(type(error)), kept_in(tmp_path):
        raise error
    assert (read_status(tmp_path).state, read_status(tmp_path).reason) == (state, reason)


def test_a_second_process_at_the_same_work_is_refused_and_one_that_was_killed_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(restart, "SECONDS_TO_END", 0.5)
    with subprocess.Popen(["sleep", "60"]) as other:
        at_work = Status("running", "", time.time(), "evaluate", 2, socket.gethostname(), other.pid, None)
        write_record(tmp_path / "status.json", at_work)
        with (
            pytest.raises(ConfigError, match=rf"run_dir: .* is at work: process {other.pid} of this host"),
            kept_in(tmp_path),
        ):
            pass
        assert read_status(tmp_path) == at_work
        for gone in ({"time": time.time() - 3600}, {"host": "elsewhere"}, {"state": "failed"}):  # a number used again
            write_record(tmp_path / "status.json", dataclasses.replace(at_work, **gone))
            with kept_in(tmp_path):
                pass
        write_record(tmp_path / "status.json", at_work)
        other.kill()
    with kept_in(tmp_path):
        pass


def test_a_status_that_is_torn_keeps_no_run_from_going_on(tmp_path):
    (tmp_path / "status.json").write_text('{"schema": 3, "sta')
    with kept_in(tmp_path):
        pass
    assert read_status(tmp_path).state == "complete"


def test_a_disk_that_failed_does_not_hide_why(tmp_path):
    folder = tmp_path / "run"

    def fail() -> None:
        (folder / "status.json").unlink()
        folder.rmdir()
        folder.touch()
        raise RuntimeError("the cause")

    with pytest.raises(RuntimeError, match="the cause") as caught, kept_in(folder):
        fail()
    assert any(note.startswith(TITLE) for note in caught.value.__notes__), "and where ranks were is said"


def test_only_rank_0_writes(tmp_path):
    with kept_in(tmp_path, World(1, 2, torch.device("cpu"))):
        pass
    assert not (tmp_path / "status.json").exists()
