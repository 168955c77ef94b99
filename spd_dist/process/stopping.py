"""What every loop of a run asks: was any rank asked to stop? By a signal, a file, or the time limit (`signals`)."""

from __future__ import annotations

import os
from pathlib import Path

from spd_dist.config import Distributed
from spd_dist.distributed.collectives import any_rank, gather_objects
from spd_dist.errors import StopRequested
from spd_dist.process.signals import STOP_FILE, StopSignals, seconds_between_looks, stop_file, touched


def watch(signals: StopSignals, folder: Path, task_index: int | None = None) -> None:
    """From here on, to touch the stop file of `folder`, or that of its task, is a request. A collective.

    A file that lies there already was for an earlier attempt. A network file system may show it late to some ranks, so
    what counts is the last time that any of them sees.
    """
    files = [folder / STOP_FILE, folder / stop_file(task_index)]
    seen = gather_objects([touched(file) for file in files])
    signals.seconds_between = seconds_between_looks(len(seen))
    signals.watch({file: max(times) for file, times in zip(files, zip(*seen, strict=True), strict=True)})


class Stopping:
    """The requests that this process heeds. Every method but `stop_alone` is a collective."""

    def __init__(self, signals: StopSignals, folder: Path, task_index: int | None, config: Distributed) -> None:
        """Watch the files of a job, and take the time limit.

        A stop file in `folder`, where the job works, stops it; a task of an array has one of its own.
        """
        self.signals = signals
        self.own = folder / stop_file(task_index)
        watch(signals, folder, task_index)
        signals.limit(os.environ, config.time_limit_seconds, config.time_margin_seconds)

    def should_stop(self) -> bool:
        """Whether any rank was asked to stop: all ranks hear the same, so that they stop at the same unit."""
        return self._reason() is not None

    def stop_if_asked(self) -> None:
        """Raise `StopRequested` on every rank if any was asked to stop."""
        reason = self._reason()
        if reason is not None:
            stop = _request(reason)
            stop.is_shared = True
            raise stop

    def stop_alone(self) -> None:
        """Raise `StopRequested` on this rank if it was asked to stop, and ask the others: not within a collective."""
        reason = self.signals.reason()
        if reason is not None:
            self.own.write_text(f"{reason}\n", encoding="utf-8")
            raise _request(reason)

    def _reason(self) -> str | None:
        """The first rank's, on every rank."""
        own = self.signals.reason()
        return next(filter(None, gather_objects(own))) if any_rank(own is not None) else None


def _request(reason: str) -> StopRequested:
    return StopRequested(f"stopped on request ({reason}); start the same command again to go on")
