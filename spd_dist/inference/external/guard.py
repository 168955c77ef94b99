"""End a process group once its parent is gone: `python guard.py PARENT`, the first process of that group.

A death signal (prctl) would reach the program, but not the processes that it starts, which may hold the GPU.
It imports nothing of this package: it must be there at once.
"""

from __future__ import annotations

import os
import signal
import sys
import time

SECONDS_BETWEEN = 0.5
REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Sent to the whole group or job: for the program, not for this process."""


def main(parent: int) -> None:
    """Wait; the end is to be killed, by the parent or by itself."""
    for number in REQUESTS:
        signal.signal(number, signal.SIG_IGN)
    while os.getppid() == parent:
        time.sleep(SECONDS_BETWEEN)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]))
