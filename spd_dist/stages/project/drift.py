"""How far a subspace and the gradients' energy moved since earlier rounds, measured on this round's moments.

Shapes: D width of a site, R rank of its subspace.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from spd_dist.analysis.subspace_algebra import overlap, principal_angles
from spd_dist.config import Project
from spd_dist.distributed.collectives import gather_objects
from spd_dist.distributed.world import World
from spd_dist.errors import DataError
from spd_dist.stages.project.subspace import second_moment
from spd_dist.storage.subspace_file import SiteDrift
from spd_dist.types import KVSite, SiteMoments, SiteSubspace, Subspace


def drift(
    owned: Mapping[KVSite, SiteMoments],
    estimated: Subspace,
    earlier: Mapping[int, Subspace],
    config: Project,
    world: World,
) -> dict[str, dict[str, SiteDrift]]:
    """What moved, by earlier round and site: principal angles, and how much of this round's energy it holds.

    A collective. `owned` are this round's moments of the sites that this rank owns, `estimated` is their subspace,
    whether or not this round is held to it; `earlier` are those of the rounds before, by number.

    Raises:
        DataError: an earlier round has other sites.
    """
    if any(set(each.sites) != set(estimated.sites) for each in earlier.values()):
        raise DataError("rounds: a round before has a subspace of other sites; give this run a run_dir of its own")
    held = {
        (number, str(site)): _held_fraction(moments, each.sites[site], config)
        for number, each in earlier.items()
        for site, moments in owned.items()
    }
    held = held if world.size == 1 else {key: share for rank in gather_objects(held) for key, share in rank.items()}
    return {
        str(number): {
            str(site): _moved(each.sites[site], part, held[number, str(site)]) for site, part in estimated.sites.items()
        }
        for number, each in earlier.items()
    }


def _held_fraction(moments: SiteMoments, part: SiteSubspace, config: Project) -> float:
    """The share of the moment's energy inside the subspace: tr(V'MV) / tr(M)."""
    moment_DD, basis_DR = second_moment(moments, config), part.basis_DR.double()
    return ((basis_DR.T @ moment_DD * basis_DR.T).sum() / moment_DD.trace()).item()


def _moved(before: SiteSubspace, after: SiteSubspace, held_fraction: float) -> SiteDrift:
    angle_R = principal_angles(before, after)
    return SiteDrift(
        angles_degrees=[math.degrees(angle) for angle in angle_R.tolist()],
        mean_angle_degrees=math.degrees(angle_R.mean().item()),
        largest_angle_degrees=math.degrees(angle_R.max().item()),
        overlap_fraction=overlap(before, after),
        energy_ratio=after.certificate.energy / before.certificate.energy,
        energy_fraction_before=before.energy_fraction,
        energy_fraction=after.energy_fraction,
        energy_fraction_held=held_fraction,
    )
