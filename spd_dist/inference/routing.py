"""How a mixture's routers spread tokens over its experts, counted while the model reads.

N: tokens; E: experts of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

NUM_READ = 64
"""Prompts, the first of the test set, that routers are counted on."""


@dataclass(frozen=True)
class RouterSummary:
    """How evenly tokens were spread over experts: of the same texts for every arm, so that arms can be compared."""

    num_layers: int
    """With a router."""
    num_experts: int
    """Of each."""
    num_routed: int
    """Choices of an expert, over all tokens and layers."""
    entropy: float
    """Of the shares of the experts, over the logarithm of their number: 1 is even. The mean over layers."""
    largest_load: float
    """The share of the most chosen expert, times their number: 1 is even. The largest over layers."""
    num_unused: int
    """Experts that no token chose, over all layers."""
    shares: list[list[float]]
    """Of each layer's experts."""


@torch.no_grad()
def route_counts(model: PreTrainedModel, texts: Iterable[Sequence[int]]) -> dict[str, Tensor]:
    """How often each expert is chosen while `model` reads `texts` of tokens, one at a time: counts_E by router."""
    settings = model.config.get_text_config().to_dict()
    num_chosen = int(settings.get("num_experts_per_tok") or 1)
    counts: dict[str, Tensor] = {}

    def add(name: str, logit_NE: Tensor) -> None:
        logit_NE = logit_NE.flatten(0, -2)
        chosen = logit_NE.topk(num_chosen, dim=-1).indices.flatten()
        found_E = torch.bincount(chosen, minlength=logit_NE.shape[1]).cpu()
        counts[name] = counts[name] + found_E if name in counts else found_E

    def hook(name: str, index: int) -> Any:
        return lambda _, __, output: add(name, output[index] if isinstance(output, tuple) else output)

    handles = [module.register_forward_hook(hook(name, index)) for name, module, index in routers(model)]
    device = next(model.parameters()).device
    try:
        for tokens in texts:
            model(torch.tensor([list(tokens)], device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return counts


def routers(model: PreTrainedModel) -> list[tuple[str, nn.Module, int]]:
    """Name and module of each router, and where its logits are in what it puts out; none where transformers has none.

    Transformers names a model's routers where it records their logits.
    """
    classes = {type(part) for part in model.modules() if isinstance(part, PreTrainedModel)}
    recorded: list[Any] = [vars(base).get("_can_record_outputs") for one in classes for base in one.__mro__]
    entries = [found["router_logits"] for found in recorded if isinstance(found, dict) and "router_logits" in found]
    found = []
    for name, module in model.named_modules():
        for entry in entries:
            kind, index, layer = (entry, 0, None) if isinstance(entry, type) else _described(entry)
            if isinstance(module, kind) and (layer is None or layer in name):
                found.append((name, module, index))
                break
    return found


def _described(entry: Any) -> tuple[type[nn.Module], int, str | None]:
    return entry.target_class, entry.index, entry.layer_name


def router_summary(everyones: Sequence[Mapping[str, Tensor]]) -> RouterSummary:
    """The counts of all ranks in numbers."""
    total: dict[str, Tensor] = {}
    for counts in everyones:
        for name, count_E in counts.items():
            total[name] = total.get(name, torch.zeros_like(count_E)) + count_E
    shares = [(count_E.double() / max(1, int(count_E.sum()))).tolist() for count_E in total.values()]
    num_experts = len(shares[0])
    entropies = [-sum(share * math.log(share) for share in layer if share > 0) for layer in shares]
    return RouterSummary(
        num_layers=len(shares),
        num_experts=num_experts,
        num_routed=sum(int(count_E.sum()) for count_E in total.values()),
        entropy=sum(entropies) / len(entropies) / math.log(max(2, num_experts)),
        largest_load=max(share for layer in shares for share in layer) * num_experts,
        num_unused=sum(share == 0 for layer in shares for share in layer),
        shares=[[round(share, 6) for share in layer] for layer in shares],
    )
