"""Which form a site's sketch takes: the exact float64 Gram matrix, or Frequent Directions where that is too large."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from spd_dist.config import Sketch
from spd_dist.types import KVSite

BYTES = 8
GRAM_BUFFER_ROWS = 256  # enough that reading and writing the Gram matrix is a small part of adding the rows to it


@dataclass(frozen=True)
class SketchPlan:
    """The form of the sketches of one width."""

    form: Literal["gram", "frequent_directions"]
    size: int
    """Rows that a sketch keeps; the width for `gram`, which loses nothing."""
    buffer: int
    """Rows that are gathered before they are folded in."""
    alpha: float = 1.0
    reason: str = field(default="", compare=False)

    def num_bytes(self, width: int) -> int:
        """Memory of one sketch: it does not depend on how many rows it saw."""
        matrix = width * width if self.form == "gram" else self.size * width
        return BYTES * (matrix + self.buffer * width)


def plan_sketches(
    sites: Iterable[KVSite], config: Sketch, *, planned_rank: Callable[[int], int], num_shards: int
) -> dict[int, SketchPlan]:
    """The plan of every width among `sites`, with its reason.

    `auto` holds the Gram matrices of all logical shards against `sketch.memory_gib`, as if one rank had them all: a
    choice that looked at this rank's shards only would make the subspace depend on the number of ranks.
    """
    widths = [site.width for site in sites]
    distinct = sorted(set(widths))
    if config.method == "gram":
        return {width: _gram(width, "sketch.method=gram") for width in distinct}
    if config.method == "frequent_directions":
        return {
            width: _rows(width, config, planned_rank(width), "sketch.method=frequent_directions") for width in distinct
        }
    need_gib = num_shards * sum(_gram(width, "").num_bytes(width) for width in widths) / 2**30
    need = f"the Gram matrices of {len(widths)} sites and {num_shards} shards take {need_gib:.3g} GiB"
    if need_gib <= config.memory_gib:
        reason = f"{need}, within sketch.memory_gib={config.memory_gib:g}"
        return {width: _gram(width, reason) for width in distinct}
    reason = f"{need}, more than sketch.memory_gib={config.memory_gib:g}"
    return {width: _rows(width, config, planned_rank(width), reason) for width in distinct}


def _gram(width: int, reason: str) -> SketchPlan:
    return SketchPlan("gram", size=width, buffer=GRAM_BUFFER_ROWS, reason=reason)


def _rows(width: int, config: Sketch, rank: int, reason: str) -> SketchPlan:
    size = min(width, config.size or max(2 * rank, rank + 32))
    if size == width:
        return _gram(width, f"{reason}; but {size} rows lose nothing, and the Gram matrix is their cheapest form")
    if size < 2 * rank:
        reason += f"; sketch.size={size} is below twice the rank {rank}, so the weakest directions kept will be inexact"
    # The time a row is flat between half the size and its double; 7/8 keeps the eigenproblem off powers of two, which
    # cost 10 % on CPUs.
    buffer = max(1, size - size // 8)
    return SketchPlan("frequent_directions", size=size, buffer=buffer, alpha=config.alpha, reason=reason)
