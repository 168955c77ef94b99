"""Messages for people: one line each, with the rank that says it. Only launchers call this."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import TextIO

from spd_dist.runtime.terminal import message_handler


def set_up_logging(rank: int, stream: TextIO | None = None) -> None:
    """Send `spd_dist` messages to `stream` (stderr): all of rank 0, warnings of the others; libraries only warn.

    What libraries say of later versions of themselves is for us to read, in the tests, and not for users.
    """
    handler = message_handler() if stream is None and rank == 0 else logging.StreamHandler(stream or sys.stderr)
    for category in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=category, module=r"torch|deepspeed|transformers|peft|accelerate")
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", "%H:%M:%S"))
    ours = logging.getLogger("spd_dist")
    ours.handlers[:] = [handler]
    ours.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    ours.propagate = False
    for library in ("DeepSpeed", "transformers", "datasets", "urllib3", "httpx"):
        logging.getLogger(library).setLevel(logging.WARNING)
