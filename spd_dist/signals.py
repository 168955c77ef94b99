"""Requests to stop: a signal, a file, or the time limit. Imports nothing heavy: handlers must stand before torch loads.

SLURM can send its warning signal at once after the start, and a process without a handler dies of it.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

STOP_FILE = "PREEMPT"
"""A file of this name in the run folder stops the run at its next unit, on all ranks, with exit code 75."""


def stop_file(task_index: int | None = None) -> str:
    """The name for one job alone, where the tasks of an array share a run folder."""
    return STOP_FILE if task_index is None else f"{STOP_FILE}.task-{task_index:05d}"


def seconds_allowed(
    end: float | None, limit_seconds: float | None, margin_seconds: float, *, started: float
) -> float | None:
    """How long after `started` to stop: by the limit, else by the `end` that SLURM gives its job; less the margin.

    A margin never takes more than half: a run that always stopped at once would be requeued for ever.
    """
    if limit_seconds is None and end is not None:
        limit_seconds = end - started
    return None if limit_seconds is None else max(limit_seconds - margin_seconds, limit_seconds / 2)


class StopSignals:
    """Remembers that this process was asked to stop."""

    def __init__(self) -> None:
        self.received: list[str] = []
        self.started = time.time()
        self.deadline: float | None = None
        self.also_in: list[Path] = []
        """Other folders whose stop file counts (`watching`)."""

    def install(self) -> None:
        """Take SIGTERM and SIGUSR1 as requests. Repeated ones change nothing: launchers and SLURM send their own."""
        signal.signal(signal.SIGTERM, self._remember)
        signal.signal(signal.SIGUSR1, self._remember)

    def limit(self, environment: Mapping[str, str], limit_seconds: float | None, margin_seconds: float) -> None:
        """Make the time limit, counted from the start of this process, a request, too."""
        end = float(environment["SLURM_JOB_END_TIME"]) if "SLURM_JOB_END_TIME" in environment else None
        allowed = seconds_allowed(end, limit_seconds, margin_seconds, started=self.started)
        self.deadline = None if allowed is None else self.started + allowed

    def reason(self, *files: Path) -> str | None:
        """Why this process should stop now, or None; `files` are requests by being there."""
        if self.received:
            return self.received[0]
        if self.deadline is not None and time.time() >= self.deadline:
            return "the time limit"
        others = (folder / STOP_FILE for folder in self.also_in)
        return next((f"the file {file}" for file in (*files, *others) if file.exists()), None)

    @contextmanager
    def watching(self, folder: Path) -> Iterator[None]:
        """Within, a stop file in `folder` counts, too: that of an experiment, or of the run that a round is of."""
        self.also_in.append(folder)
        try:
            yield
        finally:
            self.also_in.remove(folder)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received.append(signal.Signals(number).name)
