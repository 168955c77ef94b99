"""Fold a projection into weights and biases: z = xW' + b becomes op(z) = x op(W') + op(b), exactly, at no cost."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spd_dist.distributed.zero import restored_on_exit, unsharded_for_write
from spd_dist.errors import ConfigError
from spd_dist.models.lora import LEAST_KEPT
from spd_dist.projection.operators import SitePart, Target

FOLDABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REMEDY = "set generate.engine=hf and generate.apply_as=hook"
FINE = 1e-5
"""Of a weight's norm: rounding that is smaller matters to nobody, as that of float32."""


class Output(NamedTuple):
    """A parameter that a module's output is linear in, and its dimension of output features."""

    parameter: nn.Parameter
    dim: int


@contextmanager
def folded(model: nn.Module, found: list[Target], insertion: str) -> Generator[None]:
    """`model` with `found` folded into its weights; the saved weights come back at exit, bit by bit.

    Raises:
        ConfigError: a fold that would not be exact, with the reason; nothing was changed.
    """
    outputs = fold_plan(model, found, insertion)
    parameters = [output.parameter for group in outputs for output in group]
    with restored_on_exit(parameters):
        _write_(found, outputs)
        yield


def fold_for_good_(model: nn.Module, found: list[Target], insertion: str) -> None:
    """Fold `found` into the weights of `model`, which stay so.

    Raises:
        ConfigError: a fold that would not be exact, with the reason; nothing was changed.
    """
    _write_(found, fold_plan(model, found, insertion))


def _write_(found: list[Target], outputs: list[list[Output]]) -> None:
    with unsharded_for_write([output.parameter for group in outputs for output in group]):
        for target, group in zip(found, outputs, strict=True):
            for output in group:
                check_fold_kept(output.parameter.data, output.dim, target.parts)
        for target, group in zip(found, outputs, strict=True):
            for output in group:
                fold_(output.parameter.data, output.dim, target.parts)


@torch.no_grad()
def fold_(weight: Tensor, dim: int, parts: list[SitePart]) -> None:
    """Apply the operators of `parts` along dimension `dim` of a weight or bias: in float64, rounded once."""
    rows_O = weight.movedim(dim, -1)
    for part in parts:
        z_D = part.columns.read(rows_O).double()
        part.columns.write_(rows_O, part.apply(z_D).to(weight.dtype))


@torch.no_grad()
def check_fold_kept(weight: Tensor, dim: int, parts: list[SitePart]) -> None:
    """See that the weight's dtype can hold what the operators change: a mild one in 16 bits may be rounded away.

    Raises:
        ConfigError: less than `LEAST_KEPT` of the change would be left.
    """
    for part in parts:
        z_D = part.columns.read(weight.movedim(dim, -1)).double()
        exact_D = part.apply(z_D)
        lost, change = ((one_D - exact_D).norm().item() for one_D in (exact_D.to(weight.dtype).double(), z_D))
        if lost > (1 - LEAST_KEPT) * change and lost > FINE * exact_D.norm().item():
            raise ConfigError(
                f"project.mode: folded into {str(weight.dtype).removeprefix('torch.')} weights, {part.site} keeps "
                f"{max(0.0, 1 - lost / change):.0%} of what the projection changes, less than {LEAST_KEPT:.0%}; "
                f"{REMEDY}, or model.dtype=float32"
            )


def fold_plan(model: nn.Module, found: list[Target], insertion: str) -> list[list[Output]]:
    """What must be rewritten for each target.

    Raises:
        ConfigError: a fold that would not be exact.
    """
    refuse_inexact([part for target in found for part in target.parts], insertion)
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    outputs = [_outputs(target) for target in found]
    for target, group in zip(found, outputs, strict=True):
        for output in group:
            shared = names[id(output.parameter)]
            if len(shared) > 1:
                raise ConfigError(
                    f"{target.name}: its weights are tied ({' = '.join(shared)}), a fold would change both; {REMEDY}"
                )
    return outputs


def refuse_inexact(parts: list[SitePart], insertion: str) -> None:
    """Raise for what no weights can express.

    Raises:
        ConfigError: keys after RoPE, or keys of latent attention that come out of two modules.
    """
    for site in (part.site for part in parts if part.site.kind == "key"):
        if insertion == "rope":
            raise ConfigError(
                f"project.insertion=rope: after RoPE the map of {site} would have to turn with the position, so it "
                f"cannot be folded into weights; {REMEDY} or project.insertion=linear"
            )
        if site.module.endswith("kv_a_proj_with_mqa"):
            raise ConfigError(
                f"{site}: {site.module} makes the latent that keys and values share and the rotary part of the key; a "
                f"map of the whole key cannot be folded into it; {REMEDY} or project.kinds=value"
            )


def _outputs(target: Target) -> list[Output]:
    module: Any = target.module
    if not hasattr(module, "base_layer"):
        return _plain_outputs(target.name, module)
    if not hasattr(module, "lora_B"):
        raise ConfigError(
            f"{target.name} is wrapped as {type(module).__name__}, only LoRA can be folded; merge it first, or {REMEDY}"
        )
    outputs = _plain_outputs(target.name, module.base_layer)
    if module.lora_variant and set(module.lora_variant) - set(module.merged_adapters):
        raise ConfigError(
            f"{target.name} has an adapter whose output is not linear in its weights (DoRA or another variant): merge "
            f"it first (merge_and_unload), or {REMEDY}"
        )
    for adapter in module.lora_B.values():
        outputs += _plain_outputs(target.name, adapter)
    return outputs


def _plain_outputs(name: str, module: nn.Module) -> list[Output]:
    is_linear = isinstance(module, (Conv1D, nn.Linear))
    if not is_linear or module.weight.dtype not in FOLDABLE or type(module.weight.data) is not Tensor:
        detail = f" of {module.weight.dtype}" if hasattr(module, "weight") else ""
        raise ConfigError(
            f"{name} is a {type(module).__name__}{detail}: quantised weights cannot hold the folded values exactly "
            f"(4-bit leaks some 7 %); {REMEDY}, or keep this module in 16 bits"
        )
    linear: Any = module  # torch's type leaves out that a bias may be None
    dim = 1 if isinstance(module, Conv1D) else 0
    return [Output(linear.weight, dim)] + ([Output(linear.bias, 0)] if linear.bias is not None else [])
