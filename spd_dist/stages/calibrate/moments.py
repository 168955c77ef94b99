"""Second moments of gradients and activations at the KV sites, over the calibration examples.

`project.directions` and the controls of the mechanism test are cut of them.

Shapes: N token rows, D width of a site, H logical shards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from spd_dist.config import Calibrate
from spd_dist.distributed.collectives import collective_device
from spd_dist.models.policy import Policy
from spd_dist.stages.calibrate.gradient_rows import calibrate
from spd_dist.stages.context import StageContext
from spd_dist.types import KVSite, SupervisedExample

Moments = Mapping[KVSite, Tensor]
"""D x D, float64, on the CPU, the same on every rank."""


@dataclasses.dataclass(frozen=True)
class CalibrationMoments:
    """Of one pass over the examples; sums over their token rows."""

    gradient: Moments
    """G'G."""
    activation: Moments
    """A'A, of what the site's linear module puts out."""
    cross: Moments
    """(A'G + G'A) / 2: by how much the loss falls, to first order, if a direction is taken out."""

    def ranked_by(self, directions: str) -> Moments:
        """The matrices whose strongest eigenvectors are the directions of that name, as `project.directions` has it."""
        if directions == "gradient_x_activation":
            return {site: -cross_DD for site, cross_DD in self.cross.items()}
        return {"gradient": self.gradient, "activation": self.activation}[directions]


def gradient_moments(
    policy: Policy,
    examples: Sequence[SupervisedExample],
    sites: Sequence[KVSite],
    config: Calibrate,
    context: StageContext,
) -> CalibrationMoments:
    """The moments of the examples' gradient rows and of the activations at the same tokens. A collective.

    Each logical shard is summed by itself, and shards in their order: the same bits at every world size.
    """
    sums: dict[tuple[int, str, KVSite], Tensor] = {}
    quiet = dataclasses.replace(context, progress=None)
    with _recorded(policy.model, sites) as activations:
        for batch in calibrate(policy, examples, sites, config, quiet):
            for site in sites:
                grad_ND = batch.grad_ND[site].double().cpu()
                activation_ND = activations.rows(site).double().cpu()
                cross_DD = activation_ND.T @ grad_ND
                products = {
                    "gradient": grad_ND.T @ grad_ND,
                    "activation": activation_ND.T @ activation_ND,
                    "cross": (cross_DD + cross_DD.T) / 2,
                }
                for name, product_DD in products.items():
                    key = (batch.shard, name, site)
                    sums[key] = sums[key] + product_DD if key in sums else product_DD
    summed = {
        name: {site: _over_shards(sums, name, site, config.num_shards, context.world.size) for site in sites}
        for name in ("gradient", "activation", "cross")
    }
    return CalibrationMoments(summed["gradient"], summed["activation"], summed["cross"])


def moments_to_rank(
    directions: str,
    policy: Policy,
    examples: Sequence[SupervisedExample],
    sites: Sequence[KVSite],
    config: Calibrate,
    context: StageContext,
) -> Moments | None:
    """`ranked_by` of another pass over the examples; None for the gradients' own directions. A collective."""
    if directions == "gradient":
        return None
    return gradient_moments(policy, examples, sites, config, context).ranked_by(directions)


def _over_shards(
    sums: Mapping[tuple[int, str, KVSite], Tensor], name: str, site: KVSite, num_shards: int, world_size: int
) -> Tensor:
    """All shards' moments, added in their order; each is on one rank, so the sum over ranks adds zeros to it."""
    shape = (num_shards, site.width, site.width)
    shards_HDD = torch.zeros(shape, dtype=torch.float64)
    for shard in range(num_shards):
        if (shard, name, site) in sums:
            shards_HDD[shard] = sums[shard, name, site]
    if world_size > 1:
        moved = shards_HDD.to(collective_device())
        dist.all_reduce(moved)
        shards_HDD = moved.cpu()
    total_DD = torch.zeros(shape[1:], dtype=torch.float64)
    for shard_DD in shards_HDD:
        total_DD += shard_DD
    return total_DD


class _Activations:
    """What the linear modules at some sites put out in the latest forward pass."""

    def __init__(self) -> None:
        self.outputs: dict[str, Tensor] = {}
        self.mask_BT = torch.zeros(0, dtype=torch.bool)

    def rows(self, site: KVSite) -> Tensor:
        """One row (N, D) a token, in row-major order: as the gradients' rows."""
        rows_NF = self.outputs[site.module][self.mask_BT]
        return torch.cat([rows_NF[:, start:stop] for start, stop in site.columns], dim=1)

    def note(self, name: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        """Keep an output."""
        self.outputs[name] = output.detach()

    def note_mask(self, _model: nn.Module, _inputs: Any, named: Mapping[str, Any]) -> None:
        """Keep which positions of the pass are tokens."""
        self.mask_BT = named["attention_mask"].bool()


@contextmanager
def _recorded(model: nn.Module, sites: Sequence[KVSite]) -> Generator[_Activations]:
    found = _Activations()
    with ExitStack() as undo:
        undo.callback(model.register_forward_pre_hook(found.note_mask, with_kwargs=True).remove)
        for name in {site.module: None for site in sites}:
            hook = model.get_submodule(name).register_forward_hook(partial(found.note, name))
            undo.callback(hook.remove)
        yield found
