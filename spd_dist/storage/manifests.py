"""A stage's manifest, written last: how it is checked, and how finished work gets to where it is needed, too."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from spd_dist.errors import MissingError, writing
from spd_dist.storage.artifacts import clear_folder, missing, partial_path, read_json, sha256_of, write_json

MANIFEST = "manifest.json"
STARTED = "started.json"
"""The inputs that the unfinished work in a stage's folder was made from."""
SECONDS_UNTIL_SEEN = 90.0
"""NFS's `acdirmax` is 60 s."""
NO_TIME = {"seconds": 0.0, "device_seconds": 0.0}
"""What a stage took that was taken over."""


def described(folder: Path, paths: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size and hash of every file, by its name inside `folder`.

    Raises:
        DataError: one is missing.
    """
    files = {}
    for path in paths:
        if not path.exists():
            raise missing(path)
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                name = file.relative_to(folder).as_posix()
                files[name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    return files


def wait_until_seen(folder: Path, names: Iterable[str], seconds: float = SECONDS_UNTIL_SEEN) -> None:
    """Wait until this host sees files that another one has written, by their names inside `folder`.

    NFS remembers what was looked for and was not there, and shows it up to a minute late.

    Raises:
        DataError: one is missing, still.
    """
    deadline = time.monotonic() + seconds
    for path in (folder / name for name in names):
        while not path.exists():
            if time.monotonic() > deadline:
                raise missing(path)
            with contextlib.suppress(OSError):
                os.listdir(path.parent)  # opening a folder lets NFS ask its server
            time.sleep(0.1)


def why_not_complete(folder: Path, inputs: Mapping[str, str]) -> str | None:
    """What a stage's folder lacks; None if it was finished from these inputs and its outputs are untouched."""
    try:
        manifest = read_json(folder / MANIFEST)
    except MissingError:
        return "it was not finished"
    if not _is_manifest(manifest):
        return f"its {MANIFEST} is none"
    before = manifest["inputs"]
    changed = [name for name in sorted(inputs.keys() | before.keys()) if inputs.get(name) != before.get(name)]
    if changed:
        return f"its input {', '.join(changed)} changed"
    for name, output in manifest["outputs"].items():
        path = folder / name
        try:
            is_untouched = path.stat().st_size == output["bytes"] and sha256_of(path) == output["sha256"]
        except (FileNotFoundError, MissingError):
            return f"its output {name} is gone"
        if not is_untouched:
            return f"its output {name} was changed"
    return None


def _is_manifest(value: Any) -> bool:
    """Whether it has the form of one, and names files inside its own folder alone: they are copied by their names."""
    kinds = {"inputs": dict, "outputs": dict}
    if not isinstance(value, dict) or any(not isinstance(value.get(name), kind) for name, kind in kinds.items()):
        return False
    names = [PurePosixPath(name) for name in value["outputs"]]
    described = all(isinstance(one, dict) and {"bytes", "sha256"} <= one.keys() for one in value["outputs"].values())
    return described and not any(name.is_absolute() or ".." in name.parts for name in names)


def finished_stages(run: Path, rounds: Sequence[str] = ("", "rounds/*/")) -> list[Path]:
    """The folders of the finished stages of a run, of all arms and rounds, as far as jobs that share it published them.

    `glob` leaves out what vanishes meanwhile, where `Path.rglob` fails; and nothing that is at work is looked into.
    """
    stages = [f"{place}{stage}" for place in rounds for stage in ("*", "evaluate/*", "arms/*/*")]
    return [(run / file).parent for stage in stages for file in sorted(glob.glob(f"{stage}/{MANIFEST}", root_dir=run))]


def find_finished(runs: Iterable[Path], inputs: Mapping[str, str]) -> Path | None:
    """The folder of a stage, of any arm of these runs, that was finished from the same inputs."""
    folders = (folder for run in runs for folder in finished_stages(run))
    return next((folder for folder in folders if why_not_complete(folder, inputs) is None), None)


def take_over(source: Path, target: Path, stage: str) -> bool:
    """Copy a finished stage to `target`, where it counts as finished in no time; False if it vanished meanwhile."""
    copy = partial_path(target)
    clear_folder(copy)  # of a process of the same number that was killed
    try:
        with writing(target):
            manifest = read_json(source / MANIFEST)
            for name in manifest["outputs"]:
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, copy / name)
            write_json(copy / MANIFEST, {**manifest, "stage": stage, **NO_TIME, "taken_from": str(source)})
            publish(copy, target)
    except (FileNotFoundError, MissingError):
        return False
    finally:
        shutil.rmtree(copy, ignore_errors=True)
    return True


def publish(work: Path, target: Path) -> None:
    """Move a finished stage to where all jobs look for it; if another job was first with the same, its work stays."""
    inputs = read_json(work / MANIFEST)["inputs"]
    target.parent.mkdir(parents=True, exist_ok=True)
    while not _is_moved(work, target):
        found = inode_of(target)
        if why_not_complete(target, inputs) is None:
            shutil.rmtree(work)
            return
        set_aside(target, found)


def set_aside(folder: Path, inode: int) -> None:
    """Remove the stage's folder of this inode, at once: a kill here leaves nothing that looks like the stage.

    What another job has put in its place since it was judged stays there.
    """
    stale = partial_path(folder.with_name(f"{folder.name}.stale"))
    clear_folder(stale)
    try:
        folder.rename(stale)
    except FileNotFoundError:
        return  # another job has set it aside
    if stale.stat().st_ino == inode or not _is_moved(stale, folder):
        shutil.rmtree(stale)


def inode_of(folder: Path) -> int:
    """Which folder it is that has this name now; 0 if none."""
    try:
        return folder.stat().st_ino
    except FileNotFoundError:
        return 0


def _is_moved(source: Path, target: Path) -> bool:
    """Rename a folder, unless there is something in `target`: the file system lets one of many jobs win."""
    try:
        source.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True
