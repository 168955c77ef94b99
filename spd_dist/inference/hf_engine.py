"""Engines that call the policy itself, with the projection at its hooks or in its weights."""

from __future__ import annotations

import functools
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

from spd_dist.inference.decode import decode
from spd_dist.inference.placement import Placement
from spd_dist.inference.requests import Decoded, DecodeSettings, Request, half_batch
from spd_dist.inference.sampling import Sampling
from spd_dist.models.policy import Policy
from spd_dist.projection.hooks import ProjectionMonitor, projected
from spd_dist.types import Projection

INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}
"""By which a CPU computes in 16 bits, as torch names them."""


def is_slow_dtype(dtype: torch.dtype, device: torch.device, capabilities: Mapping[str, Any]) -> bool:
    """Whether this device only stores numbers of `dtype`, and computes in another: of `torch.cpu.get_capabilities`."""
    needed = INSTRUCTIONS.get(dtype, ())
    return device.type == "cpu" and bool(needed) and not any(capabilities.get(name) for name in needed)


@dataclass
class HFEngine:
    """Our decode loop on the Hugging Face model."""

    policy: Policy
    batch_size: int
    fixed_columns: int | None
    monitor: ProjectionMonitor | None
    placement: Placement
    section: str
    name: str = "hf"

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> Generator[Decoded, None, None]:
        """Completions as they finish."""
        return decode(
            self.policy.model,
            requests,
            DecodeSettings(sampling, frozenset(self.policy.eos_token_ids), self.policy.pad_token_id),
            batch_size=self.batch_size,
            fixed_columns=self.fixed_columns,
            smaller=functools.partial(half_batch, section=self.section, in_step=self.placement == "layerwise"),
        )


@contextmanager
def held_to(
    policy: Policy, projection: Projection | None, apply_as: Literal["hook", "fold"]
) -> Generator[ProjectionMonitor | None]:
    """The policy under `projection`, as the config has it applied; undone on every way out."""
    with nullcontext() if projection is None else projected(policy.model, projection, apply_as) as monitor:
        yield monitor
