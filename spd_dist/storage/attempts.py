"""What a stage takes: attempts that were stopped, failed or killed, and tasks of an array, count like the last.

Each attempt has a file of its own beside the work, rewritten while it goes on: no two processes write the same, and a
kill loses a few seconds.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from spd_dist.distributed.world import World
from spd_dist.errors import MissingError, UserError
from spd_dist.storage.artifacts import corrupt, read_json, write_json
from spd_dist.storage.manifests import STARTED

ATTEMPTS = "attempts"
SECONDS_BETWEEN = 5.0


class StageCost(NamedTuple):
    """Of all attempts at a stage so far."""

    seconds: float
    """Wall-clock time: of the tasks of an array, which may run beside each other, that of the longest."""
    device_seconds: float
    """Each attempt's seconds times its ranks."""


class AttemptClock:
    """Within, this attempt at the stage in `folder` is counted: on the main rank, in a thread."""

    def __init__(self, folder: Path, world: World, task: int | None) -> None:
        self.folder, self.world, self.task = folder, world, task
        self.file = folder / ATTEMPTS / f"{time.time_ns()}-{socket.gethostname()}-{os.getpid()}.json"
        self.is_over = threading.Event()

    def __enter__(self) -> None:
        self.began = time.monotonic()
        if self.world.is_main:
            self.thread = threading.Thread(target=self._write_often, name="attempt", daemon=True)
            self.thread.start()

    def __exit__(self, *_: object) -> None:
        if self.world.is_main:
            self.is_over.set()
            self.thread.join()
            self._write()

    def _write_often(self) -> None:
        while not self.is_over.wait(SECONDS_BETWEEN):
            self._write()

    def _write(self) -> None:
        if not (self.folder / STARTED).exists():
            return  # another task of the array has finished the stage
        spent = {"task": self.task, "seconds": time.monotonic() - self.began, "world_size": self.world.size}
        with contextlib.suppress(OSError, UserError):  # a full disk, say: the work finds out by itself
            write_json(self.file, spent)


def stage_cost(folder: Path) -> StageCost:
    """What all attempts at the stage in `folder` took."""
    by_task, device_seconds = defaultdict(float), 0.0
    for file in (folder / ATTEMPTS).glob("*.json"):
        with contextlib.suppress(MissingError):  # another task of the array has finished the stage meanwhile
            attempt = read_json(file)
            try:
                seconds, world_size, task = float(attempt["seconds"]), int(attempt["world_size"]), attempt["task"]
                by_task[task] += seconds
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise corrupt(file, error) from error
            device_seconds += seconds * world_size
    return StageCost(max(by_task.values(), default=0.0), device_seconds)


def forget_attempts(folder: Path) -> None:
    """Remove what was counted: the stage's manifest has the sum."""
    shutil.rmtree(folder / ATTEMPTS, ignore_errors=True)
