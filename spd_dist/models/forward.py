"""A model's forward pass: by inputs that its architecture takes, and by the fused kernels of liger-kernel."""

# liger-kernel is no dependency: it needs an accelerator.
# pyright: reportMissingImports=false
from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from spd_dist.errors import ConfigError


def call_model(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """What a Hugging Face model gives of `inputs`, which are named as its `forward` names them.

    Which of them there may be (`position_ids`, `logits_to_keep`, the ends of packed sequences) is the architecture's.
    """
    return model(**inputs)


def use_liger(model: PreTrainedModel, device: torch.device) -> None:
    """Let `model` run its norms and MLPs by liger's kernels, where liger knows its architecture.

    Its fused loss is left out, since ours never holds the logits either; its rotary embedding too, since that would be
    replaced for every model of the process.

    Raises:
        ConfigError: liger-kernel is not installed, or there is no accelerator.
    """
    if device.type == "cpu":
        raise ConfigError("finetune.liger: True is not valid on the CPU; set finetune.liger=false")
    if importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError(
            "finetune.liger: True needs liger-kernel; pip install liger-kernel, or set finetune.liger=false"
        )

    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        known = ", ".join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))
        raise ConfigError(
            f"finetune.liger: True is not valid for a {model.config.model_type} model; liger knows {known}"
        )
    _apply_liger_kernel_to_instance(model=model, rope=False, cross_entropy=False, fused_linear_cross_entropy=False)
