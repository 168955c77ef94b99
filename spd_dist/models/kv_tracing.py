"""Follow keys and values back to the linear modules that put them out, by autograd: names cannot be trusted.

A copy of the model is built from its config, at full depth and width but without weights. Each linear module in it
puts out a fresh leaf, whatever goes in: a tracer. What the attention then takes as keys and values has a gradient at
exactly the outputs that it is made of. As it holds no weights, the copy is cheap for a model of any size, sharded or
quantised.

Shapes: B batch, H heads, T tokens, D head width.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import eager_mask
from transformers.pytorch_utils import Conv1D

from spd_dist.errors import DataError
from spd_dist.models.forward import call_model
from spd_dist.models.model_stats import FOREIGN_FAULTS
from spd_dist.types import Kind

NUM_TOKENS = 4
ATTENTION = "spd_dist_tracing"  # names a function in transformers' registry while the copy is built and run


@dataclass(frozen=True)
class Origin:
    """What one attention module takes as its keys, or as its values."""

    reader: str
    """Name of the attention module, or of the cache's layer where the model calls no attention function."""
    kind: Kind
    states_HD: Tensor
    """Those of the first token, where RoPE turns nothing, with their graph."""
    leaves: Mapping[str, Sequence[Tensor]]
    """What the linear modules that they are made of put out, by name: one leaf a call, be it used here or not."""

    def features(self, module: str) -> tuple[tuple[int, ...], ...]:
        """For each head, the output features of `module` that it is made of; the module has run once."""
        (leaf,) = self.leaves[module]
        return tuple(_nonzero_features(_gradients(head_D, [leaf])[0]) for head_D in self.states_HD)

    def states_of(self, module: str) -> Tensor:
        """Which of the states `module` takes part in, as a mask (H, D); the module has run once."""
        weight_HD = torch.ones_like(self.states_HD, requires_grad=True)
        (leaf,) = self.leaves[module]
        (grad,) = torch.autograd.grad(self.states_HD, leaf, weight_HD, create_graph=True)
        along = 0.5 + torch.rand(grad.shape, generator=torch.Generator().manual_seed(0))
        return torch.autograd.grad(grad, weight_HD, along, retain_graph=True)[0].ne(0)  # the Jacobian times `along`

    def num_features(self, module: str) -> int:
        """How many output features of `module` it is made of."""
        grads = _gradients(self.states_HD, self.leaves[module])
        return len(set().union(*map(_nonzero_features, grads)))


def output_width(module: nn.Module) -> int | None:
    """Number of features that a linear module puts out, adapter or not; None for any other module."""
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    if isinstance(module, Conv1D):
        return module.nf
    return cast("int", module.out_features) if hasattr(module, "out_features") else None


def trace_origins(model: PreTrainedModel) -> list[Origin]:
    """Where each attention module of `model` has its keys and values from, in the order of the forward pass.

    Raises:
        DataError: the model can't be built from its config, or can't run on token ids alone.
    """
    tap = _Tap()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        try:
            skeleton = _weightless_copy(model, tap)
            tracers = {
                name: _Tracer(module, width)
                for name, module in skeleton.named_modules()
                if (width := output_width(module))
            }
            _run(skeleton, tap)
        except FOREIGN_FAULTS as error:
            raise DataError(
                f"model.name: the keys and values of {type(model).__name__} can't be traced, as a copy of it does not "
                f"run on token ids alone ({type(error).__name__}: {error}); choose another model"
            ) from error
        names = {module: name for name, module in skeleton.named_modules()}
        return [
            _origin(reader if isinstance(reader, str) else names[reader], kind, states, tracers)
            for reader, *both in tap.at_attention or tap.at_cache
            for kind, states in zip(("key", "value"), both, strict=True)
        ]


class _Tracer:
    """Makes a linear module put out a fresh leaf at each call."""

    def __init__(self, module: nn.Module, width: int) -> None:
        self.module = module
        self.leaves: list[Tensor] = []
        plain = type(module) in (nn.Linear, Conv1D)
        module.forward = (lambda states: self._leaf((*states.shape[:-1], width))) if plain else self._own_forward

    def _own_forward(self, states: Tensor, *inputs: Any, **named: Any) -> Any:
        """For a module with a forward of its own: as a router, it may put out something else."""
        forward = type(self.module).forward
        if not states.is_meta:
            weightless = {name: weight.to("meta") for name, weight in self.module.named_parameters()}
            output = functional_call(self.module, weightless, (states.to("meta"), *inputs), named)
            if isinstance(output, Tensor):
                return self._leaf(output.shape)
        return forward(self.module, states, *inputs, **named)

    def _leaf(self, shape: tuple[int, ...]) -> Tensor:
        leaf = torch.rand(shape).sub_(0.5).requires_grad_()
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
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Stand in for the cache of a model that has its own attention functions."""
        self.at_cache.append((f"cache.{layer_idx}", key_states, value_states))
        return super().update(key_states, value_states, layer_idx)


def _weightless_copy(model: PreTrainedModel, tap: _Tap) -> PreTrainedModel:
    """The model anew from its config: all its modules and no memory, every weight being one number, seen as a matrix.

    The class is called itself, since `from_config` would shard the copy while DeepSpeed's ZeRO-3 is configured.
    """
    config = copy.deepcopy(model.config)
    AttentionInterface.register(ATTENTION, tap.attention)
    AttentionMaskInterface.register(ATTENTION, eager_mask)
    config._attn_implementation = (  # pyright: ignore[reportPrivateUsage]  # transformers has no public setter of configs
        ATTENTION if _dispatches(model) else "eager"
    )
    with torch.device("meta"):
        skeleton = type(model)(config).eval()
    for module in skeleton.modules():
        for name, weight in module.named_parameters(recurse=False):
            flat = torch.ones((), dtype=weight.dtype).expand(weight.shape)
            module.register_parameter(name, nn.Parameter(flat, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(name, torch.ones_like(buffer, device="cpu"), persistent=False)
        if _is_expert_bank(module):  # the costly part, and never next to keys
            module.forward = lambda *inputs, **named: (*inputs, *named.values())[0]
    return skeleton


def _is_expert_bank(module: nn.Module) -> bool:
    has_stacked_weights = any(weight.dim() == 3 for weight in module.parameters(recurse=False))
    return has_stacked_weights and not isinstance(module, nn.Conv1d) and not any(map(output_width, module.modules()))


def _dispatches(model: PreTrainedModel) -> bool:
    """Whether the model's attention is looked up by name in transformers' registry; older ones see only the cache."""
    return "ALL_ATTENTION_FUNCTIONS" in vars(sys.modules[type(model).__module__])


def _run(skeleton: PreTrainedModel, tap: _Tap) -> None:
    tokens_BT = torch.arange(1, 1 + NUM_TOKENS)[None]
    cached = not _dispatches(skeleton) and "past_key_values" in inspect.signature(skeleton.forward).parameters
    inputs = {"input_ids": tokens_BT, "use_cache": cached} | ({"past_key_values": tap} if cached else {})
    call_model(skeleton, inputs)


def _origin(reader: str, kind: Kind, states_BHTD: Tensor, tracers: Mapping[str, _Tracer]) -> Origin:
    leaves = {name: tracer.leaves for name, tracer in tracers.items() if tracer.leaves}
    states_HD = states_BHTD[0, :, 0]
    if not states_HD.requires_grad:
        return Origin(reader, kind, states_HD, {})
    flat = [leaf for calls in leaves.values() for leaf in calls]
    touched = {id(leaf) for leaf, grad in zip(flat, _gradients(states_HD, flat), strict=True) if grad is not None}
    held = {name: calls for name, calls in leaves.items() if any(id(leaf) in touched for leaf in calls)}
    return Origin(reader, kind, states_HD, held)


def _gradients(states: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Of a sum with weights from 0.5 to 1.5, so that nothing cancels."""
    weighted = (states * (0.5 + torch.rand(states.shape, generator=torch.Generator().manual_seed(0)))).sum()
    return torch.autograd.grad(weighted, leaves, retain_graph=True, allow_unused=True)


def _nonzero_features(grad: Tensor | None) -> tuple[int, ...]:
    if grad is None:
        return ()
    return tuple(grad.flatten(0, -2).ne(0).any(dim=0).nonzero().flatten().tolist())
