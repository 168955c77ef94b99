"""From a site's module name to the module of a loaded model, plain or wrapped by PEFT; one projection a module."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import nn

from spd_dist.errors import DataError
from spd_dist.models.kv_tracing import output_width
from spd_dist.projection.operators import SitePart

MARK = "spd_projected"


class Target(NamedTuple):
    """A module whose output is projected, and what is done to it."""

    name: str
    module: nn.Module
    out_features: int
    parts: list[SitePart]


def targets(model: nn.Module, parts: Mapping[str, list[SitePart]]) -> list[Target]:
    """The modules of `model` that `parts` name.

    A layer that PEFT wraps is taken whole: attention does not see its base layer alone.

    Raises:
        DataError: a module is missing, not linear, or too narrow for its sites.
    """
    return [_target(model, name, group) for name, group in parts.items()]


def find_module(model: nn.Module, name: str) -> nn.Module | None:
    """The module of that name in `model`, or in what PEFT wraps; None if there is none."""
    wrapped: Any = model
    base: nn.Module = wrapped.get_base_model() if hasattr(model, "get_base_model") else model
    for root in (model, base):
        try:
            return root.get_submodule(name.removesuffix(".base_layer"))
        except AttributeError:
            continue
    return None


def _target(model: nn.Module, name: str, parts: list[SitePart]) -> Target:
    sites = " and ".join(str(part.site) for part in parts)
    module = find_module(model, name)
    if module is None:
        raise DataError(f"{sites}: the model has no module {name}; the subspace was computed for another architecture")
    width = output_width(module)
    if width is None:
        raise DataError(
            f"{sites}: {name} is a {type(module).__name__}, not a linear module; compute the subspace for this model"
        )
    needed = max(stop for part in parts for _, stop in part.site.columns)
    if needed > width:
        raise DataError(
            f"{sites}: {name} has {width} output features and the subspace needs {needed}; it belongs to another model"
        )
    return Target(name, module, width, parts)


@contextmanager
def claimed(found: Iterable[Target]) -> Generator[None]:
    """Mark modules as projected, so that a second projection is refused instead of composed with the first.

    Raises:
        DataError: one is marked already.
    """
    with ExitStack() as undo:
        for target in found:
            if hasattr(target.module, MARK):
                raise DataError(
                    f"{target.name} is projected already; leave that context first, or project an untouched model"
                )
            setattr(target.module, MARK, True)
            undo.callback(delattr, target.module, MARK)
        yield
