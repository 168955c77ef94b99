"""ZeRO-3 for stages without an optimizer: sharded modules, whole replicas, and a fingerprint of the weights.

A module is sharded if its parameters carry DeepSpeed's `ds_tensor`: the flat slice that this rank holds.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from deepspeed.runtime.zero.partition_parameters import DS_Z3_GATHERED_PARAM_CONTEXT_DEPTH_ATTR as HELD
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import set_z3_leaf_modules
from torch import Tensor, nn

from spd_dist.config import Distributed
from spd_dist.distributed.collectives import collective_device
from spd_dist.errors import ConfigError

CHUNK = 1 << 20  # words mixed at once: a few temporaries of 8 MiB
GOLDEN, MIX = 0x9E3779B97F4A7C15 - (1 << 64), 0xBF58476D1CE4E5B9 - (1 << 64)  # of splitmix64, as int64


def is_sharded(module: nn.Module) -> bool:
    """Whether ZeRO-3 holds the parameters of `module`."""
    return any(hasattr(parameter, "ds_tensor") for parameter in module.parameters())


def merge_settings(
    ours: Mapping[str, Any], users: Mapping[str, Any], prefix: str = "distributed.deepspeed"
) -> dict[str, Any]:
    """`ours` with what the user adds.

    Raises:
        ConfigError: a key to which both give a value, and not the same.
    """
    merged = dict(ours)
    for key, value in users.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key, {}), Mapping):
            merged[key] = merge_settings(merged.get(key, {}), value, f"{prefix}.{key}")
        elif key in merged and merged[key] != value:
            raise ConfigError(
                f"{prefix}.{key}: {value!r} conflicts with {merged[key]!r}, which spd_dist sets; remove the key"
            )
        else:
            merged[key] = value
    return merged


def check_offload(config: Distributed) -> None:
    """Refuse weights or optimizer states on NVMe: it needs a library of the system's, and no test shows it.

    Raises:
        ConfigError: `offload_param` or `offload_optimizer` names it.
    """
    for name in ("offload_param", "offload_optimizer"):
        offload = config.deepspeed.get("zero_optimization", {}).get(name)
        if isinstance(offload, Mapping) and offload.get("device") == "nvme":
            raise ConfigError(
                f"distributed.deepspeed.zero_optimization.{name}.device: nvme is not supported; set cpu, or take more "
                "ranks"
            )


def sharding_settings(config: Distributed, dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's configuration of a sharded module that is not trained.

    Raises:
        ConfigError: an offload that is not supported.
    """
    check_offload(config)
    ours = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 1 << 30,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }
    users = {key: value for key, value in config.deepspeed.items() if key == "zero_optimization"}
    return merge_settings(ours, users)


def frozen_engine(module: nn.Module, config: Distributed, dtype: torch.dtype) -> DeepSpeedEngine:
    """Shard `module` over all ranks, without an optimizer.

    Call `engine.module(...)`: outputs of the engine itself refuse to be differentiated. `end_engine` ends it.
    """
    engine, *_ = deepspeed.initialize(model=module, config=sharding_settings(config, dtype))
    return engine


def end_engine(engine: DeepSpeedEngine) -> None:
    """Take an engine off its module, for the next one or to be freed.

    A list and a cache of DeepSpeed's would hold them, with their weights and process groups, as long as this process.
    """
    module: Any = engine.module
    parts = set(module.modules())
    engine.destroy()
    FWD_MODULE_STACK[:] = [held for held in FWD_MODULE_STACK if held not in parts]
    _forget_released_parameters()


def _forget_released_parameters() -> None:
    """Empty the `lru_cache` of a method, whose keys are its engine's coordinator and modules; other engines fill it."""
    method = vars(PartitionedParameterCoordinator).get(
        f"_{PartitionedParameterCoordinator.__name__}__params_to_release"
    )
    cached: Any = inspect.getclosurevars(method).nonlocals.get("func") if inspect.isfunction(method) else None
    if hasattr(cached, "cache_clear"):  # DeepSpeed's own, which another version may not have
        cached.cache_clear()


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """The shape of a parameter that may be sharded."""
    fields = vars(parameter)  # where DeepSpeed puts what it knows of a shard
    return tuple(fields["ds_shape"]) if "ds_shape" in fields else tuple(parameter.shape)


@contextmanager
def gathered(parameters: Iterable[Tensor]) -> Generator[None]:
    """Whole parameters on every rank within this context, to be read, not written; a no-op unless they are sharded."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_tensor")]
    with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
        yield


def gather_as_one(module: nn.Module, kind: type) -> None:
    """Let ZeRO-3 gather all parameters inside each `kind` when it is called: for modules that read their parts'.

    To be called before the engine is made.
    """
    if any(isinstance(part, kind) for part in module.modules()):
        set_z3_leaf_modules(module, [kind])


@contextmanager
def linear_of_zero3() -> Generator[None]:
    """`torch.nn.functional.linear` as it is once a model was sharded: it keeps its input, also for frozen weights."""
    whole = torch.nn.functional.linear
    functional: Any = torch.nn.functional  # whose type says `linear` takes positions only
    functional.linear = zero3_linear_wrap
    try:
        yield
    finally:
        functional.linear = whole


@contextmanager
def full_replica(engine: DeepSpeedEngine | None, module: nn.Module) -> Generator[nn.Module]:
    """`module` with whole weights and without ZeRO's hooks: each rank calls it as often as it likes, alone.

    The gather and the return to shards are collectives. The hooks come back also when the body fails: DeepSpeed's own
    `unwrap_model_for_generation` has no `finally`.
    """
    if engine is None:
        yield module
        return
    offload = _offload_of(engine)
    for parameter in module.parameters():  # what a backward pass left, where it ended at an input without a gradient
        vars(parameter)["ds_active_sub_modules"].clear()
    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        # The last one compares the recorded order of modules with the other ranks': a rank that calls alone would wait.
        for hook in [*offload.forward_hooks, *offload.backward_hooks, offload.fwd_pre_hook]:
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield module
        finally:
            offload.fwd_pre_hook = offload.module.register_forward_pre_hook(
                lambda *_: offload.get_param_coordinator().reset_step()
            )
            offload._register_deepspeed_module(offload.module)  # also invalidates the recorded order of modules


def release_all(engine: DeepSpeedEngine) -> None:
    """Leave shards only, small parameters included, and nothing under way. Not a collective: the next pass gathers."""
    module: Any = engine.module
    if is_sharded(module):
        _offload_of(engine).empty_partition_cache()


def forget_order(engine: DeepSpeedEngine) -> None:
    """Let the next pass show the order of modules anew, and begin with shards only. On all ranks.

    After passes with a backward pass, DeepSpeed keeps what that would use again, though there are forward passes only.
    """
    release_all(engine)
    order = _offload_of(engine).get_param_coordinator()
    if not order.is_invalid_trace():
        order._invalidate_trace()
    _forget_released_parameters()  # by the order before


def _offload_of(engine: DeepSpeedEngine) -> Any:
    optimizer: Any = engine.optimizer
    return optimizer if hasattr(optimizer, "forward_hooks") else optimizer.parameter_offload


@torch.no_grad()
def weights_fingerprint(module: nn.Module) -> str:
    """A hash of names, shapes, dtypes and every bit of the weights, that does not depend on how they are sharded.

    Each rank mixes the words that it holds with their positions and sums them modulo 2**64; the sums of all ranks add
    up, so that no parameter is gathered.
    """
    named = list(_named_tensors(module))
    sums = torch.stack([_mixed_sum(*_held_words(parameter)) for _, parameter in named])
    if is_sharded(module):
        sums = sums.to(collective_device())
        dist.all_reduce(sums)
    digest = hashlib.blake2b(digest_size=16)
    for (name, parameter), total in zip(named, sums.tolist(), strict=True):
        digest.update(f"{name} {whole_shape(parameter)} {parameter.dtype} {total}\n".encode())
    return digest.hexdigest()


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters, and the scales of those that bitsandbytes stores as codes, which mean nothing without."""
    for name, parameter in module.named_parameters():
        yield name, parameter
        state = vars(parameter).get("quant_state")
        if state is not None:
            yield f"{name}.absmax", state.absmax
            if state.nested:
                yield f"{name}.absmax.absmax", state.state2.absmax
                yield f"{name}.absmax.offset", state.offset


def _held_words(parameter: Tensor) -> tuple[Tensor, int]:
    """The words of `parameter` that this rank holds, as integers, and the position of the first."""
    flat, start = parameter.detach().reshape(-1), 0
    if hasattr(parameter, "ds_tensor"):
        held = slice_of(parameter)
        flat, start = held.detach().reshape(-1), dist.get_rank() * held.numel()
        flat = flat[: max(0, vars(parameter)["ds_numel"] - start)]  # the last shards are padded
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64, 1: torch.int8}[flat.element_size()]
    return flat.view(words), start


def _mixed_sum(words: Tensor, start: int) -> Tensor:
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for offset in range(0, len(words), CHUNK):
        chunk = words[offset : offset + CHUNK].long()
        position = torch.arange(start + offset + 1, start + offset + 1 + len(chunk), device=words.device) * GOLDEN
        position ^= position >> 31
        total += ((chunk ^ position) * MIX ^ position).sum()
    return total


@contextmanager
def unsharded_for_write(parameters: Iterable[nn.Parameter]) -> Generator[None]:
    """Whole parameters, to be overwritten alike on every rank.

    A collective if they are sharded: shards take rank 0's values at exit. Parameters that an outer context holds whole
    (`full_replica`) are each rank's own, and are written where they are.
    """
    sharded = [parameter for parameter in parameters if _is_shard(parameter)]
    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0, enabled=bool(sharded)):
        yield


@contextmanager
def restored_on_exit(parameters: Iterable[nn.Parameter]) -> Generator[None]:
    """Parameters that have the same bits after this context as before it.

    Entering is a collective if they are sharded. Leaving is not: each rank puts its own slice back, so that a rank
    which fails alone waits for no other.
    """
    parameters = list(parameters)
    with unsharded_for_write(parameters):
        whole = [parameter.data.clone() for parameter in parameters]
    slices = [slice_of(parameter).data.clone() if _is_shard(parameter) else None for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, data, held in zip(parameters, whole, slices, strict=True):
                if held is not None:
                    slice_of(parameter).data.copy_(held)
                if parameter.data.shape == data.shape:  # ZeRO-3 keeps small parameters whole beside their slices
                    parameter.data.copy_(data)


def slice_of(parameter: Tensor) -> Tensor:
    """The flat slice of a sharded parameter that this rank holds."""
    return vars(parameter)["ds_tensor"]


def _is_shard(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_tensor") and not hasattr(parameter, HELD)
