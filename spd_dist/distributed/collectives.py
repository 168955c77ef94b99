"""What ranks say to each other beside DeepSpeed's own traffic: small decisions, and failures that are shared.

Every function from `any_rank` on is a collective: all ranks call it, in the same order.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch.distributed.distributed_c10d import (
    _get_default_store,  # pyright: ignore[reportPrivateUsage]  # there is no other way to it
)

from spd_dist.errors import UserError


def accelerator() -> Any:
    """What DeepSpeed computes on: the CPU, too. The types of its abstract class are those of no accelerator."""
    return get_accelerator()


def default_store() -> Any:
    """The store by which all ranks met, a torch.distributed.Store, of which torch types but a part."""
    return _get_default_store()


def collective_device() -> torch.device:
    """Where tensors must lie for the process group: the accelerator under NCCL, else the CPU."""
    return torch.device("cpu" if dist.get_backend() == "gloo" else accelerator().current_device_name())


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on at least one rank."""
    return max_over_ranks(float(flag)) > 0


def all_ranks(flag: bool) -> bool:
    """Whether `flag` is true on every rank."""
    return not any_rank(not flag)


def max_over_ranks(value: float) -> float:
    """The largest value of all ranks."""
    return _reduced(value, dist.ReduceOp.MAX)


def sum_over_ranks(value: float) -> float:
    """The sum of all ranks' values, in float64."""
    return _reduced(value, dist.ReduceOp.SUM)


def _reduced(value: float, operation: Any) -> float:
    total = torch.tensor(value, dtype=torch.float64, device=collective_device())
    dist.all_reduce(total, operation)
    return total.item()


def gather_objects(value: Any) -> list[Any]:
    """Every rank's `value`, in rank order: for small Python values. A process that joined no others is alone."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: Any, source: int = 0) -> Any:
    """The `value` of rank `source`, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, source)
    return values[0]


def broadcast_(tensors: Iterable[Tensor], source: int = 0) -> None:
    """Overwrite `tensors` by those of rank `source`; shapes and dtypes must agree."""
    for tensor in tensors:
        moved = tensor.to(collective_device(), copy=True).contiguous()
        dist.broadcast(moved, source)
        tensor.copy_(moved)


def max_over_ranks_(flag_N: Tensor) -> None:
    """Overwrite each entry by the largest of all ranks': flags that any rank may set. Without others it stays."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        on_device = flag_N.to(collective_device())
        dist.all_reduce(on_device, dist.ReduceOp.MAX)
        flag_N.copy_(on_device)


def all_equal(text: str) -> bool:
    """Whether every rank holds the same `text`: the check after a broadcast."""
    return len(set(gather_objects(text))) == 1


class together:
    """Local work that every rank does at once: if it fails on one, all raise that rank's error and none hangs.

    The body must hold no collective, since a rank that fails in the body skips the rest of it. An exception on a single
    rank inside collective code ends that process instead, and the others fail on the closed connection. Without a
    process group there is nobody to tell.
    """

    def __init__(self, doing: str) -> None:
        self.doing = doing

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, error: BaseException | None, trace: object) -> None:
        if not dist.is_initialized() or not any_rank(error is not None):
            return
        reports = gather_objects(None if error is None else _report(error))
        if isinstance(error, UserError):
            error.is_shared = True
        if error is None:
            rank, (error_type, message) = next((rank, report) for rank, report in enumerate(reports) if report)
            shared = error_type(f"{message} (on rank {rank}, while {self.doing})")
            shared.is_shared = True
            raise shared


def _report(error: BaseException) -> tuple[type[BaseException], str]:
    """What travels: a user's error as it is, any other as a RuntimeError with its traceback."""
    if isinstance(error, UserError):
        return type(error), str(error)
    return RuntimeError, "".join(traceback.format_exception(error))
