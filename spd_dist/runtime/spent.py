"""What a stage has taken so far: attempts that were stopped or failed, and tasks of an array, count like the last."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from types import TracebackType

from spd_dist.distributed.world import World
from spd_dist.errors import MissingError, UserError
from spd_dist.runtime.artifacts import read_json, write_json
from spd_dist.runtime.lock import alone_in
from spd_dist.runtime.manifests import SPENT, STARTED


class Spent:
    """A clock for one attempt: left by an exception, what it shows is kept for the next attempt.

    An attempt that is killed outright keeps nothing.
    """

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self.world = folder, world

    def __enter__(self) -> Spent:
        self.began = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            with contextlib.suppress(OSError, UserError):  # a full disk, say: that is not the error to be shown
                self.keep()

    def keep(self) -> None:
        """Add this attempt to those before, unless another task has finished the stage."""
        if self.world.is_main and (self.folder / STARTED).exists():
            with alone_in(self.folder):
                write_json(self.folder / SPENT, self.total())

    def total(self) -> dict[str, float]:
        """Wall-clock seconds, and the same times the ranks that there were, of all attempts so far."""
        seconds = time.monotonic() - self.began
        total = {"seconds": seconds, "device_seconds": seconds * self.world.size}
        with contextlib.suppress(MissingError):
            before = read_json(self.folder / SPENT)
            total = {name: value + before[name] for name, value in total.items()}
        return total
