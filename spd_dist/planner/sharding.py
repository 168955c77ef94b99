"""What ZeRO-3 keeps on each rank, and how much of the weights is whole there at a time.

Sizes are in elements, one number a parameter, as in `Outline`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from spd_dist.config import Distributed


@dataclass(frozen=True)
class Zero:
    """The settings that memory depends on; the defaults are DeepSpeed's."""

    stage: int
    max_reuse_distance: int = 1_000_000_000
    prefetch_bucket_size: int = 50_000_000
    param_persistence_threshold: int = 100_000
    reduce_bucket_size: int = 500_000_000
    offloads_parameters: bool = False
    offloads_optimizer: bool = False

    @classmethod
    def of(cls, distributed: Distributed) -> Zero:
        """As a run would set them: the user's values over DeepSpeed's."""
        users: dict[str, Any] = distributed.deepspeed.get("zero_optimization", {})
        short = {name.removeprefix("stage3_"): value for name, value in users.items() if value != "auto"}
        names = ("max_reuse_distance", "prefetch_bucket_size", "param_persistence_threshold", "reduce_bucket_size")
        return cls(
            stage=distributed.zero_stage,
            offloads_parameters=_is_on_host(short.get("offload_param")),
            offloads_optimizer=_is_on_host(short.get("offload_optimizer")),
            **{name: int(float(short[name])) for name in names if name in short},
        )

    def shards(self, sizes: Iterable[int], num_ranks: int) -> int:
        """A rank's part of the parameters; each is padded to a multiple of the ranks."""
        return sum(-(-size // num_ranks) for size in sizes)

    def persistent(self, sizes: Iterable[int]) -> int:
        """Parameters that are too small to be sharded again after their first use."""
        return sum(size for size in sizes if size < self.param_persistence_threshold)

    def gathered_forward(self, sizes: Iterable[int]) -> int:
        """Whole at a time in a forward pass: what is computed with, and what is fetched ahead.

        What is fetched ahead is there twice, as it is copied out of the bucket in which it arrives.
        """
        sizes = [size for size in sizes if size >= self.param_persistence_threshold]
        return min(sum(sizes), max(sizes, default=0) + 2 * self.prefetch_bucket_size)

    def gathered_backward(self, sizes: Iterable[int], *, reused: int, checkpointing: bool = False) -> int:
        """Whole at the turn of a forward and backward pass: the last layers stay, as they are used again at once.

        `reused` are the elements that the backward pass uses again. With checkpointing, activations are few when a
        bucket arrives, and it is there beside its copies even if all weights are.
        """
        sizes = [size for size in sizes if size >= self.param_persistence_threshold]
        whole = sum(sizes)
        if checkpointing:
            whole += min(self.prefetch_bucket_size, whole - max(sizes, default=0))
        return min(whole, self.gathered_forward(sizes) + min(reused, self.max_reuse_distance // 2))


def _is_on_host(offload: Any) -> bool:
    return isinstance(offload, dict) and offload.get("device", "none") != "none"
