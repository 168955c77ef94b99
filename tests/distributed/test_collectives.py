"""What one rank knows, all know; what fails on one, fails on all."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks

from spd_dist.distributed import collectives
from spd_dist.distributed.collectives import together
from spd_dist.errors import DataError


def check_decisions_are_shared() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    assert collectives.any_rank(rank == size - 1)
    assert not collectives.any_rank(False)
    assert not collectives.all_ranks(rank > 0)
    assert collectives.all_ranks(True)
    assert collectives.max_over_ranks(rank) == size - 1
    assert collectives.sum_over_ranks(rank + 0.5) == sum(range(size)) + 0.5 * size
    assert collectives.gather_objects({"rank": rank}) == [{"rank": r} for r in range(size)]
    assert collectives.broadcast_object(rank, source=1) == 1
    assert collectives.all_equal("same")
    assert not collectives.all_equal(f"rank {rank}")
    tensors = [torch.full((3,), float(rank)), torch.full((2, 2), rank, dtype=torch.int64)]
    collectives.broadcast_(tensors, source=1)
    assert all((tensor == 1).all() for tensor in tensors)


def raise_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise DataError("row 7 is empty")


def check_failures_are_shared() -> None:
    rank = dist.get_rank()
    with pytest.raises(DataError, match="row 7 is empty"), together("reading the rows"):
        raise_on_rank_one()
    kind, message = (
        (ZeroDivisionError, "division by zero")
        if rank == 0
        else (RuntimeError, "ZeroDivisionError.*on rank 0, while dividing")
    )
    with pytest.raises(kind, match=f"(?s){message}"), together("dividing"):
        1 / rank
    with together("going on"):
        pass
    assert collectives.max_over_ranks(1) == 1  # every rank is still in step


def check_all() -> None:
    check_decisions_are_shared()
    check_failures_are_shared()


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_decisions_and_failures(world_size, tmp_path):
    run_on_ranks(world_size, tmp_path / "store", check_all)
