"""Adapters merged into their base model's weights, and how much of the update rounding leaves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.other import transpose
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spd_dist.distributed.zero import gathered
from spd_dist.errors import DataError
from spd_dist.models.lora.adapters import ADAPTER, base_model, lora_layers, matrix
from spd_dist.models.save_weights import stored_parameters

LEAST_KEPT = 0.9
"""Share of an update that must survive the rounding of the weight it is added to."""


def merged_tensors(adapted: PeftModel, kept: dict[str, float] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The base model's stored tensors with the adapters merged in, whole, on the CPU, one at a time. A collective.

    Updates are added in float32 at least, and the sum is rounded once, to the base weight's dtype.

    Args:
        adapted: The model.
        kept: Gets of each merged weight 1 - |rounded update - update| / |update| (Frobenius).
    """
    model = base_model(adapted)
    layers = {id(adapted_parameter(layer)): layer for _, layer in lora_layers(model)}
    for name, parameter in stored_parameters(model).items():
        if ".lora_" in name:
            continue
        layer = layers.get(id(parameter))
        with gathered([parameter] if layer is None else cast("nn.Module", layer).parameters()), torch.no_grad():
            tensor = parameter.detach()
            if layer is not None:
                merged = _merged_weight(layer)
                base, tensor = tensor, merged.to(tensor.dtype)
                if kept is not None:
                    lost = (tensor - merged).norm() / (merged - base).norm().clamp(min=1e-30)
                    kept[name.replace("base_layer.", "")] = 1 - lost.item()
            yield name.replace("base_layer.", ""), tensor.to("cpu", copy=True)


def check_kept(kept: Mapping[str, float], dtype: torch.dtype) -> tuple[str, float]:
    """The weight that kept least of its update, and how much.

    Raises:
        DataError: too little: the merged model would be nearly the base model again.
    """
    name, fraction = min(kept.items(), key=lambda item: item[1])
    if fraction < LEAST_KEPT:
        raise DataError(
            f"finetune.merge: rounded to {str(dtype).removeprefix('torch.')}, {name} keeps {fraction:.0%} of its "
            f"update, less than {LEAST_KEPT:.0%}; start again in this run_dir with finetune.merge=false (training goes "
            "on from its checkpoint) and use the adapter beside the base model, or train with model.dtype=float32"
        )
    return name, fraction


def adapted_parameter(layer: LoraLayer) -> nn.Parameter:
    """The base model's parameter that the update of `layer` is added to."""
    if isinstance(layer, ParamWrapper):
        return layer.get_param()
    plain: Any = layer.get_base_layer()
    return plain.weight


def _merged_weight(layer: LoraLayer) -> Tensor:
    """In float32, or the base weight's dtype if that is wider."""
    base = adapted_parameter(layer).detach()
    dtype = torch.promote_types(base.dtype, torch.float32)
    if isinstance(layer, ParamWrapper):
        return base.to(dtype) + _experts_update(layer, dtype)
    is_transposed = isinstance(layer.get_base_layer(), Conv1D)
    weight = base.to(dtype)
    for adapter, scaling in layer.scaling.items():
        down_RD, up_OR = (matrix(kind, adapter).detach().to(dtype) for kind in (layer.lora_A, layer.lora_B))
        weight = weight + transpose(up_OR @ down_RD, is_transposed) * scaling
    if ADAPTER not in layer.lora_variant:
        return weight
    rows_OD = transpose(weight, is_transposed)
    scale_O = matrix(layer.lora_magnitude_vector).detach().to(dtype) / rows_OD.norm(dim=1)
    return transpose(rows_OD * scale_O[:, None], is_transposed)


def _experts_update(layer: ParamWrapper, dtype: torch.dtype) -> Tensor:
    """What the adapter adds to the weights of all experts: of shape (experts, out, in), or (experts, in, out)."""
    left, right, scaling = layer.get_delta_factors(ADAPTER)
    return left.detach().to(dtype) @ right.detach().to(dtype) * scaling
