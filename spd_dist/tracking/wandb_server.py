"""The server of Weights & Biases: whether there is one, whether it answers, and how long a run waits for it."""

from __future__ import annotations

import contextlib
import logging
import netrc
import os
import signal
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Generator
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

log = logging.getLogger(__name__)

FINISH_SECONDS = 30.0
"""How long the server has at the end, to take what it has not taken yet."""
MOST_TURNS = 20
"""Of that time, while it answers: artifacts may be large."""


class ServerLimits(NamedTuple):
    """What a server is, and what time it has."""

    server: str
    init_seconds: float
    finish_seconds: float


class Modes(NamedTuple):
    """The modes to try, in order; and why online is not among them, if that was not asked for."""

    order: list[Literal["online", "offline"]]
    reason: str = ""


def modes(wanted: str, server: str) -> Modes:
    """How W&B may be used here."""
    if wanted == "auto":
        wanted = os.environ.get("WANDB_MODE", "auto")
    if wanted == "disabled":
        return Modes([])
    if wanted not in ("auto", "online"):
        return Modes(["offline"])
    if not _has_key(server):
        return Modes(["offline"], "there is no key (WANDB_API_KEY, or `wandb login`)")
    if not _answers(server):
        return Modes(["offline"], f"{server} does not answer")
    return Modes(["online", "offline"])


def _has_key(server: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        file = os.environ.get("NETRC") or Path.home() / ".netrc"
        return netrc.netrc(file).authenticators(urlsplit(server).hostname or "") is not None
    except (OSError, RuntimeError, netrc.NetrcParseError):  # RuntimeError: there is no home folder
        return False


def _answers(server: str, seconds: float = 5.0) -> bool:
    """Whether someone listens there: a node without a network is found out at once, and not by a time-out."""
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True
    address = urlsplit(server)
    try:
        socket.create_connection((address.hostname, address.port or 443), seconds).close()
    except OSError:
        return False
    return True


def responds(server: str, seconds: float = 5.0) -> bool:
    """Whether it answers a request, whatever it says, and not that it is ill."""
    try:
        with urllib.request.urlopen(server, timeout=seconds):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except (OSError, ValueError):
        return False


def _children() -> list[int]:
    """Processes that this one has started; none where /proc is not Linux's."""
    files = Path("/proc/self/task").glob("*/children")
    return [int(child) for file in files for child in file.read_text().split()]


@contextlib.contextmanager
def waiting_while_it_answers(limits: ServerLimits | None) -> Generator[None]:
    """Within, W&B sends what it has not sent yet: it may take its time while the server answers, and no more."""
    if limits is None:
        yield
        return
    is_over = threading.Event()
    threading.Thread(target=_end_service_if_stuck, args=(is_over, limits), name="W&B", daemon=True).start()
    try:
        yield
    finally:
        is_over.set()


def _end_service_if_stuck(is_over: threading.Event, limits: ServerLimits) -> None:
    """End W&B's service, which knows no limit while an artifact waits for a server that no longer answers."""
    for _ in range(MOST_TURNS):
        if is_over.wait(limits.finish_seconds + 1):
            return
        if not responds(limits.server):
            break
    log.warning("W&B: %s did not answer at the end of the run and is waited for no more", limits.server)
    for child in _children():
        with contextlib.suppress(OSError):  # it has just ended
            if b"wandb-core" in Path(f"/proc/{child}/cmdline").read_bytes():
                os.kill(child, signal.SIGKILL)
