"""A stage's manifest, written last: how it is checked, and how finished work gets to where it is needed, too."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from spd_dist.runtime.artifacts import missing, read_json, sha256_of, write_json, writing

MANIFEST = "manifest.json"
STARTED = "started.json"
"""The inputs that the unfinished work in a stage's folder was made from."""


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


def why_not_complete(folder: Path, inputs: Mapping[str, str]) -> str | None:
    """What a stage's folder lacks; None if it was finished from these inputs and its outputs are untouched."""
    file = folder / MANIFEST
    if not file.exists():
        return "it was not finished"
    manifest = read_json(file)
    before = manifest["inputs"]
    changed = [name for name in sorted(inputs.keys() | before.keys()) if inputs.get(name) != before.get(name)]
    if changed:
        return f"its input {', '.join(changed)} changed"
    for name, output in manifest["outputs"].items():
        path = folder / name
        if not path.exists():
            return f"its output {name} is gone"
        if path.stat().st_size != output["bytes"] or sha256_of(path) != output["sha256"]:
            return f"its output {name} was changed"
    return None


def find_finished(runs: Iterable[Path], inputs: Mapping[str, str]) -> Path | None:
    """The folder of a stage, of any arm of these runs, that was finished from the same inputs."""
    for run in runs:
        for file in sorted(run.rglob(MANIFEST)):
            if read_json(file).get("inputs") == dict(inputs) and why_not_complete(file.parent, inputs) is None:
                return file.parent
    return None


def take_over(source: Path, target: Path, stage: str) -> None:
    """Copy a finished stage to `target`, where it counts as finished in no time."""
    manifest = read_json(source / MANIFEST)
    partial = target.with_name(f".{target.name}.taken")
    with writing(target):
        shutil.rmtree(partial, ignore_errors=True)
        for name in manifest["outputs"]:
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, partial / name)
        write_json(partial / MANIFEST, {**manifest, "stage": stage, "seconds": 0.0, "taken_from": str(source)})
        set_aside(target)
        partial.rename(target)


def publish(work: Path, target: Path) -> None:
    """Move a finished stage to where all jobs look for it; if another job was first with the same, its work stays."""
    inputs = read_json(work / MANIFEST)["inputs"]
    target.parent.mkdir(parents=True, exist_ok=True)
    if why_not_complete(target, inputs) is None:
        shutil.rmtree(work)
        return
    set_aside(target)
    try:
        work.rename(target)
    except OSError:  # not empty: another job published between the two lines above
        if why_not_complete(target, inputs) is not None:
            raise


def set_aside(folder: Path) -> None:
    """Remove a stage's folder, at once: a kill here leaves nothing that looks like the stage."""
    if folder.exists():
        stale = folder.with_name(f".{folder.name}.stale")
        shutil.rmtree(stale, ignore_errors=True)
        folder.rename(stale)
        shutil.rmtree(stale)
