"""Run a function on several CPU ranks."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

# One server imports these and forks every rank from that clean state, where spawn would import them in each rank.
# (torch.testing imports dynamo, and so sympy, at its first use.)
PRELOADED = ["pytest", "torch.distributed", "torch._dynamo", "torch._inductor.compile_fx", "deepspeed",
             "deepspeed.runtime.zero.stage3", "transformers.models.llama.modeling_llama", "peft", "tiny",
             "matplotlib.figure", "matplotlib.backends.backend_svg", "spd_dist.pipeline"]  # fmt: skip
multiprocessing.set_forkserver_preload(PRELOADED)


def run_on_ranks(world_size: int, store: Path, fn: Callable[..., None], *args: object) -> None:
    """Call `fn(*args)` on `world_size` gloo ranks; any rank's failure fails the test.

    Ranks meet through a file, so tests need no port and can run side by side.
    """
    mp.start_processes(_rank, (world_size, store, fn, args), nprocs=world_size, start_method="forkserver")


def ends_of_ranks(
    world_size: int, store: Path, fn: Callable[..., None], *args: object, timeout_seconds: float = 60.0
) -> list[str]:
    """Let each rank run `fn(*args)` to its own end, and give the error of each: empty if it had none, or was killed.

    A rank that fails takes no other along; a collective may take `timeout_seconds`.
    """
    context = multiprocessing.get_context("forkserver")
    parts = [(rank, world_size, store, fn, args, timeout_seconds) for rank in range(world_size)]
    ranks = [context.Process(target=_rank_by_itself, args=part) for part in parts]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    files = [store.with_name(f"{store.name}-{rank}") for rank in range(world_size)]
    return [file.read_text() if file.exists() else "" for file in files]


def _rank_by_itself(
    rank: int, world_size: int, store: Path, fn: Callable[..., None], args: tuple, timeout_seconds: float
) -> None:
    _meet(rank, world_size, store, timedelta(seconds=timeout_seconds))
    try:
        fn(*args)
    except (RuntimeError, ValueError) as error:
        store.with_name(f"{store.name}-{rank}").write_text(f"{type(error).__name__}: {error}")
    os._exit(0)  # closes the connections: what a rank that ended leaves to the others


def _rank(rank: int, world_size: int, store: Path, fn: Callable[..., None], args: tuple) -> None:
    _meet(rank, world_size, store)
    try:
        fn(*args)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _meet(rank: int, world_size: int, store: Path, timeout: timedelta | None = None) -> None:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_SIZE": world_size}
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # DeepSpeed wants one; the file store is what is used
    os.environ |= {name: str(value) for name, value in ranks.items()} | address
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # or it is compiled, for minutes
    meeting = {"init_method": f"file://{store}", "rank": rank, "world_size": world_size}
    dist.init_process_group("gloo", timeout=timeout, **meeting)
    dist.barrier()  # a rank that is done must not close its sockets while another still connects
