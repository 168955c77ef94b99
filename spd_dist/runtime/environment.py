"""What a run ran on, for `environment.json`: versions, git commit, world size, hosts."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from spd_dist.distributed.collectives import gather_objects
from spd_dist.distributed.world import World

PACKAGES = (
    "torch", "deepspeed", "transformers", "peft", "datasets", "wandb", "safetensors", "omegaconf", "flash-attn", "gguf",
)  # fmt: skip


def environment(world: World) -> dict[str, Any]:
    """Versions, code, machine and ranks, as plain data; collective if there is more than one rank."""
    hosts = gather_objects(socket.gethostname()) if world.size > 1 else [socket.gethostname()]
    return {
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "versions": {package: version for package in PACKAGES if (version := version_of(package))},
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "world_size": world.size,
        "hosts": hosts,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else world.device.type,
        "num_cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "command": sys.argv,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def version_of(package: str) -> str | None:
    """The installed version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*words: str) -> str | None:
    """What git says of the code's own repository; None where there is no git or no repository."""
    try:
        folder = Path(__file__).parent
        return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
