"""The processes that share a run: who they are, and how they meet."""

from __future__ import annotations

import gc
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist

from spd_dist.config import Distributed
from spd_dist.distributed.collectives import accelerator
from spd_dist.distributed.lost_ranks import leave_ranks, watch_ranks
from spd_dist.distributed.uneven_work import leave_store
from spd_dist.errors import ConfigError


@dataclass(frozen=True)
class World:
    """This process among all of the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0


_OWN: list[str] = []
"""Environment variables that no launcher had set, until this process leaves the world that it joined by them."""


def join_world(config: Distributed) -> World:
    """Start or adopt the process group, and take this rank's device and threads.

    Rank and address come from `deepspeed`, `torchrun`, or SLURM under `srun`; without any, the world is this process.

    Raises:
        ConfigError: a RANK without the other variables that a launcher sets, an interface that this host lacks, or a
            port that is taken.
    """
    if config.interface is not None:
        check_interface(config.interface, [name for _, name in socket.if_nameindex()])
        os.environ |= {"NCCL_SOCKET_IFNAME": config.interface, "GLOO_SOCKET_IFNAME": config.interface}
    is_started = not dist.is_initialized()
    if is_started:
        found = rendezvous(os.environ)
        _OWN.extend(found.keys() - os.environ.keys())
        os.environ |= found
        # On CPU DeepSpeed would compile this op for minutes, and a killed build hangs every later run on its lock.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        device = _take_device(int(os.environ["LOCAL_RANK"]))
        if device.index is not None:  # pyright: ignore[reportUnnecessaryComparison]  # the CPU has none
            os.environ["LOCAL_RANK"] = str(device.index)  # by which DeepSpeed takes its device, too
        timeout = timedelta(seconds=config.timeout_seconds)
        try:
            if device.type == "cuda":  # NCCL guesses a device that it is not told
                dist.init_process_group("nccl", timeout=timeout, device_id=device)
            deepspeed.init_distributed(verbose=False, timeout=timeout)
        except dist.DistNetworkError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise ConfigError(
                f"MASTER_PORT: {os.environ['MASTER_PORT']} is taken on {socket.gethostname()}, by another run perhaps; "
                "give this one another: deepspeed --master_port PORT, or MASTER_PORT=PORT elsewhere"
            ) from error
    cores = (socket.gethostname(), frozenset(os.sched_getaffinity(0)))
    everyones: list[tuple[str, frozenset[int]]] = [cores] * dist.get_world_size()
    dist.all_gather_object(everyones, cores)
    torch.set_num_threads(config.threads or num_threads(cores, everyones))
    if is_started:
        watch_ranks()
    dist.barrier()  # a rank that is done must not close its sockets while another still connects
    return World(dist.get_rank(), dist.get_world_size(), _take_device(int(os.environ.get("LOCAL_RANK", "0"))))


def num_threads(own: tuple[str, frozenset[int]], everyones: Sequence[tuple[str, frozenset[int]]]) -> int:
    """Threads of a rank: its cores, divided among those ranks of its host that may run on them, too.

    `deepspeed` and `torchrun` leave each rank all cores of the host; srun with `--cpus-per-task` binds it to its own.
    `own` are this rank's host and cores, `everyones` those of all ranks.
    """
    host, cores = own
    num_sharing = sum(other_host == host and bool(other & cores) for other_host, other in everyones)
    return max(1, len(cores) // max(1, num_sharing))


def check_interface(wanted: str, present: Sequence[str]) -> None:
    """Refuse an interface that this host does not have: gloo and NCCL would each fail late, in words of their own.

    Raises:
        ConfigError: none of that name; several may be given, with commas.
    """
    missing = [name for name in wanted.split(",") if name not in present]
    if missing:
        raise ConfigError(
            f"distributed.interface: {missing[0]!r} is no network interface of {socket.gethostname()}, which has "
            f"{', '.join(present)}; name one that all hosts have, or leave it out"
        )


def leave_world() -> None:
    """Wait for every rank, then close the process group; the next of a process without a launcher has another port.

    What trained is a cycle that keeps its groups: collected here, gloo's threads and the store's end before the
    interpreter does. A peer that closes while it is taken down may abort a process whose work is done.
    """
    if dist.is_initialized():
        dist.barrier()
        leave_ranks()
        if deepspeed.comm.is_initialized():
            deepspeed.comm.destroy_process_group()  # and its groups, which it would take for those of the next world
        else:
            dist.destroy_process_group()
        leave_store()
        gc.collect()
    while _OWN:
        os.environ.pop(_OWN.pop(), None)


def rendezvous(environment: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, from whichever launcher set what.

    Raises:
        ConfigError: RANK is set and another of them is not.
    """
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if "RANK" in environment:
        missing = [name for name in needed if name not in environment]
        if missing:
            raise ConfigError(
                f"RANK={environment['RANK']} is set and {', '.join(missing)} not; use deepspeed, torchrun or srun"
            )
        return {name: environment[name] for name in needed}
    if "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        return _slurm_rendezvous(environment)
    return dict(zip(needed, ("0", "1", "0", "127.0.0.1", str(_free_port())), strict=True))


def _slurm_rendezvous(environment: Mapping[str, str]) -> dict[str, str]:
    address = environment.get("MASTER_ADDR") or _first_host(environment["SLURM_STEP_NODELIST"])
    port = environment.get("MASTER_PORT") or str(10000 + int(environment["SLURM_JOB_ID"]) % 20000)
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(_tasks_on_node(environment)),
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }


def _tasks_on_node(environment: Mapping[str, str]) -> int:
    """`2(x3),1` are the tasks of four nodes."""
    tasks: list[int] = []
    for part in environment["SLURM_STEP_TASKS_PER_NODE"].split(","):
        count, _, times = part.partition("(x")
        tasks += [int(count)] * int(times.rstrip(")") or 1)
    return tasks[int(environment["SLURM_NODEID"])]


def _first_host(nodelist: str) -> str:
    """`node[3-5,9],other` -> `node3`, `rack[1-2]node[07-08]-ib` -> `rack1node07-ib`."""
    first = re.split(r",(?![^\[]*\])", nodelist)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _take_device(local_rank: int) -> torch.device:
    chosen = accelerator()
    if chosen.device_name() == "cpu":
        return torch.device("cpu")
    index = local_rank if chosen.device_count() > 1 else 0  # srun may show each task its own device only
    chosen.set_device(index)
    return torch.device(chosen.device_name(index))
