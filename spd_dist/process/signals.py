"""Requests to stop: a signal, a file, or the time limit. Imports nothing heavy: handlers must stand before torch loads.

SLURM can send its warning signal at once after the start, and a process without a handler dies of it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import FrameType

STOP_FILE = "PREEMPT"
"""To touch a file of this name in the run folder stops the run at its next unit, on all ranks, with exit code 75."""

INTERRUPTED = b"\nSIGINT: stopping at the next unit, where the same command goes on; another Ctrl-C ends it at once\n"


def task_name(task_index: int) -> str:
    """What files of a task carry in their names, where the tasks of an array share a folder."""
    return f"task-{task_index:05d}"


def stop_file(task_index: int | None = None) -> str:
    """The name of the stop file, or of the one for a single task of an array."""
    return STOP_FILE if task_index is None else f"{STOP_FILE}.{task_name(task_index)}"


def touched(file: Path) -> int:
    """When a file was last touched, in nanoseconds by the clock of its file system; 0 if there is none.

    A network file system that fails for a moment must not end a rank: what it does not show was not touched.
    """
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


def seconds_between_looks(num_ranks: int) -> float:
    """How seldom each of so many ranks looks at the stop files: beyond a node's they would load the file system."""
    return 0.0 if num_ranks <= 8 else min(20.0, 0.3 * num_ranks)


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
        self.watched: dict[Path, int] = {}
        """Stop files, and when each was last touched before it was watched."""
        self.seconds_between = 0.0
        """Between two looks at the stop files."""
        self._looked = float("-inf")
        self._arriving: int | None = None
        self._arrived = b""

    def install(self) -> None:
        """Take SIGTERM, SIGUSR1 and a first SIGINT as requests; a second SIGINT, of Ctrl-C, ends this process at once.

        Others that come again change nothing: launchers and SLURM send their own. A job that was started in the
        background ignores SIGINT, and goes on doing so.
        """
        signal.signal(signal.SIGTERM, self._remember)
        signal.signal(signal.SIGUSR1, self._remember)
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, self._remember_once)
            self._arriving, end = os.pipe()
            os.set_blocking(self._arriving, False)
            os.set_blocking(end, False)
            signal.set_wakeup_fd(end, warn_on_full_buffer=False)

    def is_interrupted(self) -> bool:
        """Whether a SIGINT came. Other threads know by it at once, the handler runs when a library's call returns."""
        if self._arriving is not None:
            with suppress(BlockingIOError):
                self._arrived += os.read(self._arriving, 64)
        return signal.SIGINT in self._arrived

    def limit(self, environment: Mapping[str, str], limit_seconds: float | None, margin_seconds: float) -> None:
        """Make the time limit, counted from the start of this process, a request, too."""
        end = float(environment["SLURM_JOB_END_TIME"]) if "SLURM_JOB_END_TIME" in environment else None
        allowed = seconds_allowed(end, limit_seconds, margin_seconds, started=self.started)
        self.deadline = None if allowed is None else self.started + allowed

    def watch(self, files: Mapping[Path, int]) -> None:
        """Make it a request to touch one of these files after the time that is given for it.

        So each process of an array finds out by itself which requests are old, and none removes a file that others have
        to see; and no two clocks are compared. What is watched already keeps its time.
        """
        for file, before in files.items():
            self.watched.setdefault(file, before)

    def reason(self) -> str | None:
        """Why this process should stop now, or None."""
        if self.received:
            return self.received[0]
        if self.deadline is not None and time.time() >= self.deadline:
            return "the time limit"
        now = time.monotonic()
        if now - self._looked < self.seconds_between:
            return None
        self._looked = now
        return next((f"the file {file}" for file, before in self.watched.items() if touched(file) > before), None)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received.append(signal.Signals(number).name)

    def _remember_once(self, number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        self._remember(number, frame)
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            with suppress(OSError):  # the terminal may be gone
                os.write(2, INTERRUPTED)
