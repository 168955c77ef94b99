"""Follow keys and values back to the linear modules that put them out, by autograd: names cannot be trusted.

A copy of the model is built from its config, at full depth and width but without weights. Each linear module in it puts
out a fresh leaf, whatever goes in: a dye. What the attention then takes as keys and values has a gradient at exactly the
outputs that it is made of. As it holds no weights, the copy is cheap for a model of any size, sharded or quantised.

Shapes: B batch, H heads, T tokens, D head width.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spd_dist.types import Kind

NUM_TOKENS = 4
ATTENTION = "spd_dist_dye"  # names a function in transformers' registry while the copy is built and run


@dataclass(frozen=True)
class Origin:
    """What one attention module takes as its keys, or as its values."""

    reader: str
    """Name of the attention module, or of the cache's layer where the model calls no attention function."""
    kind: Kind
    head_slots: Mapping[str, tuple[tuple[int, ...], ...]]
    """By linear module: for each head, the output features that it is made of. Empty if they are no module's output."""
    head_width: int
    num_calls: int
    """How often the linear modules run in one forward pass, at most."""


def output_width(module: nn.Module) -> int | None:
    """Number of features that a linear module puts out, adapter or not; None for any other module."""
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    if isinstance(module, Conv1D):
        return module.nf
    return module.out_features if hasattr(module, "out_features") else None


def trace_origins(model: PreTrainedModel) -> list[Origin]:
    """Where each attention module of `model` has its keys and values from, in the order of the forward pass."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        tap = _Tap()
        skeleton = _weightless_copy(model, tap)
        dyes = {name: _Dye(module) for name, module in skeleton.named_modules() if output_width(module)}
        _run(skeleton, tap)
        names = {module: name for name, module in skeleton.named_modules()}
        taken = tap.at_attention or tap.at_cache
        return [
            _origin(names.get(reader, str(reader)), kind, states, dyes)
            for reader, *both in taken
            for kind, states in zip(("key", "value"), both, strict=True)
        ]


class _Dye:
    """Makes a linear module put out a fresh leaf at each call."""

    def __init__(self, module: nn.Module) -> None:
        self.width = output_width(module)
        self.leaves: list[Tensor] = []
        if type(module) in (nn.Linear, Conv1D):
            module.forward = lambda states, *_, **__: self._leaf(states.shape[:-1])
        else:  # one with a forward of its own, as a router, may put out something else
            module.register_forward_hook(
                lambda _module, _inputs, output: self._leaf(output.shape[:-1]) if isinstance(output, Tensor) else output
            )

    def _leaf(self, shape: torch.Size) -> Tensor:
        leaf = torch.rand(*shape, self.width).sub_(0.5).requires_grad_()
        self.leaves.append(leaf)
        return leaf.clone()  # some models write in place on what a linear module puts out


class _Tap(DynamicCache):
    """Notes the keys and values that attention functions take; else those that go into the cache."""

    def __init__(self) -> None:
        super().__init__()
        self.at_attention: list[tuple[nn.Module, Tensor, Tensor]] = []
        self.at_cache: list[tuple[str, Tensor, Tensor]] = []

    def attention(
        self, module: nn.Module, query_BHTD: Tensor, key_BHTD: Tensor, value_BHTD: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, None]:
        """Stand in for an attention function of transformers: its output does not matter, so it is zero."""
        self.at_attention.append((module, key_BHTD, value_BHTD))
        batch, heads, tokens, _width = query_BHTD.shape
        return query_BHTD.new_zeros(batch, tokens, heads, value_BHTD.shape[-1]), None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Stand in for the cache of a model that has its own attention functions."""
        self.at_cache.append((f"cache layer {layer_idx}", key_states, value_states))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def _weightless_copy(model: PreTrainedModel, tap: _Tap) -> PreTrainedModel:
    """The model anew from its config: all its modules and no memory, every weight being one number, seen as a matrix.

    The class is called itself, since `from_config` would shard the copy while DeepSpeed's ZeRO-3 is configured.
    """
    config = copy.deepcopy(model.config)
    AttentionInterface.register(ATTENTION, tap.attention)
    config._attn_implementation = ATTENTION if _dispatches(model) else "eager"
    with torch.device("meta"):
        skeleton = type(model)(config).eval()
    for module in skeleton.modules():
        for name, weight in module.named_parameters(recurse=False):
            flat = torch.ones((), dtype=weight.dtype).expand(weight.shape)
            module.register_parameter(name, nn.Parameter(flat, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):  # zero frequencies: RoPE turns nothing
            module.register_buffer(name, torch.zeros_like(buffer, device="cpu"), persistent=False)
        if any(weight.dim() == 3 for weight in module.parameters(recurse=False)) and not isinstance(module, nn.Conv1d):
            module.forward = lambda states, *_, **__: (
                states
            )  # a bank of experts: the costly part, and never next to keys
    return skeleton


def _dispatches(model: PreTrainedModel) -> bool:
    """Whether the model's attention is looked up by name in transformers' registry; older ones see only the cache."""
    return "ALL_ATTENTION_FUNCTIONS" in vars(sys.modules[type(model).__module__])


def _run(skeleton: PreTrainedModel, tap: _Tap) -> None:
    tokens_BT = torch.arange(1, 1 + NUM_TOKENS)[None]
    cached = not _dispatches(skeleton) and "past_key_values" in inspect.signature(skeleton.forward).parameters
    skeleton(tokens_BT, use_cache=cached, **{"past_key_values": tap} if cached else {})


def _origin(reader: str, kind: Kind, states_BHTD: Tensor, dyes: Mapping[str, _Dye]) -> Origin:
    """Differentiate each head of the first token by every dye that it holds."""
    leaves = {(name, call): leaf for name, dye in dyes.items() for call, leaf in enumerate(dye.leaves)}
    head_slots: dict[str, tuple[tuple[int, ...], ...]] = {}
    if states_BHTD.requires_grad:
        grads = _gradients(states_BHTD[0, :, 0], list(leaves.values()))
        held = {place: leaf for (place, leaf), grad in zip(leaves.items(), grads, strict=True) if grad is not None}
        by_head = [_gradients(head_D, list(held.values())) for head_D in states_BHTD[0, :, 0]]
        for index, (name, _call) in enumerate(held):
            slots = tuple(_nonzero_features(grads[index]) for grads in by_head)
            if any(slots):
                head_slots[name] = slots
    num_calls = max((len(dyes[name].leaves) for name in head_slots), default=0)
    return Origin(reader, kind, head_slots, states_BHTD.shape[-1], num_calls)


def _gradients(states: Tensor, leaves: list[Tensor]) -> tuple[Tensor | None, ...]:
    weighted = (states * (0.5 + torch.rand(states.shape))).sum()
    return torch.autograd.grad(weighted, leaves, retain_graph=True, allow_unused=True)


def _nonzero_features(grad: Tensor | None) -> tuple[int, ...]:
    if grad is None:
        return ()
    return tuple(grad.flatten(0, -2).ne(0).any(dim=0).nonzero().flatten().tolist())
