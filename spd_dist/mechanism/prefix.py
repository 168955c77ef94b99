"""Layers below the lowest projected one, run once for all subspaces: what comes out of them is the same under each."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from spd_dist.types import KVSite

log = logging.getLogger(__name__)


class SharedPrefix:
    """What enters some layers of a model in one pass, to be given to them again in others with the same tokens.

    A pass that replays runs the whole model but the layers below: masks, rotary embeddings, norms and output layer are
    the model's own, whatever its architecture, as long as its layers are called one after the other with what the one
    before gave. `measure` checks that on its first batch.
    """

    def __init__(self, model: nn.Module, sites: Iterable[KVSite]) -> None:
        """Find the layers; `sites` are any of the model's."""
        parts = next(iter(sites)).module.split(".")
        stack = parts[: next(index for index, part in enumerate(parts) if part.isdigit())]
        self.layers = list(model.get_submodule(".".join(stack)).children())
        self.inputs: dict[int, Tensor] = {}
        self.gives_tuples = False

    @contextmanager
    def recording(self, firsts: Iterable[int]) -> Generator[None]:
        """Within it, note what enters the layers `firsts` of the latest pass."""
        self.inputs.clear()
        with ExitStack() as undo:
            for first in set(firsts) - {0}:
                hook = self.layers[first].register_forward_pre_hook(partial(self._note, first), with_kwargs=True)
                undo.callback(hook.remove)
                hook = self.layers[first - 1].register_forward_hook(self._note_form)
                undo.callback(hook.remove)
            yield

    @contextmanager
    def replaying(self, first: int) -> Generator[None]:
        """Within it, the model begins at layer `first`, with what `recording` noted; all of it runs if that is 0."""
        if first == 0:
            yield
            return
        noted = self.inputs[first]
        with ExitStack() as undo:
            for layer in self.layers[:first]:
                layer.forward = self._pass_through
                undo.callback(delattr, layer, "forward")
            hook = self.layers[first].register_forward_pre_hook(partial(_enter, noted), with_kwargs=True)
            undo.callback(hook.remove)
            yield

    def _note(self, first: int, _layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.inputs[first] = inputs[0] if inputs else named["hidden_states"]

    def _note_form(self, _layer: nn.Module, _inputs: tuple[Any, ...], output: object) -> None:
        self.gives_tuples = isinstance(output, tuple)

    def _pass_through(self, *inputs: Any, **named: Any) -> Any:
        hidden = inputs[0] if inputs else named["hidden_states"]
        return (hidden,) if self.gives_tuples else hidden


def _enter(
    noted: Tensor, _layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if inputs:
        return (noted, *inputs[1:]), named
    return inputs, {**named, "hidden_states": noted}
