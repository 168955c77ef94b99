"""Stage 4, project: cut the strongest directions out of each site's moments, and make of them what generation applies.

subspace.py         moments -> Subspace, the same on every rank; what is proven of it, and how far it moved
operator_choice.py  Subspace -> Projection, by `project.mode`
"""

from spd_dist.stages.project.operator_choice import projection, with_random_directions
from spd_dist.stages.project.subspace import (
    angle_bound,
    certified_energy_fraction,
    certified_energy_share,
    drift,
    site_summaries,
    subspace,
)

__all__ = [
    "angle_bound", "certified_energy_fraction", "certified_energy_share", "drift", "projection", "site_summaries",
    "subspace", "with_random_directions",
]  # fmt: skip
