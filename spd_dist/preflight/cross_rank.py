"""What ranks find together: whether they share the run folder, sum right and fast, and agree on the time."""

from __future__ import annotations

import shutil
import statistics
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from spd_dist.distributed.collectives import broadcast_object, collective_device, gather_objects
from spd_dist.distributed.world import World

SUM_BYTES = 32 << 20
NUM_SUMS = 4
NUM_PINGS = 20
SECONDS_TO_BE_SEEN = 10
"""What a network file system may take to show a file to another host."""


@dataclass(frozen=True)
class Meeting:
    """What all ranks know after they met."""

    unseen: dict[int, list[int]]
    """Rank -> the ranks whose files it does not see in the run folder."""
    unwritable: dict[int, str]
    """Rank -> why it cannot write there."""
    is_sum_right: bool
    gigabytes_per_second: float
    """Of an all-reduce, by its algorithm's traffic: 2 (N - 1) / N of the bytes."""
    latency_ms: float
    clock_offset_seconds: list[float]
    """By rank, against rank 0."""


def meet(run_dir: Path, world: World) -> Meeting:
    """Look at everything that takes more than one rank. A collective."""
    unwritable, unseen = _share_folder(run_dir, world)
    is_right, speed, latency = _sum(world)
    return Meeting(unseen, unwritable, is_right, speed, latency, _clock_offsets())


def _share_folder(run_dir: Path, world: World) -> tuple[dict[int, str], dict[int, list[int]]]:
    """Every rank writes a file and looks for those of all the others."""
    folder = run_dir / f".preflight-{broadcast_object(uuid.uuid4().hex)}"
    fault = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{world.rank}").write_text("here")
    except OSError as error:
        fault = f"{run_dir} cannot be written: {error.strerror}"
    faults = {rank: one for rank, one in enumerate(gather_objects(fault)) if one}
    expected = {str(rank) for rank in range(world.size) if rank not in faults}
    deadline = time.monotonic() + SECONDS_TO_BE_SEEN
    missing = expected - _names(folder)
    while missing and time.monotonic() < deadline:
        time.sleep(0.2)
        missing = expected - _names(folder)
    unseen = gather_objects(sorted(map(int, missing)))
    shutil.rmtree(folder, ignore_errors=True)
    return faults, {rank: ranks for rank, ranks in enumerate(unseen) if ranks}


def _names(folder: Path) -> set[str]:
    try:
        return {file.name for file in folder.iterdir()}
    except OSError:
        return set()


def _sum(world: World) -> tuple[bool, float, float]:
    """Whether a large sum is right, its speed in GB/s, and the milliseconds of a small one."""
    whole = torch.full((SUM_BYTES // 4,), float(world.rank + 1), device=collective_device())
    dist.all_reduce(whole)
    is_right = all(gather_objects(bool((whole == world.size * (world.size + 1) / 2).all())))
    seconds = [_timed(whole) for _ in range(NUM_SUMS)]
    small = torch.zeros(1, device=collective_device())
    pings = [_timed(small) for _ in range(NUM_PINGS)]
    traffic = SUM_BYTES * 2 * (world.size - 1) / world.size
    return is_right, traffic / statistics.median(seconds) / 1e9, statistics.median(pings) * 1e3


def _timed(tensor: torch.Tensor) -> float:
    dist.barrier()
    started = time.perf_counter()
    dist.all_reduce(tensor)
    tensor[0].item()  # waits for an accelerator
    return time.perf_counter() - started


def _clock_offsets() -> list[float]:
    """Against rank 0: the least of several looks right after a barrier, since leaving one is never quite at once."""
    looks = []
    for _ in range(5):
        dist.barrier()
        times = gather_objects(time.time())
        looks.append([seconds - times[0] for seconds in times])
    return [min((look[rank] for look in looks), key=abs) for rank in range(len(looks[0]))]
