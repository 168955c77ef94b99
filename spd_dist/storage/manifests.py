"""A stage's manifest, written last: how it is checked, and how finished work gets to where it is needed, too."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from spd_dist.errors import DataError, MissingError, writing
from spd_dist.storage.artifacts import clear_folder, content_hash, missing, partial_path, sha256_of
from spd_dist.storage.records import read_record, write_record

MANIFEST = "manifest.json"
STARTED = "started.json"
"""The inputs that the unfinished work in a stage's folder was made from."""
SECONDS_UNTIL_SEEN = 90.0
"""NFS's `acdirmax` is 60 s."""


@dataclass(frozen=True)
class OutputFile:
    """What a file was when its stage was finished."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`manifest.json` of a finished stage."""

    stage: str
    """Its folder in the run's."""
    inputs: Mapping[str, str]
    """Name and hash of everything that the outputs depend on."""
    outputs: Mapping[str, OutputFile]
    """By name inside the stage's folder."""
    seconds: float
    """Wall-clock time of all attempts; 0 if it was taken over."""
    device_seconds: float
    """Of all ranks."""
    world_size: int
    finished_at: str
    extra: Mapping[str, Any]
    """What the stage said of itself, and its peak memory."""
    taken_from: str | None = None
    """The folder of another arm or run that it was copied from."""


def read_manifest(folder: Path) -> Manifest:
    """What was written when the stage in `folder` was finished.

    Raises:
        MissingError: it is not finished.
        DataError: it is of another version, or no manifest, or names files outside its folder: they are copied by name.
    """
    manifest = read_record(folder / MANIFEST, Manifest)
    names = [PurePosixPath(name) for name in manifest.outputs]
    if any(name.is_absolute() or ".." in name.parts for name in names):
        raise DataError(f"{folder / MANIFEST} names files outside its folder; delete it")
    return manifest


def hash_of(manifest: Manifest, *files: str) -> str:
    """One hash of all outputs of a finished stage, or of some."""
    outputs = {name: vars(output) for name, output in manifest.outputs.items()}
    return content_hash({name: outputs[name] for name in files} if files else outputs)


def described(folder: Path, paths: Iterable[Path]) -> dict[str, OutputFile]:
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
                files[name] = OutputFile(file.stat().st_size, sha256_of(file))
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
        manifest = read_manifest(folder)
    except MissingError:
        return "it was not finished"
    except DataError:
        return f"its {MANIFEST} is none of this version"
    before = manifest.inputs
    changed = [name for name in sorted(inputs.keys() | before.keys()) if inputs.get(name) != before.get(name)]
    if changed:
        named = [f"{name} (or a file that they name)" if name == "settings" else name for name in changed]
        return f"its input {', '.join(named)} changed"
    for name, output in manifest.outputs.items():
        path = folder / name
        try:
            is_untouched = path.stat().st_size == output.bytes and sha256_of(path) == output.sha256
        except (FileNotFoundError, MissingError):
            return f"its output {name} is gone"
        if not is_untouched:
            return f"its output {name} was changed"
    return None


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
            manifest = read_manifest(source)
            for name in manifest.outputs:
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, copy / name)
            taken = replace(manifest, stage=stage, seconds=0.0, device_seconds=0.0, taken_from=str(source))
            write_record(copy / MANIFEST, taken)
            publish(copy, target)
    except (FileNotFoundError, MissingError):
        return False
    finally:
        shutil.rmtree(copy, ignore_errors=True)
    return True


def publish(work: Path, target: Path) -> None:
    """Move a finished stage to where all jobs look for it; if another job was first with the same, its work stays."""
    inputs = read_manifest(work).inputs
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
