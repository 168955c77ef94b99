"""The sketches of one logical shard, and the file that holds them between two micro-batches.

Shapes: G sites of equal width, N rows, D width.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spd_dist.errors import DataError
from spd_dist.stages.sketch.frequent_directions import SiteGroup, SketchPlan
from spd_dist.storage.artifacts import TensorFile, corrupt, read_tensors, write_tensors
from spd_dist.types import GradientBatch, KVSite, SiteMoments, record_of

TENSORS = (
    "rows_GND", "squared_GL", "upper_GDD", "sum_GD", "energy_G", "delta_G", "lost_G", "num_dropped_G",
    "first_dropped_G",
)  # fmt: skip
COUNTS = ("num_filled", "num_folded", "num_rows", "num_shrinks")


class ShardSketch(Mapping[KVSite, SiteMoments]):
    """What one logical shard's rows left at each site. Reading a site forms its float64 moments."""

    def __init__(self, sites: Sequence[KVSite], plans: Mapping[int, SketchPlan], device: torch.device) -> None:
        by_width: dict[int, list[KVSite]] = {}
        for site in sorted(sites):
            by_width.setdefault(site.width, []).append(site)
        self.sites = by_width
        self.num_examples = 0
        self.groups = {
            width: SiteGroup(len(group), width, plans[width], device) for width, group in sorted(by_width.items())
        }

    def add_(self, batch: GradientBatch, number: int) -> None:
        """Take in a micro-batch; `number` is its place in this rank's stream, for messages.

        Raises:
            DataError: a site without rows, rows of another width, or sites with different numbers of rows.
        """
        self._check(batch)
        for width, group in self.groups.items():
            group.add_([batch.grad_ND[site].detach() for site in self.sites[width]], number)
            group.num_rows += batch.num_zero_rows
        self.num_examples += batch.num_examples

    def _check(self, batch: GradientBatch) -> None:
        shapes = {}
        for site in self:
            if site not in batch.grad_ND:
                raise DataError(f"{site}: a micro-batch of shard {batch.shard} has no gradient rows for this site")
            shape = shapes[site] = tuple(batch.grad_ND[site].shape)
            if len(shape) != 2 or shape[1] != site.width:
                raise DataError(f"{site} takes gradients of shape (N, {site.width}), not {shape}")
        if len({num_rows for num_rows, _ in shapes.values()}) > 1:
            counts = ", ".join(f"{site}: {num_rows}" for site, (num_rows, _) in shapes.items())
            raise DataError(
                f"shard {batch.shard}: the sites of a micro-batch have different numbers of rows ({counts})"
            )

    def dropped(self) -> Iterator[tuple[KVSite, int, int]]:
        """The sites that met rows with NaN or Inf: how many, and the first micro-batch that had one."""
        for width, group in self.groups.items():
            counts, firsts = group.num_dropped_G.tolist(), group.first_dropped_G.tolist()
            yield from ((site, n, first) for site, n, first in zip(self.sites[width], counts, firsts, strict=True) if n)

    def num_bytes(self) -> int:
        """Memory of the state: it does not depend on the number of rows."""
        tensors = (getattr(group, name) for group in self.groups.values() for name in TENSORS)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def __getitem__(self, site: KVSite) -> SiteMoments:
        return self.groups[site.width].moments(self.sites[site.width].index(site))

    def __iter__(self) -> Iterator[KVSite]:
        return (site for group in self.sites.values() for site in group)

    def __len__(self) -> int:
        return sum(len(group) for group in self.sites.values())


def save_sketches(path: str | Path, sketches: Mapping[int, ShardSketch]) -> None:
    """Write the state of every shard: `load_sketches` gives it back bit for bit, and `sketch` goes on from there."""
    tensors: dict[str, Tensor] = {}
    shards: dict[str, object] = {}
    for shard, state in sketches.items():
        shards[str(shard)] = {
            width: {
                "sites": [dataclasses.asdict(site) for site in state.sites[width]],
                "plan": dataclasses.asdict(group.plan),
                "counts": {name: getattr(group, name) for name in COUNTS},
            }
            for width, group in state.groups.items()
        }
        for width, group in state.groups.items():
            tensors |= {f"{shard}.{width}.{name}": getattr(group, name) for name in TENSORS}
    counts = {str(shard): state.num_examples for shard, state in sketches.items()}
    write_tensors(path, tensors, {"shards": json.dumps(shards), "num_examples": json.dumps(counts)})


def load_sketches(path: str | Path, device: torch.device | str = "cpu") -> dict[int, ShardSketch]:
    """The state that `save_sketches` wrote.

    Raises:
        DataError: the file is missing, corrupt, or not a sketch state.
    """
    file = read_tensors(path)
    if "shards" not in file.metadata:
        raise DataError(
            f"{path} is no sketch state: its metadata has no `shards`; give a file that save_sketches wrote"
        )
    try:
        return dict(_states(file, torch.device(device)))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise corrupt(path, error) from error


def _states(file: TensorFile, device: torch.device) -> Iterator[tuple[int, ShardSketch]]:
    for shard, widths in json.loads(file.metadata["shards"]).items():
        sites = [_site(fields) for described in widths.values() for fields in described["sites"]]
        plans = {int(width): record_of(SketchPlan, described["plan"]) for width, described in widths.items()}
        state = ShardSketch(sites, plans, device)
        state.num_examples = json.loads(file.metadata["num_examples"])[shard]
        for width, group in state.groups.items():
            vars(group).update(widths[str(width)]["counts"])
            # Copied: a file has them at odd addresses, where the last digit of a float64 product is another.
            tensors = {name: file.tensors[f"{shard}.{width}.{name}"].to(device, copy=True) for name in TENSORS}
            vars(group).update(tensors)
        yield int(shard), state


def _site(fields: dict[str, Any]) -> KVSite:
    return record_of(KVSite, fields | {"columns": tuple(tuple(pair) for pair in fields["columns"])})
