"""Where a process inside a sandbox begins: one of three parts to play, by its argument."""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
from collections.abc import Sequence
from typing import Any

from spd_dist.sandbox.inside import candidate, judge
from spd_dist.sandbox.inside.confine import can_filter, give_up_privileges
from spd_dist.sandbox.inside.supervisor import Counter, supervise
from spd_dist.sandbox.inside.wire import Channel


def findings(secrets: Sequence[str]) -> list[str]:
    """What is wrong with the isolation, as a program sees it; `secrets` are files that must be out of reach."""
    with open("/proc/self/status") as file:
        status = dict(line.split(":\t", 1) for line in file.read().splitlines() if ":\t" in line)
    processes = [name for name in os.listdir("/proc") if name.isdigit()]
    read = [path for path in secrets if os.path.exists(path)]
    written = _writable("/", "/usr", "/etc", "/dev", "/proc", "/guest")
    with open("/proc/self/net/dev") as file:
        interfaces = [line.partition(":")[0].strip() for line in file if ":" in line]
    faults = {
        f"files of the host can be read: {', '.join(read[:3])}": bool(read),
        f"the system can be written to: {written}": written,
        "/proc can be written to": os.access("/proc/self/comm", os.W_OK),
        "there is no private /tmp": not _writable("/tmp"),
        f"other processes can be seen: {len(processes)}": len(processes) > 2,
        f"there is a network: {', '.join(interfaces)}": interfaces not in ([], ["lo"]),
        f"it has capabilities: {status['CapEff']}": int(status["CapEff"], 16) != 0,
        "it can gain privileges": status["NoNewPrivs"].strip() != "1",
        "memory is not limited": resource.getrlimit(resource.RLIMIT_AS)[1] == resource.RLIM_INFINITY,
        "system calls are not filtered": can_filter() and status["Seccomp"].strip() != "2",
        "it runs as root": os.getuid() == 0,
    }
    return [fault for fault, is_there in faults.items() if is_there]


def _writable(*folders: str) -> str:
    """Those folders that a file can be made in."""
    found = []
    for folder in folders:
        try:
            os.close(os.open(f"{folder}/written-by-the-sandbox", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except OSError:
            continue
        os.unlink(f"{folder}/written-by-the-sandbox")
        found.append(folder)
    return ", ".join(found)


def main() -> None:
    """Play the part that the first argument describes, as the first process of a PID namespace."""
    part = json.loads(sys.argv[1])
    sys.argv = ["program"]
    sys.path[:] = [path for path in sys.path if path != part["guest"]] + part["packages"]
    give_up_privileges(part["user"])
    counters = {name: Counter(*each) for name, each in part["counters"].items()}
    supervise(lambda: _play(part), part["limits"], counters)


def _play(part: dict[str, Any]) -> None:
    channels = [Channel(socket.socket(fileno=os.dup(descriptor))) for descriptor in range(part["num_sockets"])]
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nothing, descriptor)
    os.close(nothing)
    if part["name"] == "candidate":
        candidate.serve(channels[0])
    elif part["name"] == "judge":
        host, program = channels
        host.send(program.receive())
        asked = host.receive()
        host.send(judge.verdict(program, asked["program"], asked["tests"], asked["setup"])._asdict())
    else:
        channels[0].send(findings(part["secrets"]))
