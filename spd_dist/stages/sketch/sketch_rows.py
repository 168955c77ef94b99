"""The stage: one sketch a logical shard, fed from the stream of gradient rows."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from spd_dist.config import Sketch
from spd_dist.distributed.collectives import gather_objects, together
from spd_dist.distributed.uneven_work import on_main
from spd_dist.distributed.world import World
from spd_dist.errors import DataError, StopRequested
from spd_dist.stages.sketch.frequent_directions import SketchPlan, plan_sketches
from spd_dist.stages.sketch.shard import ShardSketch, load_sketches, save_sketches
from spd_dist.types import GradientBatch, KVSite

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardPlan:
    """The logical shards of a run, whatever its number of ranks."""

    num_shards: int
    planned_rank: Callable[[int], int]
    """The rank that a width will be cut to (`Project.planned_rank`); the default size of a sketch follows from it."""
    initial: Mapping[int, ShardSketch] = field(default_factory=dict)
    """States from `load_sketches` to go on from; they are changed in place."""
    keep: Callable[[Mapping[int, ShardSketch]], None] | None = None
    """Given the states where the stream ends by a `StopRequested`, on all ranks at once."""


def sketch(
    gradients: Iterable[GradientBatch],
    sites: Sequence[KVSite],
    config: Sketch,
    world: World,
    plan: ShardPlan,
) -> dict[int, ShardSketch]:
    """The sketches of this rank's logical shards: shards without examples are absent, and count as empty.

    Args:
        gradients: one micro-batch after another, each of one shard. The stream is always read to its end: under ZeRO-3
            it takes all ranks to make it, so a rank with a fault goes on and all ranks fail together afterwards.
        sites: every site of the run, on every rank.
        config: form and size of the sketches, and what becomes of rows with NaN or Inf.
        world: this rank, for messages.
        plan: how many shards there are, where they begin, and what becomes of them if the run is stopped.

    Raises:
        DataError: on all ranks at once: a row with NaN or Inf, rows that do not fit their site, or an initial state of
            other sites or another form.
    """
    plans = plan_sketches(sites, config, planned_rank=plan.planned_rank, num_shards=plan.num_shards)
    for width, form in plans.items():
        log.info("sketch: width %d: %s of %d rows, since %s", width, form.form, form.size, form.reason)
    shards = dict(plan.initial)
    with together("resuming the sketches"):
        _check_states(shards, sites, plans)
    fault: DataError | None = None
    try:
        for number, batch in enumerate(gradients):
            try:
                _take_(shards, batch, number, sites, plans)
            except DataError as error:
                fault = fault or error
    except StopRequested:
        if plan.keep is not None:
            plan.keep(shards if fault is None else {})
        raise
    with together("sketching the gradients"):
        if fault is not None:
            raise fault
        _check_finite(shards, config, world)
    return dict(sorted(shards.items()))


def _check_states(shards: Mapping[int, ShardSketch], sites: Sequence[KVSite], plans: Mapping[int, SketchPlan]) -> None:
    for shard, state in shards.items():
        held = {width: group.plan for width, group in state.groups.items()}
        if set(state) != set(sites) or held != dict(plans):
            raise DataError(
                f"shard {shard}: the saved sketch state has other sites or another form than this run "
                f"({held}, not {dict(plans)}); start without it, or with the sketch.* settings that wrote it"
            )


def _take_(
    shards: dict[int, ShardSketch],
    batch: GradientBatch,
    number: int,
    sites: Sequence[KVSite],
    plans: Mapping[int, SketchPlan],
) -> None:
    if batch.shard not in shards:
        device = next((rows_ND.device for rows_ND in batch.grad_ND.values()), torch.device("cpu"))
        shards[batch.shard] = ShardSketch(sites, plans, device)
    shards[batch.shard].add_(batch, number)


def _check_finite(shards: Mapping[int, ShardSketch], config: Sketch, world: World) -> None:
    faults = [(number, shard, site, n) for shard in shards for site, n, number in shards[shard].dropped()]
    if not faults:
        return
    number, shard, site, num_dropped = min(faults)
    where = f"rank {world.rank}, {site}, shard {shard}, micro-batch {number}"
    if config.non_finite == "raise":
        raise DataError(
            f"{where}: gradient rows hold NaN or Inf ({num_dropped} at this site); look at the examples and the dtype "
            "(model.dtype), or set sketch.non_finite=skip to drop and count such rows"
        )
    total = sum(n for *_, n in faults)
    log.warning("sketch: %d gradient rows with NaN or Inf were dropped, the first at %s", total, where)


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

    def __exit__(self, _: object, error: BaseException | None, trace: object) -> None:
        if error is None:  # every example was seen: nobody needs the files
            on_main("removing the unfinished sketches", lambda: shutil.rmtree(self.folder, ignore_errors=True))

    def _path(self, shard: int) -> Path:
        return self.folder / f"shard_{shard:05d}.safetensors"

    def _load(self, shard: int, world: World) -> ShardSketch:
        found = load_sketches(self._path(shard), world.device)
        if shard not in found:
            raise DataError(f"{self._path(shard)} holds shards {list(found)}; delete {self.folder} and start again")
        return found[shard]
