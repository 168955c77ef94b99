"""Engines that call the policy itself, with the projection at its hooks or in its weights."""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from spd_dist.config import Generate
from spd_dist.distributed.world import World
from spd_dist.inference.decode import Decoded, Request, decode
from spd_dist.inference.placement import Placement, placed
from spd_dist.inference.requests import half_batch
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
            sampling,
            eos_token_ids=self.policy.eos_token_ids,
            pad_token_id=self.policy.pad_token_id,
            batch_size=self.batch_size,
            fixed_columns=self.fixed_columns,
            smaller=functools.partial(half_batch, section=self.section, in_step=self.placement == "layerwise"),
        )


@contextmanager
def hf_engine(
    policy: Policy,
    projection: Projection | None,
    config: Generate,
    world: World,
    placement: Placement,
    *,
    section: str,
    longest: int | None = None,
) -> Iterator[HFEngine]:
    """The engine, with the policy projected and placed; both undone on every way out.

    `section` is the config's that the settings are from, for messages; `longest` the longest prompt and completion of
    the whole corpus: what fixed shapes have room for.
    """
    held = nullcontext() if projection is None else projected(policy.model, projection, config.apply_as)
    with held as monitor, placed(policy, placement, world, "generating completions"):
        fixed_columns = longest if config.batch_invariant else None
        yield HFEngine(policy, config.batch_size, fixed_columns, monitor, placement, section)
