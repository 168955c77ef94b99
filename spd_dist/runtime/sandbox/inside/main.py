"""Where a process inside a sandbox begins: one of three parts to play, told by its argument.

Descriptor 0 is a socket: to the judge for the candidate, to the host for the others. The judge's descriptor 1 is its
socket to the candidate.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from typing import Any

from spd_dist.runtime.sandbox.inside import candidate, judge
from spd_dist.runtime.sandbox.inside.confine import give_up_privileges
from spd_dist.runtime.sandbox.inside.inspection import findings
from spd_dist.runtime.sandbox.inside.supervisor import supervise
from spd_dist.runtime.sandbox.inside.wire import Channel


def main() -> None:
    """Play the part that the first argument describes, as the first process of a PID namespace."""
    part = json.loads(sys.argv[1])
    sys.argv = ["program"]
    sys.path[:] = [path for path in sys.path if path != part["guest"]] + part["packages"]
    give_up_privileges(part["user"])
    supervise(lambda: _play(part), part["limits"])


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
        host.send(judge.verdict(program, **host.receive()))
    else:
        channels[0].send(findings(part["secret"]))
