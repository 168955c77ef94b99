"""Checkpoints that are whole or absent: written beside, hashed, marked, renamed; and found again at any world size."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spd_dist.distributed.collectives import broadcast_object, gather_objects, together
from spd_dist.distributed.training import DeepSpeedEngine, convert_to_universal, load_engine, save_engine
from spd_dist.distributed.world import World
from spd_dist.errors import DataError
from spd_dist.runtime.artifacts import read_json, sha256_of, write_json, writing

MARKER = "COMPLETE.json"
PARTIAL = ".partial"
UNIVERSAL = ".universal"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A checkpoint that is whole."""

    folder: Path
    step: int
    world_size: int
    state: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of one fine-tuning, in `folder/step_00000050`. All methods are collectives."""

    def __init__(self, folder: Path, identity: str, world: World, *, keep: int, keep_every: int | None = None) -> None:
        """`identity` is the hash of all that a checkpoint depends on: one of another identity is refused."""
        self.folder, self.identity, self.world = folder, identity, world
        self.keep, self.keep_every = keep, keep_every

    def save(
        self, engine: DeepSpeedEngine, step: int, state: Mapping[str, Any], *, best_step: int | None = None
    ) -> None:
        """Write step `step`, then remove what is neither among the newest, nor the best, nor one of `keep_every`.

        Raises:
            DataError: the disk is full or may not be written; earlier checkpoints are kept.
        """
        final = self.folder / _name(step)
        partial = final.with_name(final.name + PARTIAL)
        with together("preparing a checkpoint"):
            if self.world.is_main:
                with writing(final):
                    for stale in (partial, final):
                        shutil.rmtree(stale, ignore_errors=True)
                    self.folder.mkdir(parents=True, exist_ok=True)
        save_engine(engine, self.folder, partial.name, {})
        with together("hashing a checkpoint"):
            hashes = self._hash_my_part(partial)
        merged = {name: digest for part in gather_objects(hashes) for name, digest in part.items()}
        with together("finishing a checkpoint"):
            if self.world.is_main:
                marker = {
                    "step": step,
                    "identity": self.identity,
                    "world_size": self.world.size,
                    "state": dict(state),
                    "sha256": merged,
                }
                write_json(partial / MARKER, marker)
                partial.rename(final)
                self._prune(step, best_step)

    def newest(self) -> Found | None:
        """The newest whole checkpoint; broken ones are named in the log and passed over.

        Raises:
            DataError: it belongs to other settings or other data.
        """
        found = None
        with together("looking for checkpoints"):
            if self.world.is_main:
                steps = sorted(self.folder.glob("step_*[0-9]"), reverse=True)
                found = next(filter(None, map(self._checked, steps)), None)
        return broadcast_object(found)

    def at(self, step: int) -> Found:
        """The checkpoint of `step`.

        Raises:
            DataError: it is missing or broken.
        """
        found = None
        with together("reading a checkpoint"):
            if self.world.is_main:
                found = self._checked(self.folder / _name(step))
                if found is None:
                    raise DataError(
                        f"{self.folder / _name(step)} is not whole; delete {self.folder.parent} and start again"
                    )
        return broadcast_object(found)

    def loadable(self, found: Found) -> Path:
        """The folder to load at this world size: the checkpoint, or its universal form, made now if need be."""
        if found.world_size == self.world.size:
            return found.folder
        universal = found.folder.with_name(found.folder.name + UNIVERSAL)
        log.info("%s is of %d ranks; converting it for %d", found.folder, found.world_size, self.world.size)
        with together("converting a checkpoint to another world size"):
            if self.world.is_main:
                shutil.rmtree(universal, ignore_errors=True)
                convert_to_universal(found.folder, universal)
        return universal

    def load(self, engine: DeepSpeedEngine, folder: Path) -> None:
        """Restore the trained weights and the optimizer."""
        load_engine(engine, folder.parent, folder.name)
        if self.world.is_main and folder.name.endswith(UNIVERSAL):
            shutil.rmtree(folder)

    def _hash_my_part(self, folder: Path) -> dict[str, str]:
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        mine = files[self.world.rank :: self.world.size]
        return {file.relative_to(folder).as_posix(): sha256_of(file) for file in mine}

    def _checked(self, folder: Path) -> Found | None:
        """What `folder` holds, or None, with the reason in the log, if it is not whole."""
        try:
            marker = read_json(folder / MARKER)
            broken = [name for name, digest in marker["sha256"].items() if sha256_of(folder / name) != digest]
        except DataError as error:
            log.warning("%s is passed over: %s", folder, error)
            return None
        if broken:
            log.warning("%s is passed over: %s changed since it was written", folder, ", ".join(broken))
            return None
        if marker["identity"] != self.identity:
            raise DataError(
                f"{folder} was made with other settings, weights or completions; delete {self.folder} to train anew"
            )
        return Found(folder, marker["step"], marker["world_size"], marker["state"])

    def _prune(self, step: int, best_step: int | None) -> None:
        """Only after the new one is whole."""
        folders = {int(folder.name.removeprefix("step_")): folder for folder in self.folder.glob("step_*[0-9]")}
        kept = set(sorted(folders)[-self.keep :]) | {step, best_step}
        for old, folder in folders.items():
            if old not in kept and not (self.keep_every and old % self.keep_every == 0):
                shutil.rmtree(folder)
        for leftover in [*self.folder.glob(f"*{PARTIAL}"), *self.folder.glob(f"*{UNIVERSAL}")]:
            shutil.rmtree(leftover, ignore_errors=True)


def _name(step: int) -> str:
    return f"step_{step:08d}"
