"""How much memory this rank may still take."""

from __future__ import annotations

import os

from deepspeed.accelerator import get_accelerator

from spd_dist.distributed.world import World


def free_bytes(world: World) -> int:
    """Free memory of this rank's accelerator; on the CPU, its part of what the host has left."""
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        return int(accelerator.available_memory(world.local_rank))
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world.size)
    return int(accelerator.available_memory()) // ranks_here
