"""Work that keeps ranks for unlike times: one that is done waits for the others, however long they take.

In a collective it would fail after `distributed.timeout_seconds`, though nobody is at fault. Here ranks wait in the
store through which they met, where each gives signs of life; only one that gives none for that time is lost. Rank 0,
which holds the store, reads all signs at once; the others look at the one key that says how it ended.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch.distributed as dist

from spd_dist.distributed.collectives import broadcast_object, default_store, gather_objects, together
from spd_dist.distributed.lost_ranks import lost_ranks
from spd_dist.errors import StopRequested

log = logging.getLogger(__name__)
T = TypeVar("T")

SIGNS = 8
"""In the time after which a rank is lost; at least one in `LONGEST_SECONDS`."""
LONGEST_SECONDS = 30.0
FIRST_SECONDS, LONGEST_POLL_SECONDS = 0.005, 10.0
"""Between two looks at whether all are done. (A blocking `get` would print two warnings each time that it gives up.)"""
NAMING_SECONDS = 1.0
"""Between the end of the store and that of the rank that held it, as another one sees them."""
DONE = b"done"


def on_main(doing: str, action: Callable[[], T]) -> T:
    """Rank 0's result of `action`, or its error, on every rank: for what is read, decided or written once.

    A collective in which rank 0 may take any time. `action` holds no collective. Without a process group it is simply
    done.
    """
    if not dist.is_initialized():
        return action()
    result = None
    with wait_for_all_ranks(doing):
        if dist.get_rank() == 0:
            result = action()
    return broadcast_object(result)


def on_each_host(doing: str, action: Callable[[], T]) -> T:
    """What `action` gave on one rank of this host: on rank 0 first, for it may fill a cache that hosts share.

    A collective in which each of them may take any time. `action` holds no collective.
    """
    hosts = gather_objects(socket.gethostname())
    rank = dist.get_rank() if dist.is_initialized() else 0
    own, given = hosts.index(hosts[rank]), None
    for is_turn in (rank == 0, rank == own > 0):
        with wait_for_all_ranks(doing):
            if is_turn:
                given = action()
    return cast("T", gather_objects(given)[own])


class wait_for_all_ranks:
    """As `together`, for a body that may keep one rank for hours after another is done.

    A rank that fails is heard when the others have done their own work, which is kept.

    Raises:
        RuntimeError: a rank is lost, or the store: without a collective, which would not end either.
    """

    def __init__(self, doing: str) -> None:
        self.doing = doing

    def __enter__(self) -> None:
        self.others = None
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.others = StoreWait(_own_connection(), dist.get_rank(), dist.get_world_size())

    def __exit__(self, _: object, error: BaseException | None, trace: object) -> None:
        if self.others is not None:
            self.others.wait(self.doing, None if isinstance(error, StopRequested) else error)
        together(self.doing).__exit__(None, error, trace)


@dataclass
class Connection:
    """A connection to the store that no one else waits on: a call that hangs holds up nobody."""

    given: Any
    """The one that it was made from."""
    store: Any
    limit_seconds: float
    """After which a rank without a sign is lost."""
    num_uses: int = 0
    """Every rank's n-th use is the same one."""


_connections: list[Connection] = []
"""One at most: of the process group that there is."""


def _own_connection() -> Connection:
    given = default_store()
    if not _connections or _connections[0].given is not given:
        _connections[:] = [Connection(given, given.clone(), given.timeout.total_seconds())]
    return _connections[0]


def leave_store() -> None:
    """Close the connection: the store goes with its process group."""
    _connections.clear()


class StoreWait:
    """One use of the store by all ranks. Only its thread talks to it: after a cut link a call may never end."""

    def __init__(self, connection: Connection, rank: int, size: int) -> None:
        """From here on this rank gives signs of life."""
        self.store, self.limit_seconds = connection.store, connection.limit_seconds
        self.period_seconds = min(LONGEST_SECONDS, self.limit_seconds / SIGNS)
        self.rank, self.size, self.use = rank, size, connection.num_uses
        connection.num_uses += 1
        self.is_waiting, self.has_ended = threading.Event(), threading.Event()
        self.end = b""
        self.fault: RuntimeError | None = None
        self.contact = time.monotonic()
        self.num_missing = size
        self.signs: list[bytes | None] = [None] * size
        self.heard = [self.contact] * size
        self.thread = threading.Thread(target=self._talk, name="meeting", daemon=True)
        self.thread.start()

    def wait(self, doing: str, error: BaseException | None = None) -> None:
        """Until every rank is done; `error` is this rank's, that the others hear of then.

        Raises:
            RuntimeError: a rank, or the store, gave no sign for too long.
        """
        started = said = self.contact = time.monotonic()
        self.is_waiting.set()
        while not self.has_ended.wait(min(1.0, self.period_seconds)):
            now = time.monotonic()
            if gone := lost_ranks():
                raise RuntimeError(f"{gone[0]}, while {doing}")
            if now - said >= LONGEST_SECONDS:
                said = now
                log.info("%s: waiting for %d of %d ranks, %.0f s", doing, self.num_missing, self.size, now - started)
                if error is not None:
                    log.warning("stopped while %s; the other ranks are waited for (%s)", doing, error)
                    error = None
            if now - self.contact > self.limit_seconds:
                raise RuntimeError(f"the store is gone, while {doing}")
        if self.fault is not None:
            time.sleep(NAMING_SECONDS)
            gone = lost_ranks()
            raise RuntimeError(f"{gone[0] if gone else 'the store is gone'}, while {doing}") from self.fault
        self.thread.join()
        if self.end != DONE:
            lost = f"no sign of life from rank {self.end.decode()} for {self.limit_seconds:.0f} s"
            raise RuntimeError(f"{lost}, while {doing}")

    def _talk(self) -> None:
        try:
            while not self.is_waiting.wait(self.period_seconds):
                self._give_sign()
            if self.store.add(self._key("done"), 1) == self.size:
                self.store.set(self._key("end"), DONE)
                for name in ("done", "end") if self.use else ():  # all have left the meeting before this one
                    self.store.delete_key(self._key(name, self.use - 1))
            self._watch_for_the_end()
        except RuntimeError as error:
            self.fault = error
        self.has_ended.set()

    def _watch_for_the_end(self) -> None:
        """Look soon at first, since most work ends at about the same time; of many ranks each looks more seldom."""
        growth = min(1.0, max(0.1, self.size / 1024))
        started = time.monotonic()
        next_sign = started + self.period_seconds
        while not self.store.check([self._key("end")]):
            now = time.monotonic()
            time.sleep(max(FIRST_SECONDS, min(growth * (now - started), LONGEST_POLL_SECONDS, self.period_seconds)))
            if now >= next_sign:
                next_sign = now + self.period_seconds
                self._give_sign()
        self.end = self.store.get(self._key("end"))

    def _give_sign(self) -> None:
        self.store.add(f"meeting/sign/{self.rank}", 1)
        self.contact = time.monotonic()
        if self.rank == 0:
            self._look_for_lost_ranks()

    def _look_for_lost_ranks(self) -> None:
        """If any rank waits: two requests for all signs together, and one more while some rank never gave any."""
        num_done = self.store.add(self._key("done"), 0)
        self.num_missing = self.size - num_done
        if num_done in (0, self.size):
            return
        keys = [f"meeting/sign/{rank}" for rank in range(self.size)]
        there = [rank for rank, sign in enumerate(self.signs) if sign is not None]
        if len(there) < self.size:
            all_there = self.store.check(keys)
            there = [rank for rank, key in enumerate(keys) if all_there or self.store.check([key])]
        now = time.monotonic()
        for rank, sign in zip(there, self.store.multi_get([keys[rank] for rank in there]), strict=True):
            if sign != self.signs[rank]:
                self.signs[rank], self.heard[rank] = sign, now
        lost = [rank for rank in range(self.size) if now - self.heard[rank] > self.limit_seconds]
        if lost:
            self.store.set(self._key("end"), ", ".join(map(str, lost)).encode())

    def _key(self, name: str, use: int | None = None) -> str:
        return f"meeting/{self.use if use is None else use}/{name}"
