"""Requests to stop: a signal, a file, or the time limit. Imports nothing heavy: handlers must stand before torch loads.

SLURM can send its warning signal at once after the start, and a process without a handler dies of it.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

STOP_FILE = "PREEMPT"
"""A file of this name in the run folder stops the run at its next unit, on all ranks, with exit code 75."""


class StopSignals:
    """Remembers that this process was asked to stop."""

    def __init__(self) -> None:
        self.received: list[str] = []
        self.started = time.monotonic()
        self.also_in: list[Path] = []
        """Other folders whose stop file counts (`watching`)."""

    def install(self) -> None:
        """Take SIGTERM and SIGUSR1 as requests; a second SIGTERM ends the process at once."""
        signal.signal(signal.SIGTERM, self._remember)
        signal.signal(signal.SIGUSR1, self._remember)

    def reason(self, run_dir: Path, limit_seconds: float | None = None) -> str | None:
        """Why this process should stop now, or None."""
        if self.received:
            return self.received[0]
        for folder in (run_dir, *self.also_in):
            if (folder / STOP_FILE).exists():
                return f"the file {folder / STOP_FILE}"
        if limit_seconds is not None and time.monotonic() - self.started >= limit_seconds:
            return f"the time limit of {limit_seconds:g} s"
        return None

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
        if number == signal.SIGTERM:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
