"""Gradients of a loss at the KV sites of a frozen model, at the cost of a forward and half a backward pass.

Shapes: B examples, T tokens, F features a linear module puts out, D width of a site, N rows, E hidden width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
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

    def gradients(self, loss: Tensor, mask_BT: Tensor) -> dict[KVSite, Tensor]:
        """The gradient of `loss` at every site, one row (N, D) a token of `mask_BT`, in row-major order.

        It frees the graph: one call a forward pass.
        """
        outputs, self._outputs = self._outputs, {}  # recomputation in the backward pass records again
        grads = torch.autograd.grad(loss, list(outputs.values()))
        self._outputs = {}
        rows_NF = {name: grad.reshape(*mask_BT.shape, -1)[mask_BT] for name, grad in zip(outputs, grads, strict=True)}
        return {site: _columns(rows_NF[site.module], site) for site in self.sites}


def _columns(rows_NF: Tensor, site: KVSite) -> Tensor:
    parts = [rows_NF[:, start:stop] for start, stop in site.columns]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


@contextmanager
def capture(model: PreTrainedModel, sites: Sequence[KVSite], *, checkpointing: bool = False) -> Iterator[Capture]:
    """Freeze `model` in eval mode and watch its `sites`; everything is put back on leaving.

    Args:
        model: what is called: under ZeRO-3 the engine's module.
        sites: as found by `discover_sites`.
        checkpointing: recompute the activations of each layer in the backward pass, non-reentrant.
    """
    caught = Capture(sites)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    training = [module for module in model.modules() if module.training]
    handles = []
    try:
        model.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        for name in {site.module: None for site in sites}:
            hook = _recorder(caught, name)
            handles.append(model.get_submodule(name).register_forward_hook(hook))
        yield caught
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


def _recorder(caught: Capture, name: str) -> Any:
    return lambda _module, _inputs, output: caught.record(name, output)


@contextmanager
def supervised_rows(model: PreTrainedModel, mask_BT: Tensor) -> Iterator[None]:
    """Logits only at the positions of `mask_BT`, as rows in row-major order: most of them are never looked at.

    Raises:
        DataError: the model has no output embeddings.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise DataError(f"model.name: {type(model).__name__} has no output embeddings, so it is no language model")
    handle = head.register_forward_pre_hook(lambda _module, inputs: (inputs[0][mask_BT], *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()
