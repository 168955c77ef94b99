"""`launchers/spd.py` whose rank 0 takes longer, once at each place of the source where it works alone.

The seconds and a file, to which the places are added, are in SLOW_SECONDS and SLOW_PLACES.
"""

from __future__ import annotations

import inspect
import os
import runpy
import time
from pathlib import Path

import torch.distributed as dist

from spd_dist.distributed import uneven_work

PATIENT = uneven_work.wait_for_all_ranks
PLACES: set[str] = set()


class Slowed(PATIENT):
    """What `on_main` waits in."""

    def __enter__(self) -> None:
        super().__enter__()
        caller = inspect.stack()[2]
        place = f"{Path(caller.filename).name}:{caller.lineno}"
        if dist.is_initialized() and dist.get_rank() == 0 and place not in PLACES:
            PLACES.add(place)
            with open(os.environ["SLOW_PLACES"], "a", encoding="utf-8") as file:
                file.write(f"{place} {self.doing}\n")
            time.sleep(float(os.environ["SLOW_SECONDS"]))


uneven_work.wait_for_all_ranks = Slowed
runpy.run_path("launchers/spd.py", run_name="__main__")
