"""Where each rank was last seen, on disk: so that a collective that fails can say which rank it waited for."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spd_dist.distributed.world import World

SECONDS_BETWEEN = 0.2
SECONDS_TO_DIE = 0.5
"""A killed process closes its connections a moment before it is gone."""


class Heartbeat:
    """This rank's line in `folder/rank_00000.json`, and the reading of all ranks' lines."""

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self.world = folder, world
        self._written = 0.0

    def beat(self, place: str) -> None:
        """Say where this rank is; at most a few times a second it reaches the disk."""
        if time.monotonic() - self._written < SECONDS_BETWEEN:
            return
        self._written = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        line = {"place": place, "time": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
        path = self.folder / f"rank_{self.world.rank:05d}.json"
        beside = path.with_suffix(".partial")
        beside.write_text(json.dumps(line))
        beside.replace(path)

    def lines(self) -> list[str]:
        """One line a rank, those that are gone first, then by how long they have been silent."""
        seen = []
        for rank in range(self.world.size):
            path = self.folder / f"rank_{rank:05d}.json"
            if not path.exists():
                seen.append((0, float("-inf"), f"rank {rank}: never seen"))
                continue
            line = json.loads(path.read_text())
            is_gone = line["host"] == socket.gethostname() and not _is_alive(line["pid"])
            state = "its process is gone" if is_gone else f"silent for {time.time() - line['time']:.0f} s"
            seen.append((not is_gone, line["time"], f"rank {rank} on {line['host']}: {state}, last at {line['place']}"))
        return [text for *_, text in sorted(seen)]


def _is_alive(pid: int) -> bool:
    """Whether the process runs; a dead one whose parent has not noticed yet still has its folder."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] not in "ZX"


@contextmanager
def naming_lagging_ranks(heartbeat: Heartbeat) -> Iterator[None]:
    """Add to an error from a collective where each rank was last seen."""
    try:
        yield
    except RuntimeError as error:
        time.sleep(SECONDS_TO_DIE)
        error.add_note("\n".join(["A rank that failed or lags is the likely cause. Last seen:", *heartbeat.lines()]))
        raise
