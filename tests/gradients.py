"""Streams of gradient rows for the tests of sketch, reduce and project."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from spd_dist.config import Project, Sketch
from spd_dist.distributed.world import World
from spd_dist.stages.sketch import ShardPlan, ShardSketch, sketch
from spd_dist.types import GradientBatch, KVSite

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


def kv_site(layer: int = 0, kind: str = "key", width: int = 8, num_heads: int = 1) -> KVSite:
    """A site whose module puts out nothing else."""
    return KVSite(layer, kind, f"layers.{layer}.{kind}", ((0, width),), num_heads)


def power_law(num_rows: int, width: int, *, decay: float = 1.0, seed: int = 0) -> Tensor:
    """Rows whose i-th singular value falls as i ** -decay, in a random basis, float64."""
    source = torch.Generator().manual_seed(seed)
    basis_DD = torch.linalg.qr(torch.randn(width, width, generator=source, dtype=torch.float64)).Q
    scale_D = torch.arange(1, width + 1, dtype=torch.float64) ** -decay
    return (torch.randn(num_rows, width, generator=source, dtype=torch.float64) * scale_D) @ basis_DD


def batches(
    rows: Mapping[KVSite, Tensor], sizes: Sequence[int] | int = 7, shard: int = 0, num_zero_rows: int = 0
) -> Iterator[GradientBatch]:
    """The rows as micro-batches of one shard."""
    parts = {site: rows_ND.split(sizes if isinstance(sizes, int) else list(sizes)) for site, rows_ND in rows.items()}
    for index in range(len(next(iter(parts.values())))):
        yield GradientBatch(shard, {site: part[index] for site, part in parts.items()}, num_zero_rows)


def sketch_of(rows_ND: Tensor, size: int | None, *, sizes: Sequence[int] | int = 7, alpha: float = 1.0) -> ShardSketch:
    """One site's rows through Frequent Directions of `size` rows, or the Gram matrix if it is None."""
    config = Sketch(method="gram") if size is None else Sketch(method="frequent_directions", size=size, alpha=alpha)
    site = kv_site(width=rows_ND.shape[1])
    stream = batches({site: rows_ND}, sizes)
    return sketch(stream, [site], config, ALONE, ShardPlan(1, Project().planned_rank))[0]
