"""Which form a sketch takes, its two updates (outer product, Frequent Directions), and all sites of a width at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from spd_dist.config import Sketch
from spd_dist.types import Certificate, KVSite, SiteMoments

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


NULL = 1e-12
"""Eigenvalues below this share of the largest are rounding."""
TINY = torch.finfo(torch.float64).tiny


class Shrunk(NamedTuple):
    """A stack cut down to L orthogonal rows, and what that cost."""

    rows_GLD: Tensor
    squared_GL: Tensor
    """Squared lengths of the rows."""
    delta_G: Tensor
    """0 <= S'S - B'B <= delta * I."""
    lost_G: Tensor
    """Trace of S'S - B'B, from the eigenvalues."""


def add_outer_(upper_GDD: Tensor, rows_GND: Tensor) -> None:
    """Add X'X to the upper triangle, block row by block row: the lower one is not worth its half of the products."""
    width = upper_GDD.shape[-1]
    block = max(64, math.ceil(width / 8))
    for start in range(0, width, block):
        left_GND = rows_GND[..., start : start + block]
        upper_GDD[:, start : start + block, start:].baddbmm_(left_GND.mT, rows_GND[..., start:])


def mirrored(upper_DD: Tensor) -> Tensor:
    """The symmetric matrix that has this upper triangle."""
    return upper_DD.triu() + upper_DD.triu(1).mT


def shrink(rows_GND: Tensor, size: int, alpha: float = 1.0, *, squared_GL: Tensor | None = None) -> Shrunk:
    """The `size` strongest directions of each stack, with delta = lambda_{size + 1} taken off their squared lengths.

    With this delta (and not lambda_size) nothing is lost while the rank is at most `size`. `alpha` < 1 takes delta off
    the last ceil(alpha * size) directions only (Desai, Ghashami and Phillips, arXiv 1501.06561): 0 <= S'S - B'B <=
    delta * I still holds. `size` must be below N. If the first rows are the result of a shrink, `squared_GL` is its.
    """
    tall = rows_GND.shape[1] > rows_GND.shape[2]
    eigenvalue_GK, vector_GKK = _columns_gram_eigh(rows_GND) if tall else _rows_gram_eigh(rows_GND, squared_GL)
    eigenvalue_GK = eigenvalue_GK.clamp_min_(0)  # weakest first
    delta_G = _delta(eigenvalue_GK, size)
    top_GL = eigenvalue_GK[:, -size:]
    kept_GL = top_GL.clone()
    kept_GL[:, : math.ceil(alpha * size)] -= delta_G[:, None]
    kept_GL.clamp_min_(0)
    lost_G = eigenvalue_GK.sum(-1) - kept_GL.sum(-1)
    # Where the eigenvalue is rounding, so is the ratio: the row is noise times at most 1.
    gain_GL = kept_GL.sqrt() if tall else (kept_GL / top_GL.clamp_min(TINY)).sqrt_()
    direction_GLK = (vector_GKK[..., -size:] * gain_GL[:, None]).mT
    return Shrunk(direction_GLK if tall else direction_GLK @ rows_GND, kept_GL, delta_G, lost_G)


class Eigh(NamedTuple):
    """Eigenvalues, weakest first, and their eigenvectors as columns."""

    eigenvalue_GK: Tensor
    vector_GKK: Tensor


def _rows_gram_eigh(rows_GND: Tensor, squared_GL: Tensor | None) -> Eigh:
    """Of S S', its upper triangle only (LAPACK is faster there): and of orthogonal rows its diagonal only."""
    num_sites, num_rows, _ = rows_GND.shape
    num_known = 0 if squared_GL is None else squared_GL.shape[1]
    upper_GNN = rows_GND.new_zeros(num_sites, num_rows, num_rows)
    if squared_GL is not None:
        upper_GNN.diagonal(dim1=1, dim2=2)[:, :num_known] = squared_GL
    upper_GNN[:, :, num_known:] = (rows_GND[:, num_known:] @ rows_GND.mT).mT
    return Eigh(*torch.linalg.eigh(upper_GNN, UPLO="U"))


def _columns_gram_eigh(rows_GND: Tensor) -> Eigh:
    """Of S'S, where that is the smaller one."""
    upper_GDD = rows_GND.new_zeros(rows_GND.shape[0], rows_GND.shape[2], rows_GND.shape[2])
    add_outer_(upper_GDD, rows_GND)
    return Eigh(*torch.linalg.eigh(upper_GDD, UPLO="U"))


def _delta(eigenvalue_GK: Tensor, size: int) -> Tensor:
    """lambda_{size + 1}, and exactly 0 where it is rounding: a stack of rank `size` is kept whole."""
    if size >= eigenvalue_GK.shape[-1]:
        return torch.zeros_like(eigenvalue_GK[:, 0])
    delta_G = eigenvalue_GK[:, -size - 1]
    return torch.where(delta_G > NULL * eigenvalue_GK[:, -1], delta_G, 0.0)


NEVER = torch.iinfo(torch.int64).max


class SiteGroup:
    """State of fixed size. Rows gather in a buffer; a full buffer is folded into the Gram matrix, or shrunk to L rows.

    Nothing here waits for an accelerator: what is not finite is zeroed and counted, and asked for at the end.
    """

    def __init__(self, num_sites: int, width: int, plan: SketchPlan, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(num_sites, *shape, dtype=torch.float64, device=device)

        is_gram = plan.form == "gram"
        self.plan = plan
        self.rows_GND = zeros(plan.buffer if is_gram else plan.size + plan.buffer, width)
        self.squared_GL = zeros(0 if is_gram else plan.size)
        self.upper_GDD = zeros(width, width) if is_gram else zeros(0, 0)
        self.sum_GD = zeros(width)
        self.energy_G, self.delta_G, self.lost_G = zeros(), zeros(), zeros()
        self.num_dropped_G = torch.zeros(num_sites, dtype=torch.int64, device=device)
        self.first_dropped_G = torch.full_like(self.num_dropped_G, NEVER)
        self.num_filled = 0
        self.num_folded = 0
        self.num_rows = 0
        self.num_shrinks = 0

    @torch.inference_mode()
    def add_(self, rows: Sequence[Tensor], number: int) -> None:
        """Take in one tensor of rows a site, all of the same length; `number` is the micro-batch they came from."""
        num_rows, start = len(rows[0]), 0
        self.num_rows += num_rows
        dropped_GN = self._count_non_finite_(rows, number)
        while start < num_rows:
            if self.num_filled == self.rows_GND.shape[1]:
                self._fold_()
            stop = min(num_rows, start + self.rows_GND.shape[1] - self.num_filled)
            new_GND = self.rows_GND[:, self.num_filled : self.num_filled + stop - start]
            for slot_ND, rows_ND in zip(new_GND, rows, strict=True):
                slot_ND.copy_(rows_ND[start:stop])
            if dropped_GN is not None:
                new_GND.masked_fill_(dropped_GN[:, start:stop, None], 0.0)
            self.num_filled += stop - start
            start = stop

    def _count_non_finite_(self, rows: Sequence[Tensor], number: int) -> Tensor | None:
        """Which rows hold NaN or Inf; None if it is known that no row does, which only the CPU can tell at no cost."""
        # A sum is finite only if all of it is, and it is the cheapest thing to take.
        dropped_GN = ~torch.stack([rows_ND.sum(-1, dtype=_wide(rows_ND)) for rows_ND in rows]).isfinite()
        if dropped_GN.device.type == "cpu" and not dropped_GN.any():
            return None
        self.num_dropped_G += dropped_GN.sum(-1)
        self.first_dropped_G.clamp_max_(torch.where(dropped_GN.any(-1), number, NEVER))
        return dropped_GN

    def _fold_(self) -> None:
        new_GND = self.rows_GND[:, self.num_folded :]
        self.sum_GD += new_GND.sum(1)
        self.energy_G += torch.linalg.vector_norm(new_GND, dim=-1).square().sum(-1)
        if self.plan.form == "gram":
            add_outer_(self.upper_GDD, new_GND)
            self.num_filled = 0
            return
        squared_GL = self.squared_GL if self.num_folded else None
        shrunk = shrink(self.rows_GND, self.plan.size, self.plan.alpha, squared_GL=squared_GL)
        self.rows_GND[:, : self.plan.size] = shrunk.rows_GLD
        self.squared_GL.copy_(shrunk.squared_GL)
        self.delta_G += shrunk.delta_G
        self.lost_G += shrunk.lost_G
        self.num_shrinks += 1
        self.num_filled = self.num_folded = self.plan.size

    def moments(self, index: int) -> SiteMoments:
        """What site `index` holds, with the rows that still wait in the buffer; the state stays as it is."""
        rows_ND = self.rows_GND[index, : self.num_filled]
        new_ND, width = rows_ND[self.num_folded :], rows_ND.shape[1]
        upper_DD = self.upper_GDD[index].clone() if self.plan.form == "gram" else rows_ND.new_zeros(width, width)
        add_outer_(upper_DD[None], rows_ND[None])
        num_dropped = int(self.num_dropped_G[index])
        certificate = Certificate(
            energy=self.energy_G[index].item() + new_ND.square().sum().item(),
            delta=self.delta_G[index].item(),
            lost_energy=self.lost_G[index].item(),
            num_rows=self.num_rows - num_dropped,
            num_shrinks=self.num_shrinks,
            num_dropped_rows=num_dropped,
        )
        return SiteMoments(mirrored(upper_DD), self.sum_GD[index] + new_ND.sum(0), certificate)


def _wide(rows_ND: Tensor) -> torch.dtype:
    """A dtype that sums of finite rows are finite in: float16 overflows at 65504."""
    return torch.promote_types(rows_ND.dtype, torch.float32)
