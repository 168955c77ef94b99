"""Gradients of a loss at the KV sites of a frozen model, at the cost of a forward and half a backward pass.

No parameter needs a gradient, no activation below the lowest site is kept, and only logits that are looked at exist.

Shapes: B examples, T tokens, N rows, F features that a linear module puts out.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from spd_dist.errors import DataError
from spd_dist.types import KVSite


class Capture:
    """What the linear modules at the sites put out in the latest forward pass."""

    def __init__(self, sites: Sequence[KVSite]) -> None:
        self.sites = tuple(sites)
        self._outputs: dict[str, Tensor] = {}

    def record(self, name: str, output: Tensor) -> Tensor:
        """Note an output, as a leaf if no gradient flows below it, and give what the model goes on with.

        Only the lowest may be cut off: cutting above it would lose the gradient that reaches a lower site through a
        higher one.
        """
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        self._outputs[name] = output
        return output.clone()  # some models write in place on what a linear module puts out

    @property
    def outputs(self) -> list[Tensor]:
        """Those outputs, in the order in which the modules ran."""
        return list(self._outputs.values())

    def gradients(self, loss: Tensor, mask_BT: Tensor) -> dict[KVSite, Tensor]:
        """The gradient of `loss` at every site, one row (N, width) a token of `mask_BT`, in row-major order.

        It frees the graph: one call a forward pass.

        Raises:
            DataError: a site's module did not run.
        """
        outputs, self._outputs = self._outputs, {}  # recomputation in the backward pass records again
        for site in self.sites:
            if site.module not in outputs:
                raise DataError(
                    f"{site}: {site.module} took no part in the forward pass; find the sites of this model anew"
                )
        grads = torch.autograd.grad(loss, list(outputs.values()))
        self._outputs = {}
        rows_NF = {name: grad.reshape(*mask_BT.shape, -1)[mask_BT] for name, grad in zip(outputs, grads, strict=True)}
        return {site: _columns(rows_NF[site.module], site) for site in self.sites}


def _columns(rows_NF: Tensor, site: KVSite) -> Tensor:
    parts = [rows_NF[:, start:stop] for start, stop in site.columns]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


@contextmanager
def capture(model: PreTrainedModel, sites: Sequence[KVSite], *, checkpointing: bool = False) -> Generator[Capture]:
    """Freeze `model` in eval mode and watch its `sites`; everything is put back on leaving.

    Args:
        model: what is called: under ZeRO-3 the engine's module.
        sites: as found by `discover_sites`.
        checkpointing: keep each layer's input only, and recompute the rest in the backward pass (non-reentrant).
    """
    caught = Capture(sites)
    with ExitStack() as undo:
        undo.enter_context(_frozen(model))
        for name in {site.module: None for site in sites}:
            hook = model.get_submodule(name).register_forward_hook(partial(_record, caught, name))
            undo.callback(hook.remove)
        if checkpointing:  # below the lowest site nothing is kept anyway
            undo.enter_context(_checkpointed(layers_of(model, min(sites))[min(sites).layer :]))
        yield caught


def _record(caught: Capture, name: str, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return caught.record(name, output)


@contextmanager
def _frozen(model: nn.Module) -> Generator[None]:
    """Eval mode, so that nothing is dropped at random, and no parameter that needs a gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = [module for module in model.modules() if module.training]
    model.eval()
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


def layers_of(model: nn.Module, site: KVSite) -> list[nn.Module]:
    """All layers of a model, one of which has this site."""
    parts = site.module.split(".")
    stack = parts[: next(index for index, part in enumerate(parts) if part.isdigit())]
    return list(model.get_submodule(".".join(stack)).children())


@contextmanager
def _checkpointed(layers: Sequence[nn.Module]) -> Generator[None]:
    """Recompute these layers. The switch of transformers would need train mode, and gradients of the embeddings."""
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def supervised_rows(model: PreTrainedModel, mask_BT: Tensor) -> Generator[None]:
    """Logits only at the positions of `mask_BT`, as rows in row-major order: most of them are never looked at.

    Raises:
        DataError: the model has no output embeddings.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise DataError(f"model.name: {type(model).__name__} has no output embeddings; choose a causal language model")
    handle = head.register_forward_pre_hook(lambda _module, inputs: (inputs[0][mask_BT], *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()
