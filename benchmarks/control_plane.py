"""What a thousand waiting ranks ask of rank 0's store, and how much of a core it takes to answer.

Every rank is a thread with a connection of its own to a real TCPStore, waiting as the stages' ranks do while one works
(`distributed.uneven_work`); the store's server has a process of its own, whose CPU time counts. Requests are counted at
the callers. `distributed.timeout_seconds` is its default.
`python benchmarks/control_plane.py [--json FILE] [--sizes 8 64 256 1024] [--seconds 15]`; five minutes.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import threading
import time
from collections import Counter
from datetime import timedelta
from typing import Any

import numpy as np
import torch.distributed as dist
from common import parsed, parser, publish

from spd_dist.config import Distributed
from spd_dist.distributed.uneven_work import Connection, StoreWait

TIMEOUT_SECONDS = Distributed().timeout_seconds


class CountingStore:
    """A rank's connection: passes requests on, and counts them."""

    def __init__(self, store: dist.Store, counts: Counter[str]) -> None:
        self.store, self.counts = store, counts

    def __getattr__(self, name: str) -> Any:
        request = getattr(self.store, name)

        def counted(*arguments: Any) -> Any:
            self.counts[name] += 1
            return request(*arguments)

        return counted


def main() -> None:
    """Measure and publish."""
    options = parser(__doc__)
    options.add_argument("--sizes", type=int, nargs="+", default=[8, 64, 256, 1024], help="ranks")
    options.add_argument(
        "--seconds", type=float, default=15.0, help="that each size is watched, from where they begin to wait"
    )
    options = parsed(options, sizes=[8, 16], seconds=1.5)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    sys.setswitchinterval(0.1)
    rows = [measured(size, options.seconds) for size in options.sizes]
    steady = [row for row in rows if row["ranks"] >= min(64, rows[-1]["ranks"] // 2)]
    names = ("requests_per_second", "server_core_fraction")
    ratios = {
        "rank0_core_fraction_at_1024": rows[-1]["server_core_fraction"] * 1024 / rows[-1]["ranks"],
        "exponent": max(slope(steady, name) for name in names),
    }
    publish(f"control plane, {options.seconds:.0f} s each", ratios=ratios, rows=rows, json_path=options.json)


def slope(rows: list[dict[str, Any]], name: str) -> float:
    """The exponent of a power of the number of ranks that fits best."""
    ranks = np.log([row["ranks"] for row in rows])
    return float(np.polyfit(ranks, np.log([max(row[name], 1e-9) for row in rows]), 1)[0])


def serve(sender: Any, asks: Any) -> None:
    """The store's server, as in rank 0's process: tells its port, and its CPU seconds whenever it is asked."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    sender.send(store.port)
    while asks.recv():
        sender.send(time.process_time())


def measured(size: int, seconds: float) -> dict[str, Any]:
    """Requests and CPU time of the server a second, while all ranks but rank 0 are done and wait for it."""
    context = multiprocessing.get_context("spawn")
    answers, sender = context.Pipe(duplex=False)
    listener, asks = context.Pipe(duplex=False)
    server = context.Process(target=serve, args=(sender, listener), daemon=True)
    server.start()
    port, counts = answers.recv(), Counter()

    def cpu_seconds() -> float:
        asks.send(True)
        return answers.recv()

    def connection() -> Connection:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=TIMEOUT_SECONDS))
        return Connection(store, CountingStore(store, counts), TIMEOUT_SECONDS)

    waits = [StoreWait(connection(), rank, size) for rank in range(size)]
    waiting = [threading.Thread(target=wait.wait, args=("measuring",)) for wait in waits[1:]]
    before, cpu, began = counts.total(), cpu_seconds(), time.perf_counter()
    for thread in waiting:
        thread.start()
    time.sleep(seconds)
    taken = time.perf_counter() - began
    row = {
        "ranks": size,
        "requests_per_second": (counts.total() - before) / taken,
        "server_core_fraction": (cpu_seconds() - cpu) / taken,
    }
    began = time.perf_counter()
    waits[0].wait("measuring")
    for thread in waiting:
        thread.join()
    asks.send(False)
    server.join()
    return row | {"seconds_to_end": time.perf_counter() - began}


if __name__ == "__main__":
    main()
