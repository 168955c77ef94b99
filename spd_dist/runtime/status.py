"""How a run stands, in `status.json`: for batch scripts and sweeps. Launchers lose exit codes; a file stays."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from spd_dist.distributed.collectives import on_main
from spd_dist.distributed.world import World
from spd_dist.errors import DataError, StopRequested
from spd_dist.runtime.artifacts import read_json, write_json


def status_path(folder: Path, part: str = "") -> Path:
    """Where the status of a run is, or that of a job among several in its folder."""
    return folder / (f"status.{part}.json" if part else "status.json")


@contextmanager
def kept_status(path: Path, world: World, last: str) -> Iterator[None]:
    """Rank 0 writes `running`, and in the end `complete`, `stopped` or `failed`; a killed run stays `running`.

    A collective: no rank begins if the first state can't be written.

    Raises:
        DataError: the disk is full or may not be written.
    """
    described = {"until": last, "world_size": world.size, "host": socket.gethostname(), "pid": os.getpid()}
    described["slurm_job"] = os.environ.get("SLURM_JOB_ID")

    def write(state: str, reason: str = "") -> None:
        if world.is_main:
            write_json(path, {"state": state, "reason": reason, "time": time.time(), **described})

    def write_alone(state: str, reason: str) -> None:
        """Not a collective: other ranks may have failed elsewhere, or not at all."""
        with suppress(DataError, OSError):  # the disk may be what failed
            write(state, reason)

    on_main("writing the status", lambda: write("running"))
    try:
        yield
    except StopRequested as stop:
        write_alone("stopped", str(stop))
        raise
    except BaseException as error:
        write_alone("failed", f"{type(error).__name__}: {error}")
        raise
    on_main("writing the status", lambda: write("complete"))


def read_status(run_dir: Path) -> dict[str, Any]:
    """The status of a run; one that was never started is `absent`."""
    path = status_path(run_dir)
    return read_json(path) if path.exists() else {"state": "absent", "reason": "", "until": ""}
