"""Commands under another kernel: User-Mode Linux, a kernel that is a program (`apt-get install user-mode-linux`).

It shows this machine's files, read-only, and has devices, processes and control groups of its own: of version 2, with
all controllers, and the command in `/job/step`, as a batch system puts it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

INIT = """#!/bin/sh
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t tmpfs tmpfs /run
mkdir -p /dev/shm /dev/pts; mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t cgroup2 -o nsdelegate cgroup2 /sys/fs/cgroup
cd /sys/fs/cgroup; mkdir job; echo "+cpu +memory +pids" > cgroup.subtree_control
echo "+cpu +memory +pids" > job/cgroup.subtree_control; mkdir job/step; echo $$ > job/step/cgroup.procs
cd {folder}; export TMPDIR=/dev/shm PATH={path} HOME=/run PYTHONDONTWRITEBYTECODE=1
{command}
echo "exit code $?"
echo o > /proc/sysrq-trigger; sleep 60
"""
"""What the kernel starts first: the shell of this machine, as root."""


def is_there() -> str:
    """Why it can't be had here; empty if it can."""
    return "" if shutil.which("linux.uml") else "needs linux.uml (apt-get install user-mode-linux)"


def under_it(words: Sequence[str], *, memory_mib: int = 2048, seconds: float = 600) -> tuple[int | None, str]:
    """The exit code, None if it did not come so far, and all that was printed, the kernel's lines too."""
    with tempfile.TemporaryDirectory() as folder:
        init = Path(folder) / "init"
        values = {"folder": shlex.quote(str(Path.cwd())), "path": shlex.quote(os.environ["PATH"])}
        init.write_text(INIT.format(command=shlex.join(words), **values), encoding="utf-8")
        init.chmod(0o755)
        kernel = ["linux.uml", f"mem={memory_mib}M", "rootfstype=hostfs", "rootflags=/", "ro", f"init={init}", "quiet"]
        done = subprocess.run(
            [*kernel, "con=null", "con0=null,fd:1"],
            capture_output=True, text=True, errors="replace", timeout=seconds, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    found = re.search(r"^exit code (\d+)", done.stdout, re.MULTILINE)
    return (int(found[1]) if found else None), done.stdout
