"""DeepSpeed engines that train: settings, checkpoints written while training goes on, and a change of world size."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import deepspeed
import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import nn

from spd_dist.config import Distributed
from spd_dist.distributed.checkpoint_safety import data_alone
from spd_dist.distributed.collectives import accelerator
from spd_dist.distributed.optimizers import OptimizerKind, make_optimizer, parameter_groups
from spd_dist.distributed.zero import check_offload, end_engine, merge_settings
from spd_dist.errors import ConfigError, DataError
from spd_dist.types import Json


class BackgroundWriter(TorchCheckpointEngine):
    """DeepSpeed's checkpoint engine, except that `save` only copies, and that no failure is raised inside it.

    A rank that raised in the middle of `save_checkpoint` would leave the others waiting in its collectives. So failures
    wait for `digests`, and the caller shares them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._written: dict[Path, Future[str]] = {}

    def save(self, state_dict: Mapping[str, Any], path: str) -> None:
        """Copy the state to the CPU, and have it written."""
        self._written[Path(path)] = self._thread.submit(_write, _copied(state_dict), Path(path))

    @property
    def is_idle(self) -> bool:
        """Whether everything is written, or has failed."""
        return all(future.done() for future in self._written.values())

    def digests(self) -> dict[str, str]:
        """SHA-256 of each file that this rank wrote since the last call, by name; waits for them.

        Raises:
            DataError: a file could not be written.
        """
        written, self._written = self._written, {}
        digests = {}
        for path, future in written.items():
            error = future.exception()
            if error is not None:
                raise DataError(
                    f"{path} cannot be written: {error}; make room or fix the permissions, and start the same command "
                    "again: earlier checkpoints are kept"
                )
            digests[path.name] = future.result()
        return digests

    def close(self) -> None:
        """Wait for the thread to end."""
        self._thread.shutdown()


def _copied(value: Any) -> Any:
    """`value` with every tensor copied to the CPU and everything else deeply copied: training will change both."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return type(value)((key, _copied(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    return copy.deepcopy(value)


def _write(state: Mapping[str, Any], path: Path) -> str:
    with open(path, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


OURS = {
    "train_batch_size": "finetune.global_batch_size",
    "scheduler": "finetune.learning_rate and finetune.warmup_epochs",
}
"""DeepSpeed keys that the fixed global batch and the resumable schedule rule out, and what to set in their place."""
COMPILED = {"adam", "adamw", "muon"}
"""Optimizers for which DeepSpeed compiles an Adam, unless told `torch_adam`."""


def training_settings(config: Distributed, dtype: torch.dtype, *, max_grad_norm: float) -> dict[str, Any]:
    """DeepSpeed's configuration for training: ours, with what the user's `distributed.deepspeed` adds.

    Raises:
        ConfigError: a key of the user's that conflicts with ours.
    """
    check_offload(config)
    users = _without_auto(config.deepspeed)
    for key, instead in OURS.items():
        if key in users:
            raise ConfigError(f"distributed.deepspeed.{key}: {users[key]!r} is not DeepSpeed's to set; set {instead}")
    ours: dict[str, Any] = {
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
    if dtype == torch.bfloat16 and config.zero_stage >= 2 and "data_types" not in users:
        ours["data_types"] = {"grad_accum_dtype": "fp32"}  # else what many micro-batches add is rounded each time
    settings = merge_settings(ours, users)
    optimizer: dict[str, Any] = settings.get("optimizer", {})
    if str(optimizer.get("type", "")).lower() not in COMPILED or accelerator().device_name() != "cpu":
        return settings
    # On a CPU, Adam is torch's own: DeepSpeed's is compiled at first use, for minutes, and needs a compiler.
    own: dict[str, Any] = {"params": {"torch_adam": True} | optimizer.get("params", {})}
    return merge_settings(settings, {"optimizer": own})


def _without_auto(settings: Mapping[str, Json]) -> Mapping[str, Json]:
    """Settings without the "auto" values of Hugging Face's configurations: there ours hold."""
    plain = {key: _without_auto(value) if isinstance(value, Mapping) else value for key, value in settings.items()}
    return {key: value for key, value in plain.items() if value != "auto"}


def training_engine(
    module: nn.Module,
    settings: Mapping[str, Any],
    *,
    learning_rate: float,
    weight_decay: float,
    kind: OptimizerKind = "adamw",
) -> DeepSpeedEngine:
    """An engine that trains the parameters of `module` that want gradients, by `kind` unless `settings` name another.

    Vectors (biases, norms) are not decayed.

    Raises:
        ConfigError: DeepSpeed does not take the settings.
    """
    groups = parameter_groups(module, weight_decay)
    on_host = settings.get("zero_optimization", {}).get("offload_optimizer", {}).get("device") == "cpu"
    ours = None if "optimizer" in settings else make_optimizer(groups, learning_rate, kind, on_host=on_host)
    parameters: Any = groups if ours is None else None  # groups, too, which DeepSpeed's type does not say
    try:
        engine, *_ = deepspeed.initialize(
            model=module,
            config=dict(settings),
            optimizer=ours,
            model_parameters=parameters,
        )
    except (ValueError, AssertionError) as error:
        raise ConfigError(
            f"distributed.deepspeed, model.dtype: DeepSpeed does not take these settings: {error}; change them"
        ) from error
    engine.checkpoint_engine = BackgroundWriter()
    # It puts scripts beside the checkpoints, on rank 0 alone, where a full disk would part it from the other ranks.
    vars(engine)["_copy_recovery_script"] = lambda _: None
    for group in _groups(engine):
        group["initial_lr"] = group["lr"]
    return engine


def writer_of(engine: DeepSpeedEngine) -> BackgroundWriter:
    """What writes the engine's checkpoints."""
    assert isinstance(engine.checkpoint_engine, BackgroundWriter)  # `training_engine` put it there
    return engine.checkpoint_engine


def close_engine(engine: DeepSpeedEngine) -> None:
    """Take the engine off its module, for the next one."""
    writer_of(engine).close()
    end_engine(engine)


def _groups(engine: DeepSpeedEngine) -> list[dict[str, Any]]:
    optimizer: Any = engine.optimizer  # one of its wrappers, or a plain one
    return optimizer.param_groups


def _module(engine: DeepSpeedEngine) -> nn.Module:
    return cast("nn.Module", engine.module)


def accumulate(engine: DeepSpeedEngine, loss: torch.Tensor, *, is_last: bool) -> None:
    """Add the gradient of `loss`; the last one of a step also completes the reduction over ranks."""
    engine.set_gradient_accumulation_boundary(is_last)
    engine.backward(loss)


def set_learning_rate(engine: DeepSpeedEngine, fraction: float) -> float:
    """Set every group's learning rate to `fraction` of what it was made with; returns the first one."""
    groups = _groups(engine)
    for group in groups:
        group["lr"] = group["initial_lr"] * fraction
    return groups[0]["lr"]


def optimizer_step(engine: DeepSpeedEngine) -> float:
    """Clip, update, and forget the gradient; returns its norm before clipping."""
    norm = None
    if not (
        engine.zero_optimization() or engine.bfloat16_enabled() or engine.fp16_enabled()
    ):  # these know it only after
        norm = torch.nn.utils.get_total_norm([p.grad for p in _module(engine).parameters() if p.grad is not None])
    engine.step()
    last: Any = engine.get_global_grad_norm()
    return float(last if norm is None else norm)


def save_engine(engine: DeepSpeedEngine, folder: Path, tag: str) -> None:
    """Have the trained parameters and the optimizer written to `folder/tag`, every rank its shards, in the background.

    Frozen parameters are left out. `engine.checkpoint_engine.digests()` tells the end and the outcome.
    """
    engine.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=True)


def load_engine(engine: DeepSpeedEngine, folder: Path, tag: str) -> None:
    """Restore what `save_engine` wrote, at the same world size unless it was converted."""
    groups = _groups(engine)
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    with data_alone():
        engine.load_checkpoint(str(folder), tag=tag, load_module_strict=False, load_lr_scheduler_states=False)
    # From a universal checkpoint, DeepSpeed gives every group the settings of the first, and one step counter to all of
    # them, which then counts as many steps at once as there are groups.
    for group, own in zip(_groups(engine), settings, strict=True):
        group.update(own)
    for state in _base_optimizer(engine).state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


def _base_optimizer(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    """The optimizer inside ZeRO's or the mixed precision's wrapper."""
    outer: Any = engine.optimizer
    return outer if isinstance(outer, torch.optim.Optimizer) else outer.optimizer
