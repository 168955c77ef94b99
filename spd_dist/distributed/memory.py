"""How much memory this rank may still take."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
from pathlib import Path
from typing import NamedTuple

import torch

from spd_dist.distributed.collectives import accelerator
from spd_dist.distributed.world import World


def ranks_here(world: World) -> int:
    """Ranks on this host, as the launcher says; without its word all are here."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world.size)


def free_bytes(world: World) -> int:
    """Free memory of this rank's accelerator; on the CPU, its part of what the host has left."""
    chosen = accelerator()
    if chosen.device_name() != "cpu":
        return _free_on(world.device.index)
    return int(chosen.available_memory()) // ranks_here(world)


def _free_on(index: int) -> int:
    """What the driver calls free, and what this process's allocator holds and has not given out.

    DeepSpeed's own count takes this cache for used where nvidia-ml-py is installed, and cannot read a
    CUDA_VISIBLE_DEVICES of UUIDs or MIG names.
    """
    device = torch.get_device_module(accelerator().device_name())
    free, _ = device.mem_get_info(index)
    return int(free + device.memory_reserved(index) - device.memory_allocated(index))


def give_back_free_memory() -> None:
    """Give the system what was freed, also in cycles: glibc keeps it for this process, a gigabyte after a stage."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not of another C library
        ctypes.CDLL(None).malloc_trim(0)


class Device(NamedTuple):
    """What a rank computes on."""

    name: str
    num_visible: int
    """Devices that this process sees; 0 on the CPU."""
    free_bytes: int
    """Of this rank: on the CPU, its part of what the host has left."""


def describe_device(local_rank: int, local_size: int) -> Device:
    """The device of a rank that has not joined the others yet."""
    chosen = accelerator()
    if chosen.device_name() == "cpu":
        return Device("cpu", 0, int(chosen.available_memory()) // local_size)
    index = local_rank if chosen.device_count() > 1 else 0
    name = torch.get_device_module(chosen.device_name()).get_device_name(index)
    return Device(name, chosen.device_count(), _free_on(index))


def peak_bytes(world: World) -> int:
    """The most memory that this rank has held so far: of its accelerator, or on the CPU its resident set."""
    chosen = accelerator()
    if chosen.device_name() != "cpu":
        return int(chosen.max_memory_allocated(world.device.index))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory(world: World) -> None:
    """Let `peak_bytes` count from now on."""
    chosen = accelerator()
    if chosen.device_name() != "cpu":
        chosen.reset_peak_memory_stats(world.device.index)
        return
    with contextlib.suppress(OSError):  # a kernel that keeps this to itself only makes the peak that of the process
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10G": 70e12}
"""Dense half-precision FLOP/s by what the device's name holds."""


def peak_flops(world: World) -> float | None:
    """The accelerator's dense half-precision peak, if it is known."""
    if world.device.type == "cpu":
        return None
    name = torch.get_device_module(world.device).get_device_name(world.device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
