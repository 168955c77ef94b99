"""What one rank finds on its host; and what ranks find together: whether they share the run folder, sum right and fast,
and agree on the time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import shutil
import socket
import statistics
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import spd_dist
from spd_dist.config import Config, Model
from spd_dist.data.sources import load_rows
from spd_dist.data.tasks import find_task, runs_code
from spd_dist.data.tasks.protocol import SPLITS
from spd_dist.distributed.collectives import broadcast_object, collective_device, gather_objects
from spd_dist.distributed.memory import describe_device
from spd_dist.distributed.world import World
from spd_dist.errors import UserError
from spd_dist.models.gguf import PACKAGE
from spd_dist.models.policy import locate_model
from spd_dist.process.environment import PACKAGES, home_of, is_writable, version_of
from spd_dist.sandbox import open_sandbox, what_holds
from spd_dist.storage.artifacts import content_hash
from spd_dist.storage.settings import result_settings

MIN_SHARED_GIB = 0.06
"""Containers come with 64 MiB of /dev/shm, which NCCL fills."""
MIN_CACHE_GIB = 1.0
SUM_BYTES = 32 << 20
NUM_SUMS = 4
NUM_PINGS = 20
SECONDS_TO_BE_SEEN = 10
"""What a network file system may take to show a file to another host."""


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


@dataclass(frozen=True)
class Facts:
    """One rank's host, as plain data."""

    rank: int
    host: str
    python: str
    code: str
    """Hash of the package's source files."""
    versions: Mapping[str, str]
    config: str
    """Hash of the settings that results depend on."""
    device: str
    num_devices: int
    local_size: int
    num_cores: int
    free_memory_gib: float
    """Of this rank: on its accelerator, or its part of the host's."""
    free_disk_gib: Mapping[str, float]
    """By what the disk is for: `run_dir`, `temporary`."""
    model_gib: float = 0.0
    sandbox: str = ""
    """Of a task that runs programs: which one holds here, and what holds its limits."""
    reachable: Mapping[str, str] = field(default_factory=dict)
    """What was found of model and data; two hosts should have found the same."""
    faults: Mapping[str, str] = field(default_factory=dict)
    """What could not be done here, and why."""


def gather_facts(config: Config, environment: Mapping[str, str]) -> Facts:
    """This rank's facts. Model and data are looked for by the first rank of each host only."""
    local_rank = int(environment.get("LOCAL_RANK", environment.get("SLURM_LOCALID", "0")))
    local_size = int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or 1)
    reachable, faults, model_gib = _find_inputs(config) if local_rank == 0 else ({}, {}, 0.0)
    sandbox, unheld = _try_sandbox(config) if local_rank == 0 else ("", {})
    disks, unwritable = _disks(Path(config.run_dir))
    device = describe_device(local_rank, local_size)
    has_gpu = device.num_visible > 0
    places = faults_of_places(config.model, environment, has_gpu=has_gpu) if local_rank == 0 else {}
    return Facts(
        rank=int(environment.get("RANK", environment.get("SLURM_PROCID", "0"))),
        host=socket.gethostname(),
        python=platform.python_version(),
        code=_code_hash(),
        versions={package: version for package in PACKAGES if (version := version_of(package))},
        config=content_hash(result_settings(dataclasses.asdict(config)))[:12],
        device=device.name,
        num_devices=device.num_visible,
        local_size=local_size,
        num_cores=len(os.sched_getaffinity(0)),
        free_memory_gib=device.free_bytes / 2**30,
        free_disk_gib=disks,
        model_gib=model_gib,
        sandbox=sandbox,
        reachable=reachable,
        faults=faults | unwritable | places | unheld,
    )


def _find_inputs(config: Config) -> tuple[dict[str, str], dict[str, str], float]:
    found, faults, model_gib = {}, {}, 0.0
    try:
        model = locate_model(config.model)
        model_gib = model.num_bytes / 2**30
        found["model"] = f"{model.architecture}, weights of {model.num_bytes} bytes"
    except UserError as error:
        faults["model"] = str(error)
    for split in SPLITS:
        try:
            rows: Sequence[Any] = load_rows(find_task(config.data.task), split, config.data)
            found[f"{split} rows"] = f"{len(rows)} rows, their hash {content_hash(rows)[:12]}"
        except UserError as error:
            faults[f"{split} rows"] = str(error)
    return found, faults, model_gib


def _try_sandbox(config: Config) -> tuple[str, dict[str, str]]:
    try:
        if not runs_code(find_task(config.data.task)):
            return "", {}
        sandbox = open_sandbox()
    except UserError as error:
        return "", {"sandbox": str(error)}
    return f"{sandbox.isolation.name}; {what_holds(sandbox.hierarchies)}", {}


def _disks(run_dir: Path) -> tuple[dict[str, float], dict[str, str]]:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return {}, {"run_dir": f"{run_dir} cannot be made: {error.strerror}"}
    folders = {"run_dir": run_dir, "temporary": Path(tempfile.gettempdir())}
    return {name: shutil.disk_usage(folder).free / 2**30 for name, folder in folders.items()}, {}


def _code_hash() -> str:
    package = Path(spd_dist.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + file.read_bytes())
    return digest.hexdigest()[:12]


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
