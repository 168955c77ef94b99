"""The weights that a fine-tuning of all parameters began with, put in the place of the trained ones for a teacher.

LoRA needs none: its teacher is the model without the adapters.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from spd_dist.config import Distributed
from spd_dist.distributed.zero import release_all, slice_of
from spd_dist.errors import ConfigError

CHUNK = 1 << 22  # elements that change places at once
SECONDARY = "zero_hpz_partition_size"


class FrozenWeights:
    """What this rank holds of an engine's parameters, as it was: its slices under ZeRO-3, all of them elsewhere."""

    def __init__(self) -> None:
        self.engine: DeepSpeedEngine | None = None
        self.kept: list[Tensor] = []
        """Flat, one a parameter: the first weights, or the trained ones while those are in their place."""

    def keep(self, engine: DeepSpeedEngine) -> None:
        """Copy the weights of a new engine, before a step or a checkpoint changes them; later engines change nothing.

        Copied after the engine is made, which shards whole weights and may move them to the CPU.
        """
        if self.engine is None:
            self.engine = engine
            self.kept = [held.clone() for held in self._held()]

    def forget(self) -> None:
        """Give the memory back."""
        self.engine, self.kept = None, []

    @contextmanager
    def in_place(self) -> Generator[None]:
        """The first weights in the place of the trained ones, which come back with every bit. Not a collective."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        assert self.engine is not None  # `keep` comes before a pass
        release_all(self.engine)  # what is gathered is of the other weights
        for held, kept in zip(self._held(), self.kept, strict=True):
            for here, there in zip(held.split(CHUNK), kept.split(CHUNK), strict=True):
                moved = here.clone()
                here.copy_(there)
                there.copy_(moved)

    def _held(self) -> list[Tensor]:
        assert self.engine is not None
        module: Any = self.engine.module
        return [(slice_of(p) if hasattr(p, "ds_tensor") else p).data.view(-1) for p in module.parameters()]


def check_one_copy(config: Distributed) -> None:
    """See that ZeRO-3 keeps one slice of each weight a rank: a second one would stay the student's.

    Raises:
        ConfigError: `zero_hpz_partition_size` says that there are two.
    """
    value = config.deepspeed.get("zero_optimization", {}).get(SECONDARY, 1)
    if value != 1:
        raise ConfigError(
            f"distributed.deepspeed.zero_optimization.{SECONDARY}: {value} is not valid with finetune.loss=distil and "
            "finetune.mode=full, whose teacher takes the place of each rank's one slice of the weights; remove the "
            "key, or set finetune.mode=lora"
        )
