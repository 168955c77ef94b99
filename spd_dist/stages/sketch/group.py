"""The sketches of all sites of one width, in lockstep: their rows are the same token positions.

Shapes: G sites, N rows, D width, L rows of a sketch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spd_dist.stages.sketch.frequent_directions import add_outer_, mirrored, shrink
from spd_dist.stages.sketch.plan import SketchPlan
from spd_dist.types import Certificate, SiteMoments

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
