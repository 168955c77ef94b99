"""Stage 4, project: cut the strongest directions out of each site's moments, and make of them what generation applies.

subspace.py         moments -> Subspace, the same on every rank, and what its certificate proves of it
drift.py            how far it moved since earlier rounds
operator_choice.py  Subspace -> Projection, by `project.mode`
"""

from spd_dist.stages.project.drift import drift
from spd_dist.stages.project.operator_choice import projection
from spd_dist.stages.project.subspace import (
    angle_bound,
    certified_energy_fraction,
    certified_energy_share,
    site_summaries,
    subspace,
)

__all__ = [
    "angle_bound", "certified_energy_fraction", "certified_energy_share", "drift", "projection", "site_summaries",
    "subspace",
]  # fmt: skip
