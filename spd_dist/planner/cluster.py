"""What there is to run on, and how much there is to do."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from spd_dist.config import Config
from spd_dist.distributed.memory import PEAK_FLOPS
from spd_dist.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """One accelerator, by its data sheet; what of it a program gets is in `seconds.py`."""

    flops: float
    """Dense half-precision operations a second."""
    memory_bytes_per_second: float
    node_bytes_per_second: float
    """To the other accelerators of its host, in one direction."""
    network_bytes_per_second: float = 50e9
    """Its part of the host's network: 400 Gbit/s."""


DEVICES = {
    "H200": Device(PEAK_FLOPS["H200"], 4.8e12, 450e9),
    "H100": Device(PEAK_FLOPS["H100"], 3.35e12, 450e9),
    "A100": Device(PEAK_FLOPS["A100"], 2.0e12, 300e9, 25e9),
    "L40S": Device(PEAK_FLOPS["L40S"], 0.86e12, 32e9, 12.5e9),
}
"""By name."""


def device_named(name: str) -> Device:
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
    device: Device = DEVICES["H100"]
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
