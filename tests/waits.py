"""Counts how often a program waits for the device, on a CPU too: what would be a wait there is one here."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READ_BACK = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique", "unique_consecutive"}
"""Operators whose result the host must know: a number out of a tensor, a shape out of its values."""
METHODS = {"tolist", "numpy", "cpu"}
"""What copies to the host without an operator, where that is the device."""


class Waits:
    """Within it, `found` names each wait in its order, and `num_operators` counts what was launched."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.num_operators = 0

    def __enter__(self) -> Waits:
        self.modes = [_Methods(self.found), _Operators(self)]
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(*error)


class _Methods(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        self.found = found

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.__name__ in METHODS:
            self.found.append(function.__name__)
        return function(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        self.waits.num_operators += 1
        if name in READ_BACK or (name in ("index", "index_put_") and _has_mask(args[1])):
            self.waits.found.append(name)
        return function(*args, **(kwargs or {}))


def _has_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
