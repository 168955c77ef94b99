"""Requests to stop: a signal, a file, or the time limit. Imports nothing heavy: handlers must stand before torch loads.

SLURM can send its warning signal at once after the start, and a process without a handler dies of it.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

STOP_FILE = "PREEMPT"
"""A file of this name in the run folder stops the run at its next unit, on all ranks, with exit code 75."""


def stop_file(task_index: int | None = None) -> str:
    """The name for one job alone, where the tasks of an array share a run folder."""
    return STOP_FILE if task_index is None else f"{STOP_FILE}.task-{task_index:05d}"


def seconds_allowed(environment: Mapping[str, str], limit_seconds: float | None, margin_seconds: float) -> float | None:
    """How long this process may still run: the limit, else what SLURM says of its job; less the margin.

    A margin never takes more than half: a run that always stopped at once would be requeued for ever.
    """
    if limit_seconds is None and "SLURM_JOB_END_TIME" in environment:
        limit_seconds = float(environment["SLURM_JOB_END_TIME"]) - time.time()
    return None if limit_seconds is None else max(limit_seconds - margin_seconds, limit_seconds / 2)


class StopSignals:
    """Remembers that this process was asked to stop."""

    def __init__(self) -> None:
        self.received: list[str] = []
        self.deadline: float | None = None
        """By the monotonic clock."""

    def install(self) -> None:
        """Take SIGTERM and SIGUSR1 as requests. Repeated ones change nothing: launchers and SLURM send their own."""
        signal.signal(signal.SIGTERM, self._remember)
        signal.signal(signal.SIGUSR1, self._remember)

    def stop_after(self, seconds: float | None) -> None:
        """Make the passing of `seconds` from now a request, too."""
        self.deadline = None if seconds is None else time.monotonic() + seconds

    def reason(self, *files: Path) -> str | None:
        """Why this process should stop now, or None; `files` are requests by being there."""
        if self.received:
            return self.received[0]
        if self.deadline is not None and time.monotonic() >= self.deadline:
            return "the time limit"
        return next((f"the file {file}" for file in files if file.exists()), None)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received.append(signal.Signals(number).name)
