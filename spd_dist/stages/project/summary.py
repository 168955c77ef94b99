"""What `project/summary.json` says of a subspace, site by site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from spd_dist.stages.project.bounds import angle_bound, certified_energy_fraction, certified_energy_share
from spd_dist.types import KVSite, SiteSubspace, Subspace

NOT_CERTIFIED = "not certified"


def summary(whole: Subspace, *, sketch_sizes: Mapping[int, int]) -> dict[str, Any]:
    """Plain data: `metadata`, and `sites` by name; `sketch_sizes` gives the rows of a sketch by width."""
    return {
        "metadata": dict(whole.metadata),
        "sites": {str(site): _described(site, part, sketch_sizes[site.width]) for site, part in whole.sites.items()},
    }


def _described(site: KVSite, part: SiteSubspace, sketch_size: int) -> dict[str, Any]:
    bound = angle_bound(part)
    return {
        "module": site.module,
        "width": site.width,
        "rank": part.basis_DR.shape[1],
        "energy_fraction": part.energy_fraction,
        "num_rows": part.certificate.num_rows,
        "sketch_size": sketch_size,
        "certificate": asdict(part.certificate),
        "certified_energy_fraction": certified_energy_fraction(part),
        "certified_energy_share": certified_energy_share(part),
        "angle_bound": NOT_CERTIFIED if bound is None else bound,
        "num_null_directions": part.num_null_directions,
        "spectrum": part.eigenvalue_D.tolist(),
    }
