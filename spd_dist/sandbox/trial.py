"""Which sandbox holds on this machine, found by trying each; and what holds its limits, said in a line."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from spd_dist.errors import ConfigError
from spd_dist.sandbox.cgroups import Hierarchy, find_hierarchies
from spd_dist.sandbox.inside.confine import can_filter
from spd_dist.sandbox.isolation import Bubblewrap, Isolation, Namespaces
from spd_dist.sandbox.sandbox import Limits, Sandbox, SandboxError

log = logging.getLogger(__name__)


def open_sandbox(
    limits: Limits | None = None, isolations: Sequence[Isolation] = (Bubblewrap(), Namespaces())
) -> Sandbox:
    """A sandbox that holds on this machine: of bubblewrap, else of namespaces; each is tried before it is trusted.

    Raises:
        ConfigError: neither holds; it says why.
    """
    faults: list[str] = []
    hierarchies = find_hierarchies()
    for isolation in isolations:
        for sandbox in [Sandbox(isolation, limits, one) for one in dict.fromkeys([hierarchies, ()])]:
            fault = isolation.missing() or _fault_of(sandbox)
            if fault is None:
                _announce(sandbox, faults)
                return sandbox
            if f"{isolation.name}: {fault}" not in faults:
                faults.append(f"{isolation.name}: {fault}")
    raise ConfigError(
        f"evaluate.allow_code_execution: true, but no sandbox holds on this machine ({'; '.join(faults)}); install "
        "bubblewrap, allow unprivileged user namespaces, or evaluate a task that runs no code"
    )


def _announce(sandbox: Sandbox, faults: Sequence[str]) -> None:
    others = "".join(f"; {one}" for one in faults)
    log.info(
        "model-written code runs in a sandbox of %s%s; limits: %s",
        sandbox.isolation.name,
        others,
        what_holds(sandbox.hierarchies),
    )
    grouped = _versions(sandbox.hierarchies)
    loose = [limit for limit, name in (("CPU time", "cpu"), ("memory", "memory")) if name not in grouped]
    if loose and not can_filter():
        log.warning(
            "the system calls of %s are not known here: the sandbox does not filter them, and with no cgroup its limit "
            "on %s holds only for programs that do not work around it",
            os.uname().machine,
            " and ".join(loose),
        )


def what_holds(hierarchies: Sequence[Hierarchy]) -> str:
    """Which limit is held by what, in a line; and which a program could work around."""
    watcher = "watcher" if can_filter() else f"a watcher that can't filter the system calls of {os.uname().machine}"
    means = {"CPU time": [watcher], "memory": [watcher], "processes": ["rlimit", "watcher"], "files": ["watcher"]}
    for name, limit in (("cpu", "CPU time"), ("memory", "memory"), ("pids", "processes")):
        if name in (versions := _versions(hierarchies)):
            means[limit].insert(0, f"cgroup v{versions[name]}")
    return ", ".join(f"{limit} by {' and '.join(each)}" for limit, each in means.items())


def _versions(hierarchies: Sequence[Hierarchy]) -> dict[str, int]:
    """By controller: that of the first hierarchy that has it, which is used."""
    return {name: one.version for one in reversed(hierarchies) for name in one.controllers}


def _fault_of(sandbox: Sandbox) -> str | None:
    """What is wrong with a sandbox, found by trying it; None if it holds and works."""
    try:
        found = sandbox.inspect()
        trial = sandbox.run(
            "import fractions\ndef half(x):\n    return fractions.Fraction(x, 2)", ["assert half(4) == 2"]
        )
    except SandboxError as error:
        return str(error)
    return ", ".join(found) or (None if trial.passed else f"a right program is judged wrong: {trial.reason}")
