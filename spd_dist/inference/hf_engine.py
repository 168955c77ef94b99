"""Engines that call the policy itself, with the projection at its hooks or in its weights."""

from __future__ import annotations

import functools
from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

from spd_dist.inference.decode import decode
from spd_dist.inference.placement import Placement
from spd_dist.inference.requests import Decoded, DecodeSettings, Request, half_batch
from spd_dist.inference.sampling import Sampling
from spd_dist.models.policy import Policy
from spd_dist.projection.hooks import ProjectionMonitor, projected
from spd_dist.types import Projection


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
