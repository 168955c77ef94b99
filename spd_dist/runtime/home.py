"""Where libraries keep what they keep: a home folder that is missing or read-only must not stop a run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
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
    """The home folder, if there is one that can be written."""
    home = environment.get("HOME", "")
    return Path(home) if home and is_writable(Path(home)) else None


def stand_ins(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables that give libraries folders of this user in the temporary folder, where the home can't be written.

    What a user has set stays. Weights and data are not among them: they are large, and their own settings name them.
    """
    if home_of(environment) is not None:
        return {}
    base = Path(tempfile.gettempdir()) / f"spd_dist-{os.getuid()}"
    return {name: str(base / folder) for name, folder in LIBRARIES.items() if name not in environment}


def make_room(environment: dict[str, str] | os._Environ[str]) -> str | None:
    """Set the variables of `stand_ins`, and make their folders; a sentence of what was done, None if nothing."""
    found = stand_ins(environment)
    for folder in found.values():
        Path(folder).mkdir(parents=True, exist_ok=True)
    environment |= found
    if not found:
        return None
    home = environment.get("HOME") or "not set"
    return f"HOME ({home}) cannot be written: matplotlib, W&B and compilers keep their files in {tempfile.gettempdir()}"
