"""What there is to run on, how much there is to do, and what ZeRO-3 keeps on each rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from spd_dist.config import Config, Distributed
from spd_dist.distributed.memory import PEAK_FLOPS
from spd_dist.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class DeviceSpec:
    """One accelerator, by its data sheet; what of it a program gets is in `seconds.py`."""

    flops: float
    """Dense half-precision operations a second."""
    memory_bytes_per_second: float
    node_bytes_per_second: float
    """To the other accelerators of its host, in one direction."""
    network_bytes_per_second: float = 50e9
    """Its part of the host's network: 400 Gbit/s."""


DEVICES = {
    "H200": DeviceSpec(PEAK_FLOPS["H200"], 4.8e12, 450e9),
    "H100": DeviceSpec(PEAK_FLOPS["H100"], 3.35e12, 450e9),
    "A100": DeviceSpec(PEAK_FLOPS["A100"], 2.0e12, 300e9, 25e9),
    "L40S": DeviceSpec(PEAK_FLOPS["L40S"], 0.86e12, 32e9, 12.5e9),
}
"""By name."""


def device_named(name: str) -> DeviceSpec:
    """One of `DEVICES`.

    Raises:
        ConfigError: it is not among them.
    """
    if name not in DEVICES:
        raise ConfigError(f"--gpu: {name} is not known; give the one that is most like it of {', '.join(DEVICES)}")
    return DEVICES[name]


@dataclass(frozen=True)
class Cluster:
    """Hosts of one kind."""

    nodes: int
    gpus_per_node: int
    gpu_memory_gib: float = 80.0
    host_memory_gib: float = 1024.0
    device: DeviceSpec = DEVICES["H100"]
    is_cpu: bool = False
    """Ranks without accelerators: memory that is reserved and never touched counts for nothing."""

    @property
    def num_ranks(self) -> int:
        """One for every accelerator."""
        return self.nodes * self.gpus_per_node

    def sized(self, nodes: int, gpus_per_node: int) -> Cluster:
        """So many of the same hosts, with so many of their accelerators in use."""
        return dataclasses.replace(self, nodes=nodes, gpus_per_node=gpus_per_node)

    def __str__(self) -> str:
        return f"{self.nodes} x {self.gpus_per_node}"


@dataclass(frozen=True)
class Workload:
    """How much a run reads and writes; lengths are means, and what a run must have room for is in its config."""

    num_train: int
    num_test: int
    prompt_tokens: int = 128
    answer_tokens: int = 128
    """Of a calibration example's reference answer."""
    completion_tokens: int = 256

    @classmethod
    def of(cls, config: Config, *, num_train: int = 7473, num_test: int = 1319, prompt_tokens: int = 128) -> Workload:
        """That of `config`, where it says so; else GSM8K's sizes. Completions are as long as they may be."""
        return cls(
            num_train=config.data.num_train or num_train,
            num_test=config.data.num_test or num_test,
            prompt_tokens=prompt_tokens,
            answer_tokens=min(128, config.calibrate.max_tokens),
            completion_tokens=config.generate.max_new_tokens,
        )


@dataclass(frozen=True)
class Zero:
    """The settings that memory depends on; the defaults are DeepSpeed's."""

    stage: int
    max_reuse_distance: int = 1_000_000_000
    max_live_parameters: int = 1_000_000_000
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

        def number(name: str, default: int) -> int:
            return int(float(short.get(name, default)))

        return cls(
            stage=distributed.zero_stage,
            max_reuse_distance=number("max_reuse_distance", cls.max_reuse_distance),
            max_live_parameters=number("max_live_parameters", cls.max_live_parameters),
            prefetch_bucket_size=number("prefetch_bucket_size", cls.prefetch_bucket_size),
            param_persistence_threshold=number("param_persistence_threshold", cls.param_persistence_threshold),
            reduce_bucket_size=number("reduce_bucket_size", cls.reduce_bucket_size),
            offloads_parameters=_is_on_host(short.get("offload_param")),
            offloads_optimizer=_is_on_host(short.get("offload_optimizer")),
        )

    def shards(self, sizes: Iterable[int], num_ranks: int) -> int:
        """A rank's part of the parameters; each is padded to a multiple of the ranks."""
        return sum(-(-size // num_ranks) for size in sizes)

    def persistent(self, sizes: Iterable[int]) -> int:
        """Parameters that are too small to be sharded again after their first use."""
        return sum(size for size in sizes if size < self.param_persistence_threshold)

    def gathered_forward(self, sizes: Iterable[int]) -> int:
        """Whole at a time in a forward pass, most of it fetched ahead, and what it is copied out of as it arrives."""
        sizes = self._sharded(sizes)
        return self._live(sizes) + self._arriving(sizes)

    def gathered_backward(self, sizes: Iterable[int], *, reused: int, checkpointing: bool = False) -> int:
        """Whole at the turn of a forward and backward pass: the last layers stay, as they are used again at once.

        `reused` are the elements that the backward pass uses again; what only the forward pass uses is gone. If all of
        them stay, nothing is fetched at the turn. With checkpointing, activations are few when a bucket arrives, and it
        is there beside its copies even if all weights are.
        """
        sizes = self._sharded(sizes)
        stays = min(reused, self.max_reuse_distance // 2)
        if stays < reused:
            stays = max(stays, self._live(sizes))
        return min(sum(sizes), stays) + checkpointing * self._arriving(sizes)

    def _live(self, sizes: Sequence[int]) -> int:
        """Each module fetches another bucket, until `max_live_parameters` are there; the last may be the largest."""
        return min(sum(sizes), self.max_live_parameters + max(sizes, default=0))

    def _arriving(self, sizes: Sequence[int]) -> int:
        """A bucket, or the one parameter that is larger."""
        largest = max(sizes, default=0)
        return largest if largest > self.prefetch_bucket_size else min(self.prefetch_bucket_size, sum(sizes) - largest)

    def _sharded(self, sizes: Iterable[int]) -> list[int]:
        return [size for size in sizes if size >= self.param_persistence_threshold]


def _is_on_host(offload: Any) -> bool:
    return isinstance(offload, dict) and offload.get("device", "none") != "none"
