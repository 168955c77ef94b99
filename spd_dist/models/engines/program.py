"""A program with all processes that it starts: none of them outlives its use, nor this process, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

GUARD = Path(__file__).with_name("guard.py")
GRACE_SECONDS = 10.0
"""Between the request to end and the kill: less than SLURM gives a job."""


@contextmanager
def running(command: Sequence[str], environment: Mapping[str, str], log: BinaryIO) -> Iterator[subprocess.Popen[bytes]]:
    """`command` at work, in a process group that is gone at the end: asked by SIGTERM first, if it still runs.

    A guard leads the group. While it is not waited for, the group's number is not given again.

    Raises:
        OSError: it can't be started.
    """
    words = [sys.executable, "-I", "-S", str(GUARD), str(os.getpid())]
    guard = subprocess.Popen(words, stdin=subprocess.DEVNULL, process_group=0)
    settings = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "process_group": guard.pid}
    try:
        with subprocess.Popen(command, env=environment, **settings) as process:
            try:
                yield process
            finally:
                if process.poll() is None:
                    os.killpg(guard.pid, signal.SIGTERM)
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(GRACE_SECONDS)
                os.killpg(guard.pid, signal.SIGKILL)
    finally:
        os.killpg(guard.pid, signal.SIGKILL)
        guard.wait()
