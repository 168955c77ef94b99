"""Forward passes of a ZeRO-3 sharded module, kept in step although ranks need different numbers of them."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import nn

from spd_dist.distributed.collectives import max_over_ranks, together

IDLE, FORWARD, FAILED = 0.0, 1.0, 2.0


class LockStep:
    """Within it each rank calls `module` as often as its own work needs; a rank without work keeps the others company.

    Every forward pass gathers shards from all ranks, so each begins with a word from every rank: idle, forward, or
    failed. An idle rank answers a forward by a dummy pass. A rank that fails between two passes says so, and all raise
    its error. One that fails inside a pass can say nothing, since its peers are in another collective: its error ends
    its process, and theirs end on the closed connection.
    """

    def __init__(self, module: nn.Module, dummy: Callable[[], object], doing: str) -> None:
        """`dummy` makes one pass of `module`, whose result nobody needs."""
        self.module, self.dummy, self.doing = module, dummy, doing
        self.is_inside_pass = False
        self.peer_failed = False

    def __enter__(self) -> LockStep:
        # Before ZeRO's own hooks: the first word is said before the first gather.
        self.hooks = [
            self.module.register_forward_pre_hook(self._before, prepend=True),
            self.module.register_forward_hook(self._after),
        ]
        return self

    def _before(self, *_: Any) -> None:
        if max_over_ranks(FORWARD) == FAILED:
            self.peer_failed = True
            raise _PeerFailedError
        self.is_inside_pass = True

    def _after(self, *_: Any) -> None:
        self.is_inside_pass = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        for hook in self.hooks:
            hook.remove()
        if self.is_inside_pass:
            return False
        if error is None:
            self._accompany()
        elif not self.peer_failed:
            max_over_ranks(FAILED)
        with together(self.doing):
            if error is not None and not self.peer_failed:
                raise error
        return self.peer_failed

    def _accompany(self) -> None:
        while (word := max_over_ranks(IDLE)) == FORWARD:
            self.dummy()
        self.peer_failed = word == FAILED


class _PeerFailedError(RuntimeError):
    """Unwinds this rank's work; the failed rank's own error is what all raise."""
