"""The optimizers that training engines are made with: AdamW, with states of 32 or of 8 bits."""

# bitsandbytes is an extra.
# pyright: reportMissingImports=false

from __future__ import annotations

import importlib.util
import logging
from typing import Any, Literal

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import nn

from spd_dist.distributed.collectives import accelerator
from spd_dist.distributed.zero import whole_shape
from spd_dist.errors import ConfigError

log = logging.getLogger(__name__)

OptimizerKind = Literal["adamw", "adamw_8bit"]


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters of `module` that want gradients; vectors (biases, norms) are not decayed."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if len(whole_shape(p)) > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if len(whole_shape(p)) <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(
    groups: list[dict[str, Any]], learning_rate: float, kind: OptimizerKind, *, on_host: bool
) -> torch.optim.Optimizer:
    """AdamW: fused on an accelerator; DeepSpeed's for states in the hosts' memory, where it builds; or of 8 bits.

    DeepSpeed compiles its own at first use. On a machine without accelerators that takes minutes and saves nothing.

    Raises:
        ConfigError: bitsandbytes, which has states of 8 bits, is missing.
    """
    if kind == "adamw_8bit":
        return _adamw_8bit(groups, learning_rate)
    if accelerator().device_name() == "cpu":
        return torch.optim.AdamW(groups, lr=learning_rate)
    if not on_host:
        return torch.optim.AdamW(groups, lr=learning_rate, fused=True)
    try:
        return DeepSpeedCPUAdam(groups, lr=learning_rate, adamw_mode=True)
    except (RuntimeError, ImportError, OSError) as error:  # no compiler, or none that fits
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        log.warning("DeepSpeed's CPU Adam does not build here (%s); torch's is used, which is slower", reason)
        return torch.optim.AdamW(groups, lr=learning_rate)


def _adamw_8bit(groups: list[dict[str, Any]], learning_rate: float) -> torch.optim.Optimizer:
    """AdamW of bitsandbytes: both moments as 8-bit codes with a scale a block of 256 (arXiv 2110.02861)."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "finetune.optimizer: adamw_8bit needs bitsandbytes; pip install 'spd_dist[quantized]', or set "
            "finetune.optimizer=adamw"
        )
    from bitsandbytes.optim.adamw import AdamW8bit

    return AdamW8bit(groups, lr=learning_rate)
