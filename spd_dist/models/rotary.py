"""Project keys after RoPE: the only point that is no module's output, so the rotation itself is wrapped.

Shapes: B batch, H KV heads, T positions, D site width; K is a head's width.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from spd_dist.errors import ConfigError, DataError
from spd_dist.models.applied import Applied
from spd_dist.models.operators import SitePart
from spd_dist.models.targets import Target, find_module

ROTATION = "apply_rotary_pos_emb"
"""What transformers' attention modules call, as `query, key = apply_rotary_pos_emb(query, key, ...)`."""


@contextmanager
def rotary_keys(model: nn.Module, found: list[Target], applied: Applied) -> Iterator[None]:
    """Within this context the attention modules of the key sites project what their rotation returns.

    The wrapped rotation is global to the model's Python module; it acts only while one of these attention modules runs.

    Raises:
        ConfigError: an attention module that calls no such rotation.
        DataError: a rotation that does not see the whole key.
    """
    running: list[SitePart] = []
    namespaces: dict[int, dict[str, Any]] = {}
    with ExitStack() as undo:
        for target in found:
            for part in (part for part in target.parts if part.site.kind == "key"):
                attention = find_module(model, target.name.rpartition(".")[0])
                namespace = _namespace(attention, part)
                namespaces[id(namespace)] = namespace
                _mark_running(undo, attention, part, running)
        for namespace in namespaces.values():
            undo.callback(namespace.__setitem__, ROTATION, namespace[ROTATION])
            namespace[ROTATION] = _projecting(namespace[ROTATION], running, applied)
        yield


def _namespace(attention: nn.Module, part: SitePart) -> dict[str, Any]:
    """The globals that `attention`'s forward looks its rotation up in."""
    namespace = vars(sys.modules[type(attention).__module__])
    names = list(inspect.signature(namespace[ROTATION]).parameters)[:2] if ROTATION in namespace else None
    if names != ["q", "k"] or hasattr(attention, "kv_b_proj"):
        raise ConfigError(
            f"project.insertion=rope: {type(attention).__name__} of {part.site} does not rotate its whole keys by "
            f"{ROTATION}(q, k, ...); set project.insertion=linear"
        )
    return namespace


def _mark_running(undo: ExitStack, attention: nn.Module, part: SitePart, running: list[SitePart]) -> None:
    undo.callback(attention.register_forward_pre_hook(lambda *_: running.append(part)).remove)
    undo.callback(attention.register_forward_hook(lambda *_: _discard(running), always_call=True).remove)


def _discard(running: list[SitePart]) -> None:
    running.pop()


def _projecting(rotate: Callable[..., Any], running: list[SitePart], applied: Applied) -> Callable[..., Any]:
    def rotate_and_project(q: Tensor, k: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        q, k = rotate(q, k, *args, **options)
        if not running:
            return q, k
        part = running[-1]
        head_dim = options.get("unsqueeze_dim", 1)
        key_BTHK = k.transpose(1, 2) if head_dim == 1 else k
        if key_BTHK.dim() != 4 or key_BTHK.shape[2] * key_BTHK.shape[3] != part.site.width:
            raise DataError(
                f"project.insertion=rope: what rotates of {part.site} is {tuple(k.shape)} and not the whole key of "
                f"width {part.site.width}; set project.insertion=linear"
            )
        key_BTD = key_BTHK.flatten(2)
        projected_BTD = part.apply(key_BTD)
        applied.calls[part.site] += 1
        if applied.observes(part.site):
            applied.measure(part, key_BTD, projected_BTD)
        projected = projected_BTD.view(key_BTHK.shape)
        return q, projected.transpose(1, 2) if head_dim == 1 else projected

    return rotate_and_project
