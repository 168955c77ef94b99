"""Messages for people: one line each, with the rank that says it. Only launchers call this."""

from __future__ import annotations

import logging
import sys
from typing import TextIO


def set_up_logging(rank: int, stream: TextIO | None = None) -> None:
    """Send `spd_dist` messages to `stream` (stderr): all of rank 0, warnings of the others; libraries only warn."""
    handler = logging.StreamHandler(stream or sys.stderr)
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
    ours = logging.getLogger("spd_dist")
    ours.handlers[:] = [handler]
    ours.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    ours.propagate = False
    for library in ("DeepSpeed", "transformers", "datasets", "urllib3", "httpx"):
        logging.getLogger(library).setLevel(logging.WARNING)
