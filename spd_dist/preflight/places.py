"""The folders outside of a run in which a first run makes something: each can be written, or a setting moves it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from spd_dist.runtime.home import home_of, is_writable

MIN_SHARED_GIB = 0.06
"""Containers come with 64 MiB of /dev/shm, which NCCL fills."""
MIN_CACHE_GIB = 1.0
LONGEST_TEMPORARY = 80
"""A socket's path has at most 107 characters, and what is made in the temporary folder adds to it."""


def faults_of_places(cache_dir: str | None, environment: Mapping[str, str]) -> dict[str, str]:
    """What is wrong with the places that this process would use, by name; empty if nothing is.

    Args:
        cache_dir: `model.cache_dir`.
        environment: Variables of this process.
    """
    home = Path(environment.get("HOME") or "/nowhere")
    cache = Path(environment.get("XDG_CACHE_HOME") or home / ".cache")
    found = {}
    if home_of(environment) is None:
        name = environment.get("HOME") or "not set"
        found["home"] = f"HOME ({name}) cannot be written: set HOME to a folder of yours, or move each cache by itself"
    hub = Path(environment.get("HF_HOME") or cache / "huggingface")
    models = Path(cache_dir) if cache_dir else cache / "spd_dist"
    for name, folder, remedy in [
        ("hub cache", hub, "set HF_HOME to a folder with room"),
        ("model cache", models, "set model.cache_dir=FOLDER to one with room"),
    ]:
        if not is_writable(folder):
            found[name] = f"{folder} cannot be written: {remedy}"
        elif _free_gib(folder) < MIN_CACHE_GIB:
            found[name] = f"{folder} has {_free_gib(folder):.2f} GiB free, {MIN_CACHE_GIB:g} needed: {remedy}"
    temporary = Path(environment.get("TMPDIR") or tempfile.gettempdir())
    if not is_writable(temporary) or not temporary.is_dir():
        found["temporary folder"] = f"{temporary} cannot be written: set TMPDIR to a folder that can"
    elif len(str(temporary)) > LONGEST_TEMPORARY:
        found["temporary folder"] = f"{temporary} is too long a name for the sockets in it: set TMPDIR to a shorter one"
    shared = Path("/dev/shm")
    if not shared.is_dir() or _free_gib(shared) < MIN_SHARED_GIB:
        found["shared memory"] = "/dev/shm is missing or full, and NCCL needs it: docker run --shm-size=1g, or a mount"
    return found


def _free_gib(folder: Path) -> float:
    existing = next(one for one in (folder, *folder.parents) if one.exists())
    return shutil.disk_usage(existing).free / 2**30
