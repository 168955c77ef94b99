"""Where each rank was last seen, on disk: so that a collective that fails or hangs can say which rank it waits for."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spd_dist.distributed.world import World
from spd_dist.redaction import redacted

log = logging.getLogger(__name__)

SECONDS_BETWEEN = 10.0
SECONDS_TO_DIE = 0.5
"""A killed process closes its connections a moment before it is gone."""
CLOCK_SECONDS = 2.0
"""That two clocks of a host may differ by."""
SILENCE_FRACTION = 0.8
"""Of the collectives' timeout: NCCL ends a process in it, without an exception that could say where ranks are."""
TITLE = "A rank that failed or lags is the likely cause. Last seen:"
MOST_LINES = 7
"""With the error, the title, and a line of what is left out, ten in all."""
LINE_BYTES = 1024
"""Every line is as long, so that it can be overwritten where it stands: no other operation on the folder is needed."""


class Heartbeat:
    """This rank's line in `folder/rank_00000.json`, and the reading of all ranks' lines."""

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self.world = folder, world
        self.place = "the start"
        self.beaten = time.monotonic()
        self._written = float("-inf")
        self._file: int | None = None
        self._claim = folder / f"told-{socket.gethostname()}"

    def beat(self, place: str, *, now: bool = False) -> None:
        """Say where this rank is: on disk at once if it is the first time, or `now`; else when the watcher writes."""
        self.place, self.beaten = place, time.monotonic()
        if now or self._written < 0:
            self.write()

    def write_if_due(self) -> None:
        """Write if it beat since it was written, but not more often than every few seconds."""
        if self.beaten > self._written and time.monotonic() - self._written >= SECONDS_BETWEEN:
            self.write()

    def write(self) -> None:
        """Put on disk where this rank is; a disk that can't be written must not hide what else is wrong."""
        self._written = time.monotonic()
        line = {"place": self.place, "time": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
        text = json.dumps(line | {"place": self.place[: LINE_BYTES // 4]}).encode()
        path = self._path(self.world.rank)
        try:
            if self._file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._claim.unlink(missing_ok=True)  # of an earlier attempt
                self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
            os.pwrite(self._file, text.ljust(LINE_BYTES - 1) + b"\n", 0)
        except OSError as error:
            log.warning("%s cannot be written: %s", path, error)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def lines(self) -> list[str]:
        """One line a rank, those that are gone first, then by how long they have been silent."""
        seen = []
        for rank in range(self.world.size):
            try:
                line = json.loads(self._path(rank).read_text(encoding="utf-8"))
                line = {name: kind(line[name]) for name, kind in _FIELDS.items()}
            except OSError:
                seen.append((0, float("-inf"), f"rank {rank}: never seen"))
                continue
            except (ValueError, KeyError, TypeError, RecursionError):
                seen.append((0, float("-inf"), f"rank {rank}: what it wrote to {self._path(rank)} cannot be read"))
                continue
            is_gone = line["host"] == socket.gethostname() and not is_alive(line["pid"])
            state = "its process is gone" if is_gone else f"silent for {max(0, time.time() - line['time']):.0f} s"
            seen.append((not is_gone, line["time"], f"rank {rank} on {line['host']}: {state}, last at {line['place']}"))
        return [text for *_, text in sorted(seen)]

    def table(self) -> str:
        """The lines that matter under a title, from one rank of each host; of the others where to find them."""
        if not self._is_first_here():
            return (
                f"rank {self.world.rank} was at {self.place}; another rank of this host says where all were last seen"
            )
        lines = self.lines()
        more = [f"and {len(lines) - MOST_LINES} more in {self.folder}"] if len(lines) > MOST_LINES else []
        return "\n".join([TITLE, *lines[:MOST_LINES], *more])

    def keep_traceback(self, text: str) -> None:
        """Write it beside the heartbeats: those of a thousand ranks in one log would hide the cause."""
        path = self.folder / f"failed_{self.world.rank:05d}.txt"
        try:
            path.write_text(redacted(text), encoding="utf-8")
        except OSError as error:
            log.warning("%s cannot be written (%s):\n%s", path, error, text)

    def _is_first_here(self) -> bool:
        """Whether no other rank of this host has told since this one started; if in doubt, too many tell."""
        try:
            with open(self._claim, "x", encoding="utf-8") as file:
                file.write(str(self.world.rank))
        except FileExistsError:
            return self._claim.read_text(encoding="utf-8") == str(self.world.rank)
        except OSError:
            return True
        return True

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank_{rank:05d}.json"


def _a_time(value: Any) -> float:
    if not math.isfinite(seconds := float(value)):
        raise ValueError(f"{value} is no time")
    return seconds


_FIELDS: Mapping[str, Callable[[Any], Any]] = {"place": str, "time": _a_time, "host": str, "pid": int}


def is_alive(pid: int, *, since: float = math.inf) -> bool:
    """Whether the process runs, and did at the time `since`: a later one may have got its number.

    A dead one whose parent has not noticed yet still has its folder.
    """
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
    except OSError:
        return False
    started = time.time() - uptime + int(status[19]) / os.sysconf("SC_CLK_TCK")
    return status[0] not in "ZX" and started <= since + CLOCK_SECONDS


def brief(error: BaseException) -> str | None:
    """What a log needs of an error that `naming_lagging_ranks` has seen; None of any other."""
    if not hasattr(error, "__notes__"):
        return None
    reason = (str(error).splitlines() or [""])[0]
    return "\n".join([f"{type(error).__name__}: {reason} (tracebacks: RUN_DIR/heartbeat/failed_*)", *error.__notes__])


@contextmanager
def naming_lagging_ranks(heartbeat: Heartbeat) -> Generator[None]:
    """Add to an error from a collective where each rank was last seen."""
    try:
        yield
    except RuntimeError as error:
        if not hasattr(error, "__notes__"):
            heartbeat.beat(f"{heartbeat.place}, failed", now=True)
            time.sleep(SECONDS_TO_DIE)
            error.add_note(heartbeat.table())
            heartbeat.keep_traceback(traceback.format_exc())
        raise


@contextmanager
def telling_of_silence(
    heartbeat: Heartbeat, timeout_seconds: float, tell: Callable[[str], None] = log.warning
) -> Generator[None]:
    """Within it a rank that makes no unit for most of `timeout_seconds` says where all ranks are, once a silence."""
    ended = threading.Event()

    def watch() -> None:
        told = None
        limit = SILENCE_FRACTION * timeout_seconds
        while not ended.wait(min(limit / 4, SECONDS_BETWEEN)):
            heartbeat.write_if_due()
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
        heartbeat.close()
