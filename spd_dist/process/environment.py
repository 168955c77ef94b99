"""What a run ran on, for `environment.json`, and where libraries keep what they keep."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from spd_dist.redaction import redacted_words

if TYPE_CHECKING:
    from spd_dist.distributed.world import World

PACKAGES = (
    "torch", "deepspeed", "transformers", "peft", "datasets", "wandb", "safetensors", "omegaconf", "flash-attn", "gguf",
)  # fmt: skip


@dataclass(frozen=True)
class Environment:
    """`environment.json`: versions, code, machine and ranks of the last attempt at a run, and of those before."""

    started_at: str
    python: str
    versions: Mapping[str, str]
    git_commit: str | None
    git_dirty: bool
    world_size: int
    hosts: tuple[str, ...]
    """Of each rank."""
    device: str
    num_cpus: int
    threads: int
    platform: str
    command: tuple[str, ...]
    slurm_job: str | None
    earlier: tuple[Environment, ...] = ()
    """What earlier attempts ran on, the first one first."""


def environment(world: World) -> Environment:
    """What this attempt runs on; collective if there is more than one rank."""
    import torch  # here: `make_room` comes before every library, and a wrong word of a command line before torch

    from spd_dist.distributed.collectives import gather_objects

    hosts = gather_objects(socket.gethostname()) if world.size > 1 else [socket.gethostname()]
    return Environment(
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        python=platform.python_version(),
        versions={package: version for package in PACKAGES if (version := version_of(package))},
        git_commit=_git("rev-parse", "HEAD"),
        git_dirty=bool(_git("status", "--porcelain", "--untracked-files=no")),
        world_size=world.size,
        hosts=tuple(hosts),
        device=torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else world.device.type,
        num_cpus=len(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(),
        platform=platform.platform(),
        command=tuple(redacted_words(sys.argv)),
        slurm_job=os.environ.get("SLURM_JOB_ID"),
    )


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


LIBRARIES = {
    "MPLCONFIGDIR": "matplotlib",
    "WANDB_DATA_DIR": "wandb",
    "WANDB_CACHE_DIR": "wandb",
    "WANDB_CONFIG_DIR": "wandb",
    "TRITON_CACHE_DIR": "triton",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
}
"""What moves a library's folder, and the name of the folder that stands in."""


def is_writable(folder: Path) -> bool:
    """Whether files may be made in a folder; one that is not there counts as the one above that is."""
    existing = next((one for one in (folder, *folder.parents) if one.exists()), None)
    if existing is None or not existing.is_dir() or _is_virtual(existing):
        return False
    return os.access(existing, os.W_OK | os.X_OK)


def _is_virtual(folder: Path) -> bool:
    """/proc and /sys say that they may be written, and take no file."""
    return folder.resolve().is_relative_to("/proc") or folder.resolve().is_relative_to("/sys")


def home_of(environment: Mapping[str, str]) -> Path | None:
    """The home folder, if there is one in which libraries can keep files."""
    home = environment.get("HOME", "")
    places = (Path(home), Path(home) / ".cache", Path(home) / ".config")
    return Path(home) if home and all(map(is_writable, places)) else None


def stand_ins(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that give libraries folders of this user in the temporary folder, where the home can't be written.

    What a user has set stays. Weights and data are not among them: they are large, and their own settings name them.
    """
    if home_of(environment) is not None:
        return {}
    base = _own_folder()
    found = {name: str(base / folder) for name, folder in LIBRARIES.items()}
    if "HOME" not in environment:
        found["NETRC"] = str(base / "netrc")  # W&B would look for the home of a user who may have none
    return {name: folder for name, folder in found.items() if name not in environment}


def _own_folder() -> Path:
    """A folder of this user alone: one of its name that belongs to somebody else is not trusted."""
    base = Path(tempfile.gettempdir()) / f"spd_dist-{os.getuid()}"
    base.mkdir(mode=0o700, exist_ok=True)
    return base if base.stat().st_uid == os.getuid() else Path(tempfile.mkdtemp(prefix="spd_dist-"))


def make_room(environment: MutableMapping[str, str]) -> None:
    """Set the variables of `stand_ins`, before the libraries are imported, and make their folders."""
    for name, folder in stand_ins(environment).items():
        if name != "NETRC":
            Path(folder).mkdir(parents=True, exist_ok=True)
        environment[name] = folder


def where_files_go(environment: Mapping[str, str]) -> str:
    """A sentence for users whose home folder cannot be written."""
    home = environment.get("HOME") or "not set"
    return f"HOME ({home}) cannot be written: matplotlib, W&B and compilers keep their files in {tempfile.gettempdir()}"
