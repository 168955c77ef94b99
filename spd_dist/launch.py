"""What every launcher of ranks does once it knows the config: join, work, and turn the outcome into an exit code."""

from __future__ import annotations

import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable

from spd_dist.config import Distributed
from spd_dist.distributed.world import World, join_world, leave_world
from spd_dist.errors import UserError
from spd_dist.runtime.log import set_up_logging

SECONDS_FOR_THE_CAUSE = 5
"""A rank that fails since another one did ends this much later: the launcher takes the exit code of the first."""


def run_on_all_ranks(config: Distributed, work: Callable[[World], str]) -> int:
    """Join the other ranks and work; every failure ends all ranks, and none waits for another for ever.

    What `work` gives is printed by rank 0, as is an error that all ranks share.
    """
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch|deepspeed")
    set_up_logging(int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))))
    world = join_world(config)
    try:
        summary = work(world)
    except UserError as error:
        if world.is_main or not error.is_shared:
            sys.stderr.write(f"error: {error}\n")
        if not error.is_shared:
            end_now(error.exit_code)  # the others are inside a collective: only a closed connection reaches them
        code = error.exit_code
    except BaseException:  # noqa: BLE001 - printed, and no rank may be left waiting for this one
        traceback.print_exc()
        time.sleep(SECONDS_FOR_THE_CAUSE if world.size > 1 else 0)
        end_now(1)
    else:
        if world.is_main:
            sys.stdout.write(f"{summary}\n")
        code = 0
    leave_world()
    sys.stdout.flush()
    return code


def end_now(code: int) -> None:
    """Leave without a word to the other ranks: closing the process group could wait for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
