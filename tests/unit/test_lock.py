"""One process at a time, and none that a killed one keeps out."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import time
from pathlib import Path

import pytest
from ranks import PRELOADED

from spd_dist.distributed.lock import alone_in
from spd_dist.errors import DataError

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOADED)


def count(folder: Path, times: int) -> None:
    """A read and a write apart: two processes in here at once would lose some."""
    for _ in range(times):
        with alone_in(folder):
            number = int((folder / "count").read_text())
            time.sleep(0.0005)
            (folder / "count").write_text(str(number + 1))


def hold(folder: Path) -> None:
    with alone_in(folder):
        (folder / "held").touch()
        time.sleep(600)


def started(target: object, *arguments: object) -> multiprocessing.Process:
    process = CONTEXT.Process(target=target, args=arguments)
    process.start()
    return process


@pytest.mark.seconds
def test_processes_take_turns(tmp_path):
    folder = tmp_path / "generate"
    folder.mkdir()
    (folder / "count").write_text("0")
    processes = [started(count, folder, 50) for _ in range(3)]
    for process in processes:
        process.join()
    assert (folder / "count").read_text() == "150"


@pytest.mark.seconds
def test_a_killed_process_lets_go_and_a_living_one_does_not(tmp_path):
    folder = tmp_path / "generate"
    folder.mkdir()
    (folder / "count").write_text("0")
    holder = started(hold, folder)
    while not (folder / "held").exists():
        time.sleep(0.01)
    waiting = started(count, folder, 1)
    waiting.join(0.5)
    assert waiting.is_alive()
    assert (folder / "count").read_text() == "0"
    holder.kill()
    waiting.join(60)
    assert (folder / "count").read_text() == "1"


@pytest.mark.seconds
def test_the_folder_may_be_replaced_meanwhile(tmp_path):
    folder = tmp_path / "generate"
    with alone_in(folder):
        folder.mkdir()
        folder.rename(tmp_path / "old")
        folder.mkdir()
        other = started(hold, folder)
        other.join(0.5)
        assert not (folder / "held").exists()
    while not (folder / "held").exists():
        time.sleep(0.01)
    other.kill()
    other.join()


def test_a_file_system_without_locks_is_named_and_no_other_fault_passed_over(tmp_path, monkeypatch, caplog):
    def refuse(code: int) -> None:
        def flock(*_: object) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(fcntl, "flock", flock)

    refuse(errno.ENOSYS)
    with alone_in(tmp_path / "generate"):
        pass
    assert f"{tmp_path}/.generate.lock: this file system has no locks" in caplog.text
    refuse(errno.EIO)
    with pytest.raises(OSError, match="Input/output error"), alone_in(tmp_path / "generate"):
        pytest.fail("it went in")


def test_a_folder_that_may_not_be_written_is_named(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with (
        pytest.raises(DataError, match=r"\.generate\.lock cannot be written: Permission denied"),
        alone_in(tmp_path / "generate"),
    ):
        pytest.fail("it went in")
