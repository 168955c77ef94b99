"""Overwrite a module's weights for a while, whole or sharded by ZeRO-3, and bring the old bits back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import DS_Z3_GATHERED_PARAM_CONTEXT_DEPTH_ATTR as HELD
from torch import nn


@contextmanager
def writable(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Whole parameters, to be overwritten alike on every rank.

    A collective if they are sharded: shards take rank 0's values at exit. Parameters that an outer context holds whole
    (`full_replica`) are each rank's own, and are written where they are.
    """
    sharded = [parameter for parameter in parameters if _is_shard(parameter)]
    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0, enabled=bool(sharded)):
        yield


@contextmanager
def preserved(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Parameters that have the same bits after this context as before it.

    Entering is a collective if they are sharded. Leaving is not: each rank puts its own slice back, so that a rank
    which fails alone waits for no other.
    """
    parameters = list(parameters)
    with writable(parameters):
        whole = [parameter.data.clone() for parameter in parameters]
    slices = [parameter.ds_tensor.data.clone() if _is_shard(parameter) else None for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, data, held in zip(parameters, whole, slices, strict=True):
                if held is not None:
                    parameter.ds_tensor.data.copy_(held)
                if parameter.data.shape == data.shape:  # ZeRO-3 keeps small parameters whole beside their slices
                    parameter.data.copy_(data)


def _is_shard(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_tensor") and not hasattr(parameter, HELD)
