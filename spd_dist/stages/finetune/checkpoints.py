"""Checkpoints that are whole or absent, written while training goes on, and found again at any world size."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from spd_dist.distributed.checkpoint_safety import refuse_code
from spd_dist.distributed.collectives import any_rank, gather_objects, together
from spd_dist.distributed.training_engine import (
    DeepSpeedEngine,
    load_engine,
    save_engine,
    writer_of,
)
from spd_dist.distributed.uneven_work import on_main, wait_for_all_ranks
from spd_dist.distributed.universal import convert_to_universal
from spd_dist.distributed.world import World
from spd_dist.errors import DataError, writing
from spd_dist.storage.artifacts import clear_folder, content_hash, sha256_of
from spd_dist.storage.records import read_record, write_record

log = logging.getLogger(__name__)


@dataclass
class State:
    """Counts and losses; plain data, so that it is saved as JSON."""

    step: int = 0
    """Optimizer steps done."""
    nll: float = 0.0
    num_targets: int = 0
    """Both summed over the steps of this epoch so far."""
    epochs: list[dict[str, float]] = field(default_factory=list)
    best_loss: float | None = None
    best_step: int | None = None
    num_worse_epochs: int = 0
    stopped_early: bool = False

    def took_step(self, loss: float, num_targets: int) -> None:
        """Count a step with its mean loss."""
        self.step += 1
        self.nll += loss * num_targets
        self.num_targets += num_targets

    def ended_epoch(self, validation_loss: float | None) -> dict[str, float]:
        """Close the epoch; returns its losses."""
        losses = {"loss": self.nll / max(1, self.num_targets)}
        losses |= {} if validation_loss is None else {"validation_loss": validation_loss}
        self.nll, self.num_targets = 0.0, 0
        self.epochs.append({"epoch": len(self.epochs) + 1, **losses})
        return losses

    def judge(self, loss: float, patience: int | None) -> bool:
        """Whether `loss` is the lowest so far; after `patience` epochs without a lower one, training stops."""
        is_best = self.best_loss is None or loss < self.best_loss
        if is_best:
            self.best_loss, self.best_step, self.num_worse_epochs = loss, self.step, 0
        else:
            self.num_worse_epochs += 1
        self.stopped_early = patience is not None and self.num_worse_epochs >= patience
        return is_best


MARKER = "COMPLETE.json"
PARTIAL = ".partial"
UNIVERSAL = ".universal"


@dataclass(frozen=True)
class Marker:
    """What stands in a checkpoint when it is whole, and not before."""

    step: int
    identity: str
    """The hash of all that it depends on."""
    world_size: int
    zero_stage: int
    state: State
    sha256: Mapping[str, str]
    """Of its files, by name."""


@dataclass(frozen=True)
class Found:
    """A checkpoint that is whole."""

    folder: Path
    marker: Marker


@dataclass(frozen=True)
class Pending:
    """A checkpoint that is being written."""

    engine: DeepSpeedEngine
    folder: Path
    marker: Marker
    """Without the hashes, which are not known yet."""
    best_step: int | None


class Checkpoints:
    """The checkpoints of one fine-tuning, in `folder/step_00000050`. All methods are collectives."""

    def __init__(
        self, folder: Path, identity: str, world: World, *, zero_stage: int, keep: int, keep_every: int | None = None
    ) -> None:
        """`identity` is the hash of all that a checkpoint depends on: one of another identity is refused."""
        self.folder, self.identity, self.world = folder, identity, world
        self.zero_stage, self.keep, self.keep_every = zero_stage, keep, keep_every
        self.pending: Pending | None = None

    def begin(self, engine: DeepSpeedEngine, state: State, *, best_step: int | None = None) -> None:
        """Copy weights and optimizer as they are now, and write them while training goes on; `complete` ends it.

        Raises:
            DataError: the disk is full or may not be written; earlier checkpoints are kept.
        """
        self.complete()
        final = self.folder / _name(state.step)
        partial = final.with_name(final.name + PARTIAL)
        on_main("preparing a checkpoint", lambda: self._make_room(partial))
        save_engine(engine, self.folder, partial.name)
        kept = replace(state, epochs=list(state.epochs))  # training goes on
        marker = Marker(state.step, self.identity, self.world.size, self.zero_stage, kept, sha256={})
        self.pending = Pending(engine, final, marker, best_step)

    def complete_if_written(self) -> None:
        """Between two steps: complete the checkpoint if every rank has written its part."""
        if self.pending is not None and not any_rank(not writer_of(self.pending.engine).is_idle):
            self.complete()

    def complete(self) -> None:
        """Wait for the checkpoint that is being written, if any; mark it, rename it, and remove what is not kept.

        Raises:
            DataError: it could not be written; it is gone, and earlier checkpoints are kept.
        """
        if self.pending is None:
            return
        pending, self.pending = self.pending, None
        with together("writing a checkpoint"):
            digests = writer_of(pending.engine).digests()
        digests = {name: digest for part in gather_objects(digests) for name, digest in part.items()}
        on_main("completing a checkpoint", lambda: self._publish(pending, digests))

    def newest(self) -> Found | None:
        """The newest whole checkpoint; broken ones are named in the log and passed over.

        Raises:
            DataError: it belongs to other settings or other data.
        """
        folders = on_main("looking for checkpoints", lambda: sorted(self.folder.glob("step_*[0-9]"), reverse=True))
        return next(filter(None, map(self._checked, folders)), None)

    def at(self, step: int) -> Found:
        """The checkpoint of `step`.

        Raises:
            DataError: it is missing or broken.
        """
        found = self._checked(self.folder / _name(step))
        with together("reading a checkpoint"):
            if found is None:
                raise DataError(f"{self.folder / _name(step)} is not whole; delete {self.folder} and start again")
        return found

    def is_of_others(self, found: Found) -> bool:
        """Whether its states were divided among another number of ranks, or in another way."""
        written = found.marker.world_size, found.marker.zero_stage
        return bool(self.zero_stage) and written != (self.world.size, self.zero_stage)

    def loadable(self, found: Found) -> Path:
        """The folder to load at this world size and stage: the checkpoint, or its universal form, made now if need be.

        Raises:
            DataError: it was written without ZeRO and should be read with it, or the other way round; or a file of it
                is not data alone.
        """
        world_size, zero_stage = found.marker.world_size, found.marker.zero_stage
        if bool(zero_stage) != bool(self.zero_stage):
            raise DataError(
                f"{found.folder} was written with distributed.zero_stage={zero_stage}, which a run with "
                f"distributed.zero_stage={self.zero_stage} cannot read; set it back, or delete {self.folder}"
            )
        with together("reading a checkpoint"):
            refuse_code(sorted(found.folder.glob("*.pt"))[self.world.rank :: self.world.size])
        if not self.is_of_others(found):
            return found.folder
        universal = found.folder.with_name(found.folder.name + UNIVERSAL)
        log.info("%s is of %d ranks; converting it for %d", found.folder, world_size, self.world.size)
        convert_to_universal(found.folder, universal, content_hash(dict(found.marker.sha256)))
        return universal

    def load(self, engine: DeepSpeedEngine, folder: Path) -> None:
        """Restore the trained weights and the optimizer."""
        load_engine(engine, folder.parent, folder.name)
        if folder.name.endswith(UNIVERSAL):
            on_main("removing the converted checkpoint", lambda: shutil.rmtree(folder))

    def _make_room(self, partial: Path) -> None:
        with writing(partial):
            clear_folder(partial)
            self.folder.mkdir(parents=True, exist_ok=True)

    def _publish(self, pending: Pending, digests: Mapping[str, str]) -> None:
        partial = pending.folder.with_name(pending.folder.name + PARTIAL)
        write_record(partial / MARKER, replace(pending.marker, sha256=dict(sorted(digests.items()))))
        shutil.rmtree(pending.folder, ignore_errors=True)
        partial.rename(pending.folder)
        self._prune(pending.best_step)

    def _checked(self, folder: Path) -> Found | None:
        """What `folder` holds, or None, with the reason in the log, if it is not whole; each rank hashes some files."""

        def read() -> tuple[Marker, list[str]] | str:
            try:
                marker = read_record(folder / MARKER, Marker)
            except DataError as error:
                return str(error)
            return marker, sorted({path.name for path in folder.iterdir()} - {MARKER} | marker.sha256.keys())

        found = on_main("reading a checkpoint's marker", read)
        if isinstance(found, str):
            log.warning("%s is passed over: %s", folder, found)
            return None
        marker, names = found
        with wait_for_all_ranks(f"checking {folder}"):
            own = names[self.world.rank :: self.world.size]
            broken = [name for name in own if not _is_whole(folder, name, marker)]
        broken = sorted(name for part in gather_objects(broken) for name in part)
        if broken:
            log.warning("%s is passed over: %s changed since it was written", folder, ", ".join(broken))
            return None
        with together("comparing a checkpoint's settings"):
            if marker.identity != self.identity:
                raise DataError(
                    f"{folder} was made with other settings, weights or completions; delete {self.folder} to train anew"
                )
        return Found(folder, marker)

    def _prune(self, best_step: int | None) -> None:
        """Only after the new one is whole."""
        folders = {int(folder.name.removeprefix("step_")): folder for folder in self.folder.glob("step_*[0-9]")}
        kept = {best_step, *sorted(folders)[-self.keep :]}
        for step, folder in folders.items():
            if step not in kept and not (self.keep_every and step % self.keep_every == 0):
                clear_folder(folder)  # NFS may still show one that is gone
        for leftover in [*self.folder.glob(f"*{PARTIAL}"), *self.folder.glob(f"*{UNIVERSAL}")]:
            clear_folder(leftover)


def _is_whole(folder: Path, name: str, marker: Marker) -> bool:
    """Whether a file is one that was written with the checkpoint, and as it was written."""
    path = folder / name
    is_own = Path(name).name == name and path.is_file() and not path.is_symlink()
    return is_own and marker.sha256.get(name) == sha256_of(path)


def _name(step: int) -> str:
    return f"step_{step:08d}"
