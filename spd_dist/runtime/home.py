"""Where libraries keep what they keep: a home folder that is missing or read-only must not stop a run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, MutableMapping
from pathlib import Path

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
