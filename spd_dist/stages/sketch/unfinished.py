"""Sketches of an attempt that was stopped: one file a logical shard, so that any number of ranks can go on."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from spd_dist.distributed.collectives import gather_objects, on_main, together
from spd_dist.distributed.world import World
from spd_dist.errors import DataError
from spd_dist.stages.sketch.shard import ShardSketch, load_sketches, save_sketches


class Unfinished:
    """What `folder` keeps of this rank's shards between two attempts. Its methods are collectives."""

    def __init__(self, folder: Path, num_shards: int, world: World) -> None:
        """Read what is there.

        Raises:
            DataError: a file is corrupt.
        """
        self.folder = folder
        own = range(world.rank, num_shards, world.size)
        with together("reading the unfinished sketches"):
            self.shards = {shard: self._load(shard, world) for shard in own if self._path(shard).exists()}
        counts = {shard: state.num_examples for shard, state in self.shards.items()}
        self.num_taken: dict[int, int] = {}
        """Examples that each shard of any rank has seen."""
        for part in gather_objects(counts):
            self.num_taken |= part

    def keep(self, shards: Mapping[int, ShardSketch]) -> None:
        """Write this rank's states, for the next attempt.

        Raises:
            DataError: the disk is full or may not be written; what was there is kept.
        """
        with together("keeping the unfinished sketches"):
            for shard, state in shards.items():
                save_sketches(self._path(shard), {shard: state})

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:  # every example was seen: nobody needs the files
            on_main("removing the unfinished sketches", lambda: shutil.rmtree(self.folder, ignore_errors=True))

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard_{shard:05d}.safetensors"

    def _load(self, shard: int, world: World) -> ShardSketch:
        found = load_sketches(self._path(shard), world.device)
        if shard not in found:
            raise DataError(f"{self._path(shard)} holds shards {list(found)}; delete {self.folder} and start again")
        return found[shard]
