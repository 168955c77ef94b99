"""What is saved of a student, checked against the trained weights before anyone hears that it is done."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spd_dist.distributed.collectives import together
from spd_dist.distributed.zero import frozen_engine, is_sharded
from spd_dist.errors import DataError
from spd_dist.models.adapters import PeftModel, adapter_parameters, load_adapter, remove_adapters, save_adapter
from spd_dist.models.policy import Policy
from spd_dist.models.save import load_saved_model, probe_logits, save_model, whole_tensors
from spd_dist.runtime.artifacts import writing
from spd_dist.stages.finetune.job import Job

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Largest difference of logits, relative to the largest logit, that rounding explains."""


def export_adapter(
    policy: Policy, adapted: PeftModel, job: Job, probe: tuple[int, ...], trained_logits: Tensor
) -> dict[str, Any]:
    """Write `job.folder/adapter`, and leave `policy.model` without adapters. A collective."""
    folder = job.folder / "adapter"
    partial = _start(folder, job)
    tensors = dict(whole_tensors(adapter_parameters(adapted)))
    with together("saving the adapter"):
        if job.world.is_main:
            with writing(folder):
                save_adapter(adapted, tensors, partial)
                policy.tokenizer.save_pretrained(partial)
    remove_adapters(adapted)
    loaded = load_adapter(policy.model, partial)
    engine = frozen_engine(loaded, job.distributed, policy.model.dtype) if is_sharded(policy.model) else None
    difference = _difference(probe_logits(loaded, probe, job.world.device), trained_logits)
    if engine is not None:
        engine.destroy()
    remove_adapters(loaded)
    _finish(folder, partial, job, difference, policy.model.dtype)
    return {
        "adapter": folder.name,
        "num_trained_parameters": sum(t.numel() for t in tensors.values()),
        "logits_difference": difference,
    }


def export_model(policy: Policy, job: Job, probe: tuple[int, ...], trained_logits: Tensor) -> dict[str, Any]:
    """Write `job.folder/model`, and read it back on rank 0. A collective."""
    folder = job.folder / "model"
    partial = _start(folder, job)
    save_model(policy.model, policy.tokenizer, partial, world=job.world)
    difference = 0.0
    with together("reading the saved model back"):
        if job.world.is_main:
            loaded = load_saved_model(partial, policy.model.dtype).to(job.world.device)
            difference = _difference(probe_logits(loaded, probe, job.world.device), trained_logits)
    _finish(folder, partial, job, difference, policy.model.dtype)
    return {"model": folder.name, "logits_difference": difference}


def _start(folder: Path, job: Job) -> Path:
    partial = folder.with_name(folder.name + ".partial")
    with together("preparing to save"):
        if job.world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
    return partial


def _difference(logits: Tensor, expected: Tensor) -> float:
    return ((logits - expected).abs().max() / expected.abs().max()).item()


def _finish(folder: Path, partial: Path, job: Job, difference: float, dtype: torch.dtype) -> None:
    """Rename to the final name, if the logits agree.

    Raises:
        DataError: they do not.
    """
    with together("checking what was saved"):
        if not difference <= TOLERANCE[dtype]:
            raise DataError(
                f"{partial}: its logits differ from those of the trained model by {difference:.1e} of the largest, more than "
                f"{TOLERANCE[dtype]:.0e}; it is left there to look at, and finetune/checkpoints holds the trained weights"
            )
        if job.world.is_main:
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
