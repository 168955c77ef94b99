"""Sandboxes for tests, where this machine has what they need."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from spd_dist.errors import ConfigError
from spd_dist.sandbox import Limits, Sandbox, open_sandbox
from spd_dist.sandbox.isolation import Bubblewrap, Isolation, Namespaces

ISOLATIONS = (Bubblewrap(), Namespaces())


def usable_sandbox(limits: Limits | None = None, isolations: Sequence[Isolation] = ISOLATIONS) -> Sandbox:
    """One that holds here; else the test is skipped, and the reason says what the machine lacks."""
    try:
        return open_sandbox(limits, isolations)
    except ConfigError as error:
        if "ModuleNotFoundError" in str(error):  # a fault of ours, which no machine lacks
            raise
        return pytest.skip(str(error))
