"""DeepSpeed engines that train: their settings, their checkpoints, and the change of world size between two runs."""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from spd_dist.config import Distributed
from spd_dist.distributed.zero import merge_settings
from spd_dist.errors import ConfigError

OURS = {
    "train_batch_size": "finetune.global_batch_size",
    "scheduler": "finetune.learning_rate and finetune.warmup_epochs",
}
"""DeepSpeed keys that the fixed global batch and the resumable schedule rule out, and what to set in their place."""


def training_settings(config: Distributed, dtype: torch.dtype, *, max_grad_norm: float) -> dict[str, Any]:
    """DeepSpeed's configuration for training: ours, with what the user's `distributed.deepspeed` adds.

    Raises:
        ConfigError: a key of the user's that conflicts with ours.
    """
    users = _without_auto(config.deepspeed)
    for key, instead in OURS.items():
        if key in users:
            raise ConfigError(f"distributed.deepspeed.{key}: {users[key]!r} is not DeepSpeed's to set; set {instead}")
    ours = {
        # Micro-batches vary in size and number, so the loop itself scales the loss and marks the boundary.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
        "steps_per_print": 1 << 30,
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": config.zero_stage},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }
    return merge_settings(ours, users)


def _without_auto(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without the "auto" values of Hugging Face's configurations: there ours hold."""
    plain = {key: _without_auto(value) if isinstance(value, Mapping) else value for key, value in settings.items()}
    return {key: value for key, value in plain.items() if value != "auto"}


def training_engine(
    module: nn.Module, settings: Mapping[str, Any], *, learning_rate: float, weight_decay: float
) -> DeepSpeedEngine:
    """An engine that trains the parameters of `module` that want gradients, with AdamW unless `settings` name another.

    Vectors (biases, norms) are not decayed.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if _num_dimensions(p) > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if _num_dimensions(p) <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # torch's own AdamW: DeepSpeed would compile one for minutes.
    given = (
        {"model_parameters": groups}
        if "optimizer" in settings
        else {"optimizer": torch.optim.AdamW(groups, lr=learning_rate)}
    )
    engine, *_ = deepspeed.initialize(model=module, config=dict(settings), **given)
    return engine


def _num_dimensions(parameter: nn.Parameter) -> int:
    return len(parameter.ds_shape) if hasattr(parameter, "ds_shape") else parameter.dim()


def accumulate(engine: DeepSpeedEngine, loss: torch.Tensor, *, is_last: bool) -> None:
    """Add the gradient of `loss`; the last one of a step also completes the reduction over ranks."""
    engine.set_gradient_accumulation_boundary(is_last)
    engine.backward(loss)


def set_learning_rate(engine: DeepSpeedEngine, fraction: float) -> float:
    """Set every group's learning rate to `fraction` of what it began with; returns the first one."""
    for group in engine.optimizer.param_groups:
        group["lr"] = group.setdefault("peak_lr", group["lr"]) * fraction
    return engine.optimizer.param_groups[0]["lr"]


def optimizer_step(engine: DeepSpeedEngine) -> float:
    """Clip, update, and forget the gradient; returns its norm before clipping."""
    norm = None
    if not (
        engine.zero_optimization() or engine.bfloat16_enabled() or engine.fp16_enabled()
    ):  # these know it only after
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    engine.step()
    return float(engine.get_global_grad_norm() if norm is None else norm)


def save_engine(engine: DeepSpeedEngine, folder: Path, tag: str, state: Mapping[str, Any]) -> None:
    """Write the trained parameters and the optimizer to `folder/tag`, every rank its shards; frozen parameters are left out."""
    engine.save_checkpoint(
        str(folder), tag=tag, client_state=dict(state), save_latest=False, exclude_frozen_parameters=True
    )


def load_engine(engine: DeepSpeedEngine, folder: Path, tag: str) -> dict[str, Any]:
    """Restore what `save_engine` wrote, at the same world size unless it was converted; returns the state."""
    _, state = engine.load_checkpoint(str(folder), tag=tag, load_module_strict=False, load_lr_scheduler_states=False)
    return state


def convert_to_universal(checkpoint: Path, target: Path) -> None:
    """Write a checkpoint in DeepSpeed's universal form, which any world size can load. One rank calls it."""
    arguments = argparse.Namespace(
        input_folder=str(checkpoint),
        output_folder=str(target),
        num_extract_workers=1,  # no child processes: ours may hold a process group and a device
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(arguments)
    (target.parent / "latest_universal").unlink()  # only a load without a tag would read it
