"""A rank that dies is known to all others within seconds: each holds a connection to rank 0, which the kernel closes.

A collective notices a dead peer only if it is the peer that this rank waits for; two ranks that wait for each other
would do so until `distributed.timeout_seconds`, and a wait in the store has no peer at all. A host that loses power or
its cable closes nothing: its kernel is asked every few seconds, and ends the connection by its silence.
"""

from __future__ import annotations

import atexit
import errno
import logging
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import torch.distributed as dist

from spd_dist.distributed.collectives import default_store

log = logging.getLogger(__name__)

GRACE_SECONDS = 15.0
"""For the survivors' own errors, which say more; who still waits after it is ended."""
CONNECT_SECONDS = 20.0
SILENCE_SECONDS = 20
"""A host that answers nothing for so long is lost. A kernel answers for its processes, also for one that hangs."""
ASK_SECONDS = 5
KEY = "lost_ranks/address"
BYE = "bye"
GONE, SILENT = "its process is gone", "its host does not answer"


class Lost(NamedTuple):
    """A rank whose process ended without a word, or whose host can't be reached any more."""

    rank: int
    host: str
    reason: str = GONE

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}: {self.reason}"


class RankWatch:
    """This process's ends of the connections: all ranks' at rank 0, its own elsewhere."""

    def __init__(self, rank: int, end: Callable[[Lost], None]) -> None:
        self.rank, self.end = rank, end
        self.lost: list[Lost] = []
        self.has_left = False
        self.lock = threading.Lock()
        self.peers: dict[socket.socket, _Peer] = {}

    def serve(self, server: socket.socket, token: str) -> None:
        """On rank 0: hear who is gone, and tell the others."""
        self._start(lambda: self._listen(server, token))

    def join(self, connection: socket.socket, token: str) -> None:
        """On the others: say who this is, and hear from rank 0 who is gone; without it, that is rank 0."""
        _ask_now_and_then(connection)
        connection.sendall(f"{token} {self.rank} {socket.gethostname()}\n".encode())
        self.peers[connection] = _Peer(0, str(connection.getpeername()[0]))
        self._start(lambda: self._hear(connection))

    def leave(self) -> None:
        """Say that this process ends in order."""
        with self.lock:
            self.has_left = True
            for connection in self.peers:
                _send(connection, BYE)

    def _start(self, talk: Callable[[], None]) -> None:
        threading.Thread(target=talk, name="lost ranks", daemon=True).start()

    def _listen(self, server: socket.socket, token: str) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(server, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is server:
                        connection, _ = server.accept()
                        _ask_now_and_then(connection)
                        selector.register(connection, selectors.EVENT_READ, bytearray())
                    elif isinstance(key.fileobj, socket.socket) and not self._read(key.fileobj, key.data, token):
                        selector.unregister(key.fileobj)
                        key.fileobj.close()

    def _read(self, connection: socket.socket, text: bytearray, token: str) -> bool:
        """Take in what a rank says; False at its end, or of one that is none of ours."""
        said, reason = _received(connection)
        text += said
        with self.lock:
            peer = self.peers.get(connection)
            if peer is None and b"\n" in text:
                words = text.decode(errors="replace").splitlines()[0].split()
                if len(words) != 3 or words[0] != token:
                    return False
                peer = self.peers[connection] = _Peer(int(words[1]), words[2])
                for gone in self.lost:
                    _send(connection, f"{gone.rank} {gone.host} {gone.reason}")
            if said:
                return peer is not None or len(text) < 1024
            self.peers.pop(connection, None)
            has_left = text.decode(errors="replace").splitlines()[-1:] == [BYE]
            if peer is None or has_left:
                return False
            for other in self.peers:
                _send(other, f"{peer.rank} {peer.host} {reason}")
        self._note(Lost(peer.rank, peer.host, reason))
        return False

    def _hear(self, connection: socket.socket) -> None:
        reason = GONE
        try:
            with connection.makefile("r", encoding="utf-8") as lines:
                for line in lines:
                    words = line.strip().split(maxsplit=2)
                    if words == [BYE]:
                        return
                    self._note(Lost(int(words[0]), *words[1:]))
        except OSError as error:
            reason = _reason(error)
        self._note(Lost(*self.peers[connection], reason))

    def _note(self, gone: Lost) -> None:
        with self.lock:
            if self.has_left:
                return
            self.lost.append(gone)
            is_first = len(self.lost) == 1
        if is_first:
            threading.Thread(target=self._end_later, args=(gone,), name="lost ranks: the end", daemon=True).start()

    def _end_later(self, gone: Lost) -> None:
        time.sleep(GRACE_SECONDS)
        if not self.has_left:
            self.end(gone)


class _Peer(NamedTuple):
    rank: int
    host: str


_watches: list[RankWatch] = []
"""One at most: of the process group that there is."""


def watch_ranks() -> None:
    """From now on `lost_ranks` knows who died, and a process that still waits for one a while later ends. A collective.

    Where rank 0 cannot be reached, this rank's log says so, and its death is found by collectives alone.
    """
    if dist.get_world_size() == 1:
        return
    store, rank = default_store(), dist.get_rank()
    watch = RankWatch(rank, _end)
    if rank == 0:
        server, token = _server(), secrets.token_hex(16)
        store.set(KEY, f"{server.getsockname()[1]} {token}")
        watch.serve(server, token)
    else:
        port, token = store.get(KEY).decode().split()
        try:
            connection = socket.create_connection((os.environ["MASTER_ADDR"], int(port)), CONNECT_SECONDS)
        except OSError as error:
            log.warning("no connection to rank 0 at port %s (%s): should it die, collectives find out", port, error)
            return
        connection.settimeout(None)
        watch.join(connection, token)
    _watches[:] = [watch]
    atexit.register(leave_ranks)  # `end_now` and a kill pass it by


def lost_ranks() -> list[Lost]:
    """Ranks that died since `watch_ranks`, as far as this process knows."""
    return [*_watches[0].lost] if _watches else []


def leave_ranks() -> None:
    """Before a process ends in order: it is not missed, and misses nobody any more."""
    for watch in _watches:
        watch.leave()
    _watches.clear()


def _server() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", 0), backlog=1024)


def _ask_now_and_then(connection: socket.socket) -> None:
    """Let the kernel end a connection whose other end's host answers neither what is sent nor its own questions."""
    if sys.platform != "linux":  # kernels name these otherwise
        return
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, ASK_SECONDS),
        (socket.TCP_KEEPINTVL, ASK_SECONDS),
        (socket.TCP_KEEPCNT, SILENCE_SECONDS // ASK_SECONDS - 1),
        (socket.TCP_USER_TIMEOUT, 1000 * SILENCE_SECONDS),
    ):
        connection.setsockopt(socket.IPPROTO_TCP, option, value)


def _received(connection: socket.socket) -> tuple[bytes, str]:
    """What was said, or nothing at the end; and what the end means, should it be one."""
    try:
        return connection.recv(4096), GONE
    except OSError as error:
        return b"", _reason(error)


def _reason(error: OSError) -> str:
    return SILENT if error.errno in (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH) else GONE


def _send(connection: socket.socket, line: str) -> None:
    with suppress(OSError):  # it is gone itself, which is heard elsewhere
        connection.sendall(f"{line}\n".encode())


def _end(gone: Lost) -> None:
    try:
        rank = os.environ.get("RANK", "?")
        sys.stderr.write(f"error: {gone}, and rank {rank} still waited {GRACE_SECONDS:.0f} s later\n")
        sys.stderr.flush()
    finally:  # the launcher may have read this pipe
        os._exit(1)
