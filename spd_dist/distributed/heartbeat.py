"""Where each rank was last seen, on disk: so that a collective that fails or hangs can say which rank it waits for."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spd_dist.distributed.world import World

log = logging.getLogger(__name__)

SECONDS_BETWEEN = 2.0
SECONDS_TO_DIE = 0.5
"""A killed process closes its connections a moment before it is gone."""
SILENCE_FRACTION = 0.8
"""Of the collectives' timeout: NCCL ends a process in it, without an exception that could say where ranks are."""
TITLE = "A rank that failed or lags is the likely cause. Last seen:"


class Heartbeat:
    """This rank's line in `folder/rank_00000.json`, and the reading of all ranks' lines."""

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self.world = folder, world
        self.place = "the start"
        self.beaten = time.monotonic()
        self._written = float("-inf")

    def beat(self, place: str, *, now: bool = False) -> None:
        """Say where this rank is; it reaches the disk every few seconds, or `now`."""
        self.place, self.beaten = place, time.monotonic()
        if now or self.beaten - self._written >= SECONDS_BETWEEN:
            self.write()

    def write(self) -> None:
        """Put on disk where this rank is; a disk that can't be written must not hide what else is wrong."""
        self._written = time.monotonic()
        line = {"place": self.place, "time": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
        path = self.folder / f"rank_{self.world.rank:05d}.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            beside = path.with_suffix(".partial")
            beside.write_text(json.dumps(line), encoding="utf-8")
            beside.replace(path)
        except OSError as error:
            log.warning("%s cannot be written: %s", path, error)

    def lines(self) -> list[str]:
        """One line a rank, those that are gone first, then by how long they have been silent."""
        seen = []
        for rank in range(self.world.size):
            path = self.folder / f"rank_{rank:05d}.json"
            try:
                line = json.loads(path.read_text(encoding="utf-8"))
                line = {name: kind(line[name]) for name, kind in _FIELDS.items()}
            except OSError:
                seen.append((0, float("-inf"), f"rank {rank}: never seen"))
                continue
            except (ValueError, KeyError, TypeError, RecursionError):
                seen.append((0, float("-inf"), f"rank {rank}: what it wrote to {path} cannot be read"))
                continue
            is_gone = line["host"] == socket.gethostname() and not _is_alive(line["pid"])
            state = "its process is gone" if is_gone else f"silent for {max(0, time.time() - line['time']):.0f} s"
            seen.append((not is_gone, line["time"], f"rank {rank} on {line['host']}: {state}, last at {line['place']}"))
        return [text for *_, text in sorted(seen)]

    def table(self) -> str:
        """The lines under a title."""
        return "\n".join([TITLE, *self.lines()])


_FIELDS: Mapping[str, Callable[[Any], Any]] = {"place": str, "time": float, "host": str, "pid": int}


def _is_alive(pid: int) -> bool:
    """Whether the process runs; a dead one whose parent has not noticed yet still has its folder."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


@contextmanager
def naming_lagging_ranks(heartbeat: Heartbeat) -> Iterator[None]:
    """Add to an error from a collective where each rank was last seen."""
    try:
        yield
    except RuntimeError as error:
        if not hasattr(error, "__notes__"):
            heartbeat.beat(f"{heartbeat.place}, failed", now=True)
            time.sleep(SECONDS_TO_DIE)
            error.add_note(heartbeat.table())
        raise


@contextmanager
def telling_of_silence(
    heartbeat: Heartbeat, timeout_seconds: float, tell: Callable[[str], None] = log.warning
) -> Iterator[None]:
    """Within it a rank that makes no unit for most of `timeout_seconds` says where all ranks are, once a silence."""
    ended = threading.Event()

    def watch() -> None:
        told = None
        limit = SILENCE_FRACTION * timeout_seconds
        while not ended.wait(min(limit / 4, 30)):
            beaten = heartbeat.beaten
            if beaten != told and time.monotonic() - beaten >= limit:
                told = beaten
                tell(f"no unit was done for {time.monotonic() - beaten:.0f} s. {heartbeat.table()}")

    thread = threading.Thread(target=watch, name="silence", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
