"""Which isolation this machine has."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from spd_dist.errors import ConfigError
from spd_dist.runtime.sandbox.isolation import Bubblewrap, Isolation, Namespaces
from spd_dist.runtime.sandbox.sandbox import Limits, Sandbox, SandboxError

log = logging.getLogger(__name__)


def open_sandbox(
    limits: Limits | None = None, isolations: Sequence[Isolation] = (Bubblewrap(), Namespaces())
) -> Sandbox:
    """A sandbox that holds on this machine: of bubblewrap, else of namespaces; each is tried before it is trusted.

    Raises:
        ConfigError: neither holds; it says why.
    """
    faults = []
    for isolation in isolations:
        sandbox = Sandbox(isolation, limits)
        fault = isolation.missing() or _fault_of(sandbox)
        if fault is None:
            log.info(
                "model-written code runs in a sandbox of %s%s", isolation.name, "".join(f"; {one}" for one in faults)
            )
            return sandbox
        faults.append(f"{isolation.name}: {fault}")
    raise ConfigError(
        f"evaluate.allow_code_execution: true, but no sandbox holds on this machine ({'; '.join(faults)}); install "
        "bubblewrap, allow unprivileged user namespaces, or evaluate a task that runs no code"
    )


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
