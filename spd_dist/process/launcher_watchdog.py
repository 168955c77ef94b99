"""A rank whose launcher was killed ends itself: nobody else would, and it would write beside the rank that replaces it.

`deepspeed` starts `deepspeed.launcher.launch`, which starts the ranks; killed, either leaves its children running. So
the chain of launchers above this process is noted at the start and looked at every second, with reads of /proc only.
Imports nothing heavy: a launcher can die while torch loads.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

SECONDS_BETWEEN = 1.0
LAUNCHERS = {
    "deepspeed", "ds", "deepspeed.launcher.runner", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run",
    "pdsh", "srun", "mpirun", "mpiexec", "orted",
}  # fmt: skip
LAUNCH = "deepspeed.launcher.launch"
SHELLS = {"bash", "sh", "dash", "zsh", "ksh"}


class Process(NamedTuple):
    """One process: a number can be given again, a number with its start cannot."""

    pid: int
    parent: int
    started: int
    words: tuple[str, ...]


def watch_launchers(environment: Mapping[str, str], is_interrupted: Callable[[], bool] = lambda: False) -> None:
    """From now on, end this process when a launcher above it is gone; without a launcher, do nothing.

    A Ctrl-C ends deepspeed's first launcher at once, while its second gives ranks 30 s to stop: when this process
    `is_interrupted`, its parent alone counts.
    """
    if "RANK" not in environment and "SLURM_PROCID" not in environment:
        return
    chain = launchers_above(os.getpid())
    if chain:
        thread = threading.Thread(target=_watch, args=(chain, is_interrupted), name="launchers", daemon=True)
        thread.start()


def launchers_above(
    pid: int, find: Callable[[int], Process | None] | None = None, everyone: Iterable[Process] | None = None
) -> list[Process]:
    """The parent of `pid`, and every launcher above it; for ranks started over ssh, up to the session's sshd.

    A terminal or a login shell above a launcher is not one of them: a run may outlive it. `find` and `everyone` are how
    to look at processes, for tests.
    """
    find = find or read_process
    own = find(pid)
    found = find(own.parent) if own is not None else None
    chain: list[Process] = []
    while found is not None and found.pid > 1 and (not chain or _is_launcher(found)):
        chain.append(found)
        found = find(found.parent)
    if chain and LAUNCH in chain[-1].words and found is not None:
        # Only pdsh starts it without a runner: from a shell of sshd, or from sshd itself.
        over = find(found.parent) if _name(found) in SHELLS else None
        session = next((one for one in (found, over) if one is not None and _name(one).startswith("sshd")), None)
        if session is not None:
            chain += [session, *_pdsh_of(chain[-1], find, every_process() if everyone is None else everyone)]
    return chain


def _pdsh_of(launch: Process, find: Callable[[int], Process | None], everyone: Iterable[Process]) -> Iterator[Process]:
    """The pdsh that started `launch` over ssh, and its own launcher, if they run on this host: pdsh outlives a kill."""
    names = [word for word in launch.words if word.startswith(("--world_info=", "--master_addr=", "--master_port="))]
    for one in everyone:
        command = " ".join(one.words)
        if _name(one) == "pdsh" and all(name in command for name in names):
            yield one
            above = find(one.parent)
            if above is not None and _is_launcher(above):
                yield above


def every_process() -> Iterator[Process]:
    """All that run on this host."""
    found = (read_process(int(folder.name)) for folder in Path("/proc").glob("[0-9]*"))
    return (one for one in found if one is not None)


def is_running(process: Process) -> bool:
    """Whether it is still there, and still itself."""
    now = read_process(process.pid)
    return now is not None and now.started == process.started


def read_process(pid: int) -> Process | None:
    """What /proc says of a process; None if it is not there, is dead, or /proc is not Linux's."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    fields = status.rpartition(")")[2].split()
    if fields[0] in "ZX":
        return None
    return Process(pid, int(fields[1]), int(fields[19]), tuple(words))


def _name(process: Process) -> str:
    """`bash` of `/bin/bash`, `-bash`; `sshd:` of the title of a session."""
    return process.words[0].split(" ")[0].rpartition("/")[2].lstrip("-") if process.words else ""


def _is_launcher(process: Process) -> bool:
    return any(word.rpartition("/")[2] in LAUNCHERS for word in process.words[:6]) or _name(process) == "slurmstepd:"


def _watch(chain: list[Process], is_interrupted: Callable[[], bool]) -> None:
    while all(map(is_running, chain)) or (is_interrupted() and is_running(chain[0])):
        time.sleep(SECONDS_BETWEEN)
    _end()


def _end() -> None:
    try:
        sys.stderr.write(f"rank {os.environ.get('RANK', '?')}: its launcher was killed, so it ends, too\n")
        sys.stderr.flush()
    finally:  # the launcher may have read this pipe
        os._exit(1)
