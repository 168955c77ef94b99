"""Two hosts with a cable that is slow, loses connections or is cut on request. Needs root and TUN devices.

Each host is a network namespace with one interface; what is sent there comes to a process of ours, which carries it
over. So every connection between the two, whoever made it, meets the same fault.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import itertools
import os
import select
import struct
import subprocess
import sys
import time
from collections import deque

LIBC = ctypes.CDLL(None, use_errno=True)
NEW_NETWORK, SET_INTERFACE, TUN_WITHOUT_HEADER = 0x40000000, 0x400454CA, 0x1001
ADDRESSES = ("10.79.0.1", "10.79.0.2")
INTERFACE = "cable"
_NUMBERS = itertools.count()


class SlowLink:
    """`spaces` are the network namespaces of the two hosts, as files."""

    def __init__(self) -> None:
        self.names = [f"spd-faults-{os.getpid()}-{next(_NUMBERS)}" for _ in range(2)]
        self.spaces = [f"/run/netns/{name}" for name in self.names]
        for name in self.names:
            _ip("netns", "add", name)
        self._relay = subprocess.Popen([sys.executable, "-S", __file__, *self.spaces], stdin=-1, stdout=-1, text=True)
        self._relay.stdout.readline()
        for name, address in zip(self.names, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                _ip("-n", name, "link", "set", interface, "up")

    def delay(self, seconds: float) -> None:
        """Each packet takes so long, each way."""
        self._say(f"delay {seconds}")

    def cut(self) -> None:
        """Nothing arrives, and nobody is told."""
        self._say("cut")

    def reset(self) -> None:
        """Every connection that is used is ended, from now on until `work`."""
        self._say("reset")

    def work(self) -> None:
        """Carry everything at once."""
        self._say("work")

    def _say(self, words: str) -> None:
        self._relay.stdin.write(f"{words}\n")
        self._relay.stdin.flush()
        self._relay.stdout.readline()

    def __enter__(self) -> SlowLink:
        return self

    def __exit__(self, *_: object) -> None:
        with self._relay:
            self._relay.kill()
        for name in self.names:
            _ip("netns", "del", name)


def is_there() -> str:
    """Why it can't be had here; empty if it can."""
    if os.geteuid() != 0:
        return "needs root"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "needs /dev/net/tun"
    found = any(os.access(f"{folder}/ip", os.X_OK) for folder in [*os.environ.get("PATH", "").split(":"), "/usr/sbin"])
    return "" if found else "needs iproute2"


def enter(space: str) -> None:
    """Move this thread to a host's network."""
    with open(space, encoding="utf-8") as file:
        if LIBC.setns(file.fileno(), NEW_NETWORK) != 0:
            raise OSError(ctypes.get_errno(), space)


def relay(spaces: list[str]) -> None:
    """Carry packets from either end to the other, as the standard input says."""
    ends = [_tun(space) for space in spaces]
    print("ready", flush=True)  # noqa: T201 - to the one who asked
    delay, is_cut, resets = 0.0, False, False
    on_the_way: deque[tuple[float, int, bytes]] = deque()
    while True:
        wait = max(0.0, on_the_way[0][0] - time.monotonic()) if on_the_way else None
        ready, _, _ = select.select([*ends, 0], [], [], wait)
        if 0 in ready:
            word, *more = (os.read(0, 4096).decode() or "end").split()
            if word == "end":
                return
            delay, is_cut, resets = float(more[0]) if more else 0.0, word == "cut", word == "reset"
            print("done", flush=True)  # noqa: T201 - to the one who asked
        for index, end in enumerate(ends):
            if end in ready:
                packet = os.read(end, 65536)
                if is_cut:
                    continue
                if resets and _is_tcp(packet):
                    for target, is_back in ((end, True), (ends[1 - index], False)):
                        with contextlib.suppress(OSError):
                            os.write(target, _reset(packet, back=is_back))
                    continue
                on_the_way.append((time.monotonic() + delay, ends[1 - index], packet))
        while on_the_way and on_the_way[0][0] <= time.monotonic():
            _, end, packet = on_the_way.popleft()
            with contextlib.suppress(OSError):
                os.write(end, packet)


def _tun(space: str) -> int:
    """The far end of a new interface in a namespace."""
    enter(space)
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, SET_INTERFACE, struct.pack("16sH22x", INTERFACE.encode(), TUN_WITHOUT_HEADER))
    return device


def _is_tcp(packet: bytes) -> bool:
    return packet[0] >> 4 == 4 and packet[9] == 6


def _reset(packet: bytes, *, back: bool) -> bytes:
    """The segment that ends the connection of `packet`, for its sender or for its receiver."""
    start = 4 * (packet[0] & 15)
    source, target = packet[12:16], packet[16:20]
    source_port, target_port, number, answered, offset, flags = struct.unpack_from("!HHIIBB", packet, start)
    if back:
        used = len(packet) - start - 4 * (offset >> 4) + (flags & 2 > 0) + (flags & 1)
        source, target, source_port, target_port = target, source, target_port, source_port
        number, answered = (answered if flags & 16 else 0), (number + used) & 0xFFFFFFFF
    segment = struct.pack("!HHIIBBHHH", source_port, target_port, number, answered, 0x50, 0x14, 0, 0, 0)
    pseudo = source + target + struct.pack("!BBH", 0, 6, len(segment))
    segment = segment[:16] + struct.pack("!H", _checksum(pseudo + segment)) + segment[18:]
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(segment), 0, 0, 64, 6, 0, source, target)
    return head[:10] + struct.pack("!H", _checksum(head)) + head[12:] + segment


def _checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _ip(*words: str) -> None:
    environment = os.environ | {"PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"}
    subprocess.run(["ip", *words], check=True, env=environment)


if __name__ == "__main__":
    relay(sys.argv[1:])
