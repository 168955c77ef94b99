"""Moments -> Subspace: each owner cuts its sites, then all ranks hold the same directions.

Then what certificates prove of it, and how far it and the gradients' energy moved since earlier rounds.

Shapes: D width of a site, R rank of its subspace.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spd_dist.analysis.subspace_algebra import complete_basis, fix_signs, overlap, principal_angles
from spd_dist.config import Project
from spd_dist.distributed.collectives import all_equal, broadcast_, gather_objects, together
from spd_dist.distributed.world import World
from spd_dist.errors import ConfigError, DataError
from spd_dist.storage.subspace_file import SiteDrift, SiteSummary, fingerprint
from spd_dist.types import KVSite, SiteMoments, SiteSubspace, Subspace, record_of

log = logging.getLogger(__name__)

DIRECTIONS = "directions"
"""In a subspace's metadata: what its directions are, if they are not those of the gradients."""
NULL = 1e-12
"""Eigenvalues below this share of the largest are rounding: float32 rows hold singular values down to about 1e-7."""


class Spectrum(NamedTuple):
    """Eigenvalues, strongest first, and their eigenvectors as columns."""

    eigenvalue_D: Tensor
    vector_DD: Tensor


def subspace(
    owned: Mapping[KVSite, SiteMoments],
    sites: Sequence[KVSite],
    config: Project,
    world: World,
    *,
    metadata: Mapping[str, str] | None = None,
    other: Mapping[KVSite, Tensor] | None = None,
) -> Subspace:
    """The strongest directions of every site, on every rank. A collective.

    Under `project.insertion=head` the directions are cut from the moments of each KV head alone, the strongest of all
    heads together: no direction reaches over two heads.

    Args:
        owned: this rank's part of what `reduce` gave.
        sites: every site, on every rank.
        config: rank rule, centring and insertion point.
        world: this rank.
        metadata: what else the artifact says of itself: base model, fingerprint, hashes of the inputs.
        other: for `project.directions` that are not the gradients', on every rank: each site's matrix whose strongest
            eigenvectors are cut. Rank and spectrum stay those of the gradients.

    Raises:
        ConfigError: a rank that a site is too narrow for, or none where the rule needs one.
        DataError: a site that no gradient reached, or ranks that hold different subspaces.
    """
    with together("cutting the subspace"):
        cut = {site: _cut(site, moments, config, other[site] if other else None) for site, moments in owned.items()}
    shared = cut if world.size == 1 else _shared(cut, sites)
    rule = {"rank_rule": config.rank_rule, "centered": str(config.centered).lower(), "insertion": config.insertion}
    rule |= {} if other is None else {DIRECTIONS: config.directions}
    whole = Subspace({site: shared[site] for site in sorted(sites)}, rule | dict(metadata or {}))
    check_same(whole, world)
    return whole


def check_same(whole: Subspace, world: World) -> None:
    """Compare the subspace on all ranks by hash.

    Raises:
        DataError: ranks hold different ones.
    """
    if world.size > 1 and not all_equal(fingerprint(whole)):
        raise DataError(
            "the ranks hold different subspaces after the broadcast; check the network and the hosts' memory"
        )


def _cut(site: KVSite, moments: SiteMoments, config: Project, other_DD: Tensor | None) -> SiteSubspace:
    eigenvalue_D, vector_DD = _spectrum(second_moment(moments, config), blocks(site, config.insertion))
    total, largest = eigenvalue_D.sum(), eigenvalue_D[0]
    if not largest > 0:
        raise DataError(
            f"{site}: the energy of its {moments.certificate.num_rows} gradient rows is {total.item():g}, so there is "
            "no direction to keep; check that the mask marks tokens (calibrate.mask) and that the layer is used"
        )
    num_real = int((eigenvalue_D > NULL * largest).sum())
    rank = _rank(site, eigenvalue_D[:num_real], config)
    if other_DD is not None:
        found_DR = _spectrum(other_DD, blocks(site, config.insertion)).vector_DD[:, :rank]
        kept = (found_DR.T @ second_moment(moments, config) * found_DR.T).sum() / total
        return SiteSubspace(fix_signs(found_DR).float(), eigenvalue_D, min(1.0, kept.item()), moments.certificate)
    num_null = max(0, rank - num_real)
    if num_null:
        log.warning(
            "project: %s: rank %d is above the numerical rank %d of the gradients: %d directions are arbitrary (but "
            "the same in every run); lower project.rank or calibrate on more tokens",
            site,
            rank,
            num_real,
            num_null,
        )
    basis_DR = complete_basis(vector_DD[:, : rank - num_null], rank)
    return SiteSubspace(
        basis_DR=fix_signs(basis_DR).float(),
        eigenvalue_D=eigenvalue_D,
        energy_fraction=min(1.0, (eigenvalue_D[:rank].sum() / total).item()),
        certificate=moments.certificate,
        num_null_directions=num_null,
    )


def second_moment(moments: SiteMoments, config: Project) -> Tensor:
    """About zero, or about the rows' mean: taking the mean off leaves the sketch's error as it is."""
    if not config.centered or not moments.certificate.num_rows:
        return moments.gram_DD
    return moments.gram_DD - moments.sum_D.outer(moments.sum_D) / moments.certificate.num_rows


def blocks(site: KVSite, insertion: str) -> list[slice]:
    """The parts of a site's width that directions stay within: its KV heads under `head`, else all of it."""
    head = site.width // site.num_heads if insertion == "head" else site.width
    return [slice(start, start + head) for start in range(0, site.width, head)]


def _spectrum(moment_DD: Tensor, parts: Sequence[slice]) -> Spectrum:
    """Eigenvectors of the diagonal blocks, all blocks sorted together; negative rounding is cut off."""
    eigenvalue_D, vector_DD = moment_DD.new_empty(len(moment_DD)), torch.zeros_like(moment_DD)
    for part in parts:
        eigenvalue_D[part], vector_DD[part, part] = torch.linalg.eigh(moment_DD[part, part])
    order_D = eigenvalue_D.sort(descending=True, stable=True).indices
    return Spectrum(eigenvalue_D[order_D].clamp_min(0), vector_DD[:, order_D])


def _rank(site: KVSite, real: Tensor, config: Project) -> int:
    """The rank by `project.rank_rule`; `real` are the eigenvalues that are not rounding."""
    if config.rank_rule == "energy":
        share = real.cumsum(0) / real.sum()
        return min(len(real), int(torch.searchsorted(share, config.energy)) + 1)
    if config.rank_rule == "fixed" and config.rank is None:
        raise ConfigError(
            "project.rank: None is not valid with project.rank_rule=fixed; set project.rank=N, at least 1"
        )
    rank = config.planned_rank(site.width)
    if rank > site.width:
        raise ConfigError(f"project.rank: {rank} is too large: {site} has width {site.width}; set it to at most that")
    return rank


def _shared(cut: Mapping[KVSite, SiteSubspace], sites: Sequence[KVSite]) -> dict[KVSite, SiteSubspace]:
    """What each owner cut, on every rank."""
    outlines = gather_objects({site: _outline(part) for site, part in cut.items()})
    shared = {}
    for site in sorted(sites):
        owner = next(rank for rank, outline in enumerate(outlines) if site in outline)
        rank, fields = outlines[owner][site]
        basis_DR = cut[site].basis_DR if site in cut else torch.empty(site.width, rank)
        eigenvalue_D = cut[site].eigenvalue_D if site in cut else torch.empty(site.width, dtype=torch.float64)
        broadcast_([basis_DR, eigenvalue_D], owner)
        shared[site] = record_of(SiteSubspace, {**fields, "basis_DR": basis_DR, "eigenvalue_D": eigenvalue_D})
    return shared


def _outline(part: SiteSubspace) -> tuple[int, dict[str, Any]]:
    """The rank, and all fields that are not tensors."""
    return part.basis_DR.shape[1], {key: value for key, value in vars(part).items() if not isinstance(value, Tensor)}


def certified_energy_fraction(site: SiteSubspace) -> float:
    """A lower bound on the energy that the subspace captures, over what the best subspace of its rank captures.

    tr(V'CV) >= sum of the kept lambda^, and the optimum is at most that + min(R Delta, tau). It needs no gap.
    """
    rank, kept, total = _energies(site)
    lost = site.certificate.lost_energy
    return kept / min(total + lost, kept + min(rank * site.certificate.delta, lost))


def certified_energy_share(site: SiteSubspace) -> float:
    """A lower bound on the energy that the subspace captures, over the energy of all rows."""
    _, kept, total = _energies(site)
    return kept / (total + site.certificate.lost_energy)


def angle_bound(site: SiteSubspace) -> float | None:
    """An upper bound on the sine of the largest angle to the exact subspace; None where it cannot be certified.

    With the gap g = lambda^_R - lambda^_{R+1} > Delta: sin(1/2 arcsin(Delta / g)), by the sin 2 Theta theorem of Davis
    and Kahan about C - Delta/2. Without such a gap the subspace itself is not determined, and only its energy is.
    """
    rank = site.basis_DR.shape[1]
    eigenvalue_D = site.eigenvalue_D
    if rank == len(eigenvalue_D):
        return 0.0
    share = len(eigenvalue_D) * torch.finfo(torch.float64).eps * (1 + math.sqrt(site.certificate.num_shrinks))
    delta = site.certificate.delta + share * eigenvalue_D[0].item()  # with what rounding may have added
    gap = (eigenvalue_D[rank - 1] - eigenvalue_D[rank]).item()
    if delta >= gap:
        return None
    return math.sin(0.5 * math.asin(delta / gap))


def _energies(site: SiteSubspace) -> tuple[int, float, float]:
    """Rank, energy kept in the subspace, and energy of the whole sketch."""
    rank = site.basis_DR.shape[1]
    return rank, site.eigenvalue_D[:rank].sum().item(), site.eigenvalue_D.sum().item()


NOT_CERTIFIED = "not certified"


def site_summaries(whole: Subspace, *, sketch_sizes: Mapping[int, int]) -> dict[str, SiteSummary]:
    """Each site in numbers, by its name; `sketch_sizes` gives the rows of a sketch by width."""
    is_certified = DIRECTIONS not in whole.metadata  # certificates are of the gradients' strongest directions
    return {
        str(site): _summary(site, part, sketch_sizes[site.width], is_certified=is_certified)
        for site, part in whole.sites.items()
    }


def _summary(site: KVSite, part: SiteSubspace, sketch_size: int, *, is_certified: bool) -> SiteSummary:
    bound = angle_bound(part) if is_certified else None
    return SiteSummary(
        module=site.module,
        width=site.width,
        rank=part.basis_DR.shape[1],
        energy_fraction=part.energy_fraction,
        num_rows=part.certificate.num_rows,
        sketch_size=sketch_size,
        certificate=part.certificate,
        certified_energy_fraction=certified_energy_fraction(part) if is_certified else 0.0,
        certified_energy_share=certified_energy_share(part) if is_certified else 0.0,
        angle_bound=NOT_CERTIFIED if bound is None else bound,
        num_null_directions=part.num_null_directions,
        spectrum=part.eigenvalue_D.tolist(),
    )


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
