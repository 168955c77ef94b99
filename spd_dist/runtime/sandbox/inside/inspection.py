"""A look around from inside a sandbox: what it fails to keep from a program."""

from __future__ import annotations

import os
import resource

from spd_dist.runtime.sandbox.inside.system_calls import can_filter


def findings(secret: str) -> list[str]:
    """What is wrong with the isolation, as a program sees it; `secret` is a file that must be out of reach."""
    with open("/proc/self/status") as file:
        status = dict(line.split(":\t", 1) for line in file.read().splitlines() if ":\t" in line)
    processes = [name for name in os.listdir("/proc") if name.isdigit()]
    written = _writable("/", "/usr", "/etc", "/dev", "/proc", "/guest")
    with open("/proc/self/net/dev") as file:
        interfaces = [line.partition(":")[0].strip() for line in file if ":" in line]
    faults = {
        f"files of the host can be read: {secret}": os.path.exists(secret),
        f"the system can be written to: {written}": written,
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
