"""The folders outside of a run in which a first run makes something: each can be written, or a setting moves it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from spd_dist.config import Model
from spd_dist.models.gguf import PACKAGE
from spd_dist.runtime.home import home_of, is_writable

MIN_SHARED_GIB = 0.06
"""Containers come with 64 MiB of /dev/shm, which NCCL fills."""
MIN_CACHE_GIB = 1.0


def faults_of_places(model: Model, environment: Mapping[str, str], *, has_gpu: bool = False) -> dict[str, str]:
    """What is wrong with the places that this process would use, by name; empty if nothing is.

    Args:
        model: Where its files come from decides which cache is used.
        environment: Variables of this process.
        has_gpu: NCCL uses shared memory.
    """
    home = Path(environment.get("HOME") or "/nowhere")
    cache = Path(environment.get("XDG_CACHE_HOME") or home / ".cache")
    found = {}
    if home_of(environment) is None:
        name = environment.get("HOME") or "not set"
        found["home"] = f"HOME ({name}) cannot be written: set HOME to a folder of yours, or move each cache by itself"
    if model.name.startswith(PACKAGE) or model.name.endswith(".gguf"):
        folder = Path(model.cache_dir) if model.cache_dir else cache / "spd_dist"
        name, remedy = "model cache", "set model.cache_dir=FOLDER to one with room"
    else:
        folder = Path(environment.get("HF_HOME") or cache / "huggingface")
        name, remedy = "hub cache", "set HF_HOME to a folder with room"
    if not Path(model.name).is_dir() and not is_writable(folder):
        found[name] = f"{folder} cannot be written: {remedy}"
    elif not Path(model.name).is_dir() and _free_gib(folder) < MIN_CACHE_GIB:
        found[name] = f"{folder} has {_free_gib(folder):.2f} GiB free, {MIN_CACHE_GIB:g} needed: {remedy}"
    temporary = Path(environment.get("TMPDIR") or tempfile.gettempdir())
    if not is_writable(temporary) or not temporary.is_dir():
        found["temporary folder"] = f"{temporary} cannot be written: set TMPDIR to a folder that can"
    shared = Path("/dev/shm")
    if has_gpu and (not shared.is_dir() or _free_gib(shared) < MIN_SHARED_GIB):
        found["shared memory"] = "/dev/shm is missing or full, and NCCL needs it: docker run --shm-size=1g, or a mount"
    return found


def _free_gib(folder: Path) -> float:
    existing = next(one for one in (folder, *folder.parents) if one.exists())
    return shutil.disk_usage(existing).free / 2**30
