"""What can be checked of a projection while it is applied: calls counted, leakage measured.

Shapes: D width of a site, N rows.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from spd_dist.errors import DataError
from spd_dist.models.operators import SitePart
from spd_dist.types import KVSite

OBSERVED_ROWS = 256
TINY = 1e-30


class Applied:
    """A projection at work. The first `observe` outputs of each site are measured, without waiting for the device."""

    def __init__(self, sites: Iterable[KVSite], observe: int) -> None:
        self.calls: dict[KVSite, int] = dict.fromkeys(sites, 0)
        """Outputs that were projected, per site; with mode `fold` only the observed ones are counted."""
        self.model_calls = 0
        self._observe = observe
        self._observed = dict.fromkeys(self.calls, 0)
        self._worst: dict[KVSite, Tensor] = {}

    def leakage(self) -> float | None:
        """The largest ||z - zP|| / ||z|| of any site, z being a projected output; None if there was none to see.

        For an operator that is not a projector (blend, soft) it is ||z' - zP|| / ||z'||, z' being what came of z; such
        an operator cannot be seen in the outputs of folded weights.
        """
        return max((worst.item() for worst in self._worst.values()), default=None)

    def observes(self, site: KVSite) -> bool:
        """Whether the next output of `site` is to be measured."""
        return self._observed[site] < self._observe

    @torch.no_grad()
    def measure(self, part: SitePart, before_D: Tensor | None, after_D: Tensor) -> None:
        """Compare `after_D`, an output as attention sees it, with what the operator makes of `before_D`."""
        self._observed[part.site] += 1
        if part.apply.is_idempotent:
            before_D = after_D
        if before_D is None:
            return
        before_ND, after_ND = (_rows(z_D) for z_D in (before_D, after_D))
        leakage = (after_ND - part.apply(before_ND)).norm() / after_ND.norm().clamp_min(TINY)
        self._worst[part.site] = torch.maximum(self._worst.get(part.site, leakage), leakage)

    def check_calls(self, *, has_run: bool = False) -> None:
        """Fail if the model ran and a site did not; `has_run` if it is known to have, whether or not it was seen here.

        Raises:
            DataError: naming the sites.
        """
        idle = [str(site) for site, calls in self.calls.items() if calls == 0]
        if self._observe and idle and (has_run or self.model_calls or any(self.calls.values())):
            raise DataError(
                f"the model ran and the projection never reached {', '.join(idle)}: a compiled model ignores hooks "
                "that are added later, and an engine may not call the module; set generate.apply_as=fold"
            )


def _rows(z_D: Tensor) -> Tensor:
    return z_D.detach().reshape(-1, z_D.shape[-1])[:OBSERVED_ROWS].double()
