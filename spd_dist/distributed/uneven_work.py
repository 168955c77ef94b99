"""Work that keeps ranks for unlike times: one that is done waits for the others, however long they take.

In a collective it would fail after `distributed.timeout_seconds`, though nobody is at fault. Here ranks wait in the
store through which they met, where each gives signs of life; only one that gives none for that time is lost.
"""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from spd_dist.distributed.collectives import together
from spd_dist.errors import StopRequested

log = logging.getLogger(__name__)

SIGNS = 8
"""In the time after which a rank is lost; at least one in `LONGEST_SECONDS`."""
LONGEST_SECONDS = 30.0
FIRST_SECONDS, POLL_SECONDS = 0.005, 1.0
"""Between two looks at how many ranks are done: soon at first, since most work ends at about the same time."""


class wait_for_all_ranks:
    """As `together`, for a body that may keep one rank for hours after another is done.

    A rank that fails is heard when the others have done their own work, which is kept.

    Raises:
        RuntimeError: a rank is lost, or the store: without a collective, which would not end either.
    """

    def __init__(self, doing: str) -> None:
        self.doing = doing

    def __enter__(self) -> None:
        self.others = _Others() if dist.is_initialized() and dist.get_world_size() > 1 else None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.others is not None:
            if error is not None and not isinstance(error, StopRequested):
                log.warning("stopped while %s; the other ranks are waited for (%s)", self.doing, error)
            self.others.wait(self.doing)
        together(self.doing).__exit__(kind, error, trace)


class _Others:
    """What is known of the other ranks. Only the thread talks to the store: after a cut link a call may never end."""

    def __init__(self) -> None:
        store = _get_default_store()
        self.limit_seconds = store.timeout.total_seconds()
        self.store = store.clone()  # a connection of its own: a call that hangs holds up nobody else
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        use = self.store.add(f"pace/uses/{self.rank}", 1)  # every rank's n-th use is the same one
        self.done_key, self.sign_keys = f"pace/{use}/done", [f"pace/{use}/{rank}" for rank in range(self.size)]
        self.is_waiting, self.are_done, self.is_over = threading.Event(), threading.Event(), threading.Event()
        self.fault: RuntimeError | None = None
        self.num_missing = self.size
        self.signs = [0] * self.size
        self.heard = [time.monotonic()] * self.size
        self.thread = threading.Thread(target=self._watch, name="pace", daemon=True)
        self.thread.start()

    def wait(self, doing: str) -> None:
        """Until every rank is done."""
        started = said = time.monotonic()
        self.heard = [started] * self.size
        self.is_waiting.set()
        while not self.are_done.wait(min(POLL_SECONDS, self.limit_seconds / SIGNS)):
            now = time.monotonic()
            if now - said >= LONGEST_SECONDS:
                said = now
                log.info("%s: waiting for %d of %d ranks, %.0f s", doing, self.num_missing, self.size, now - started)
            lost = [rank for rank in range(self.size) if now - self.heard[rank] > self.limit_seconds]
            if lost or self.fault is not None:
                self.is_over.set()
                names = f"no sign of life from rank {', '.join(map(str, lost))} for {self.limit_seconds:.0f} s"
                raise RuntimeError(f"{names if lost else 'the store is gone'}, while {doing}") from self.fault
        self.thread.join()

    def _watch(self) -> None:
        try:
            while not self.is_waiting.wait(self._exchange_signs()):
                pass
            self._watch_the_end()
        except RuntimeError as error:
            self.fault = error

    def _exchange_signs(self) -> float:
        """Give one, and look at the others' if this rank has nothing else to do; gives the time until the next."""
        self.store.add(self.sign_keys[self.rank], 1)
        for rank, key in enumerate(self.sign_keys if self.is_waiting.is_set() else ()):
            count = self.store.add(key, 0)
            if count != self.signs[rank]:
                self.signs[rank], self.heard[rank] = count, time.monotonic()
        return min(LONGEST_SECONDS, self.limit_seconds / SIGNS)

    def _watch_the_end(self) -> None:
        self.store.add(self.done_key, 1)
        pause, next_sign = FIRST_SECONDS, 0.0
        while (num_done := self.store.add(self.done_key, 0)) < self.size:
            self.num_missing = self.size - num_done
            if self.is_over.wait(pause):
                return
            pause = min(2 * pause, POLL_SECONDS)
            if time.monotonic() >= next_sign:
                next_sign = time.monotonic() + self._exchange_signs()
        self.are_done.set()
