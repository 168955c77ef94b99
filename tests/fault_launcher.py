"""What is done to a rank before it is one: `fault_launcher.py PREPARATION WORDS` is `launchers/spd.py WORDS` after it.

It may be put on a host of its own (network, name, disk), be given variables, or be the launcher of ranks of its own,
that can be killed.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import socket
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import slow_link

LAUNCHER = "launchers/spd.py"
LIBC = ctypes.CDLL(None, use_errno=True)
NEW_MOUNTS, NEW_HOST_NAME, BIND, PRIVATE = 0x20000, 0x4000000, 0x1000, 0x44000


@dataclass(frozen=True)
class Preparation:
    """What all ranks get; of `spaces` and `disks`, each rank the one of its turn."""

    environment: dict[str, str] = field(default_factory=dict)
    spaces: list[str] = field(default_factory=list)
    """Network namespaces, one a host."""
    disks: list[str] = field(default_factory=list)
    """Folders, one a host, that stand for the first of them there."""
    pids: str = ""
    """A file for the ranks' numbers: this process is their launcher, and no rank."""
    num_ranks: int = 0

    def write(self, file: Path) -> str:
        """For the command line."""
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")
        return str(file)


def main() -> None:
    """Prepare, and become the rank."""
    prepared = Preparation(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    sys.argv = [LAUNCHER, *sys.argv[2:]]
    os.environ |= prepared.environment
    if prepared.pids:
        launch(prepared)
    rank = int(os.environ["RANK"])
    if prepared.spaces:
        slow_link.enter(prepared.spaces[rank % len(prepared.spaces)])
        checked(LIBC.unshare(NEW_HOST_NAME))
        socket.sethostname(f"host{rank % len(prepared.spaces)}")
        os.environ["MASTER_ADDR"] = slow_link.ADDRESSES[0]
    disk = prepared.disks[rank % len(prepared.disks)] if prepared.disks else ""
    if prepared.disks and disk != prepared.disks[0]:
        checked(LIBC.unshare(NEW_MOUNTS))
        checked(LIBC.mount(None, b"/", None, PRIVATE, None))
        checked(LIBC.mount(disk.encode(), prepared.disks[0].encode(), None, BIND, None))
    runpy.run_path(LAUNCHER, run_name="__main__")


def launch(prepared: Preparation) -> None:
    """Start the ranks; this process ends with them, each of them goes on from here."""
    ranks = []
    for rank in range(prepared.num_ranks):
        pid = os.fork()
        if pid == 0:
            of_rank = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": prepared.num_ranks}
            os.environ |= {name: str(value) for name, value in of_rank.items()}
            return
        ranks.append(pid)
    file = Path(prepared.pids)
    file.with_suffix(".new").write_text(json.dumps(ranks), encoding="utf-8")
    file.with_suffix(".new").rename(file)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
    os._exit(max(codes, key=abs) % 256)


def checked(result: int) -> None:
    """Raise what a call of the C library failed of."""
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


if __name__ == "__main__":
    main()
