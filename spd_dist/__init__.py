"""Distributed Self-Policy Distillation: a model learns from what it writes in its own capability subspace.

`import spd_dist as spd` gives `find_subspace`, `projected` and `load_subspace`, for any Hugging Face causal language
model in one process; a subspace has `save`, `overlap` and `fold_into`. `run_pipeline(load_config(...))` is the whole
method. Nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spd_dist.config import Config
    from spd_dist.overrides import load_config
    from spd_dist.python_api import (
        CapabilitySubspace,
        LoadedModel,
        find_subspace,
        load_model,
        load_subspace,
        overlap,
        projected,
        push_to_hub,
        run_pipeline,
        save_subspace,
    )

__all__ = [
    "CapabilitySubspace", "Config", "LoadedModel", "find_subspace", "load_config", "load_model", "load_subspace",
    "overlap", "projected", "push_to_hub", "run_pipeline", "save_subspace",
]  # fmt: skip

_HOMES = {"Config": "config", "load_config": "overrides"}

try:
    __version__ = version("spd_dist")
except PackageNotFoundError:  # a clone that was not installed
    __version__ = "0"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'python_api')}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
