"""What has come of a process: its children, how they are ended, and what the first of them said last."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from spd_dist.sandbox.inside.supervisor import EXIT_CODES


def children(process: int) -> list[int]:
    """Of its first thread; none if it has ended, or if the kernel keeps no such list."""
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def threads(process: int) -> Iterator[str]:
    """`PID/task/TID` of every thread of a process and of all that come of it."""
    try:
        tasks = os.listdir(f"/proc/{process}/task")
    except OSError:  # it has ended
        return
    for task in tasks:
        yield f"{process}/task/{task}"
        with contextlib.suppress(OSError):
            for child in Path(f"/proc/{process}/task/{task}/children").read_text().split():
                yield from threads(int(child))


def supervised(process: subprocess.Popen[bytes]) -> list[int]:
    """What the first process inside of a sandbox has started."""
    return [worker for first in children(process.pid) for worker in children(first)]


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the first process inside and wait for the one outside, which ends when all the others have."""
    if process.poll() is not None:
        return
    inner = children(process.pid)
    for child in inner:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    try:
        process.wait(10 if inner else 0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def how_it_ended(process: subprocess.Popen[bytes]) -> str:
    """Which limit a program was over, or what else became of it, once its connection is closed."""
    try:
        code = process.wait(1)
    except subprocess.TimeoutExpired:
        return "the program closed its connection"
    limits = [name for name, limit_code in EXIT_CODES.items() if limit_code == code]
    if limits:
        return f"the program exceeded {limits[0]}"
    return f"the program was ended by signal {code - 128}" if code > 128 else "the program ended by itself"


def last_words(*processes: subprocess.Popen[bytes]) -> str:
    """Kill them, and give the last line that each wrote to its errors; else their exit codes."""
    for process in processes:
        kill(process)
    said = [process.stderr.read().decode(errors="replace").split("\n") for process in processes if process.stderr]
    last = [lines[-1] for lines in ([line for line in text if line.strip()] for text in said) if lines]
    return "; ".join(dict.fromkeys(last)) or f"exit codes {', '.join(str(one.returncode) for one in processes)}"
