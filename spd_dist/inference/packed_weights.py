"""Linear layers on a CPU whose weights are laid out for its matrix products once, and not again at every call.

A product of few rows takes as long to lay the weights out as to multiply: with 16 rows SmolLM2's layers take 0.6 of
the time of torch's own `linear`. It is what `torch.compile` does where it freezes a model, without its minutes.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from spd_dist.distributed.collectives import accelerator

log = logging.getLogger(__name__)

MIN_ROWS = {torch.float32: 4, torch.bfloat16: 1}
"""With fewer, a product takes as long to read the weights as to make, in any layout."""
ROWS_IN_MIND = 32
"""The layout is of use to any number of rows; oneDNN wants to hear of one."""
FREE_SHARE = 0.25
"""Of the memory that this host has left: other ranks, and caches that grow, want it too."""
KEPT_PRODUCTS = 128
"""oneDNN and torch each keep a product for every number of rows that they met, 0.3 to 0.5 MiB; without a word, 1024."""
CACHES = {
    name: str(KEPT_PRODUCTS)
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    if name not in os.environ
}
"""Variables that are read at the first product: this process's, and not those of the programs that it starts."""
os.environ |= CACHES


@contextmanager
def packed_weights(model: nn.Module) -> Generator[None]:
    """Within it, the plain linear layers of `model` multiply by a copy of their weights in oneDNN's layout.

    In bfloat16 the results are the same bits; in float32 the order of sums is another. What is on an accelerator,
    sharded, trained or quantised stays as it is, and so does all where the copy would take a quarter of the memory that
    is left. The weights must neither change meanwhile nor be gathered from shards for each pass.
    """
    chosen = [module for module in model.modules() if isinstance(module, nn.Linear) and _gains(module)]
    needed = sum(module.weight.nbytes for module in chosen)
    if needed > FREE_SHARE * accelerator().available_memory():
        log.info("decoding without packed weights: a copy would take %.2f GiB", needed / 2**30)
        chosen = []
    for module in chosen:
        packed = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), ROWS_IN_MIND)
        vars(module)["forward"] = functools.partial(_linear, module, packed)
    try:
        yield
    finally:
        for module in chosen:
            del module.forward  # of the instance: that of the class is found again


def _gains(module: nn.Linear) -> bool:
    """Whether it is a plain one with all of its weight here, on a CPU for which oneDNN has products of its dtype."""
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    weight = module.weight
    if weight.device.type != "cpu" or weight.requires_grad or weight.shape != (module.out_features, module.in_features):
        return False
    return _has_products(weight.dtype)


@functools.cache
def _has_products(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    instructions = torch.backends.cpu.get_cpu_capability()
    if dtype == torch.bfloat16:
        return instructions == "AVX512" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 and instructions in {"AVX2", "AVX512"}


def _linear(module: nn.Linear, packed: Tensor, x: Tensor) -> Tensor:
    """`x` of shape (..., I) to (..., O)."""
    if x.numel() < MIN_ROWS[x.dtype] * module.in_features:
        return nn.functional.linear(x, module.weight, module.bias)
    return torch.ops.mkldnn._linear_pointwise(x, packed, module.bias, "none", [], "")
