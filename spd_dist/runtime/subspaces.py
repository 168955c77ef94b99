"""Subspace algebra, site by site, on what `subspace_file` reads: angles, overlap, union, intersection, complement.

Derived subspaces are subspaces again: they can be saved, compared and projected to. Their certificates stay true:
cutting a moment down to its R kept directions is one more shrink, with delta = lambda_{R+1}.

Shapes: D width of a site, R and S ranks, Q rank of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from spd_dist.errors import DataError
from spd_dist.runtime.orthonormal import complement as complement_basis
from spd_dist.runtime.orthonormal import signed
from spd_dist.types import Certificate, KVSite, SiteSubspace, Subspace

SAME_DIRECTION = 1e-9
"""Directions with a cosine above 1 minus this are one: an angle of 4.5e-5, more than float32 bases are off."""


def principal_angles(first: SiteSubspace, second: SiteSubspace) -> Tensor:
    """The angles between two subspaces in radians, smallest first: min(R, S) of them, float64.

    Small ones come from sines, large ones from cosines, so that all are accurate (Bjoerck and Golub, 1973).
    """
    a_DR, b_DS = (part.basis_DR.double() for part in (first, second))
    if a_DR.shape[1] < b_DS.shape[1]:
        a_DR, b_DS = b_DS, a_DR
    cosine_S = torch.linalg.svdvals(a_DR.T @ b_DS).clamp(max=1)
    sine_S = torch.linalg.svdvals(b_DS - a_DR @ (a_DR.T @ b_DS)).flip(0).clamp(max=1)
    return torch.where(cosine_S.square() < 0.5, cosine_S.acos(), sine_S.asin())


def overlap(first: SiteSubspace, second: SiteSubspace) -> float:
    """The mean squared cosine of the principal angles: 1 if one subspace holds the other, R / D for a random one."""
    cosine_RS = first.basis_DR.double().T @ second.basis_DR.double()
    return (cosine_RS.square().sum() / max(1, min(cosine_RS.shape))).item()


def union(first: Subspace, second: Subspace) -> Subspace:
    """At each site the directions of either: the span of both bases, strongest first by the sum of the kept moments.

    Raises:
        DataError: the two have different sites.
    """
    return _combined(first, second, "union", lambda share_D: share_D > SAME_DIRECTION)


def intersection(first: Subspace, second: Subspace, *, min_cosine: float = 0.99) -> Subspace:
    """At each site the directions of both: those that lie between pairs at most arccos(min_cosine) apart.

    In the wide space of a KV site two subspaces share hardly a direction exactly, so a bound is needed; the result may
    have rank 0.

    Raises:
        DataError: the two have different sites.
    """
    threshold = 1 + min_cosine - SAME_DIRECTION
    return _combined(first, second, "intersection", lambda share_D: share_D > threshold)


def complement(subspace: Subspace) -> Subspace:
    """At each site everything orthogonal to the subspace; spectrum and certificate are still those of the rows."""
    sites = {
        site: replace(
            part,
            basis_DR=complement_basis(part.basis_DR).float(),
            energy_fraction=1 - part.energy_fraction,
            num_null_directions=0,
        )
        for site, part in subspace.sites.items()
    }
    return Subspace(sites, {**subspace.metadata, "algebra": "complement"})


def shared_sites(subspaces: Mapping[str, Subspace]) -> list[KVSite]:
    """The sites that all of these name and that have the same width in all.

    Raises:
        DataError: there is none.
    """
    common = set.intersection(*({(str(site), site.width) for site in each.sites} for each in subspaces.values()))
    sites = [site for site in next(iter(subspaces.values())).sites if (str(site), site.width) in common]
    if not sites:
        held = "; ".join(f"{name}: {', '.join(map(str, each.sites))}" for name, each in subspaces.items())
        raise DataError(f"these subspaces have no site of equal width in common ({held}); compare runs of one model")
    return sites


def _combined(first: Subspace, second: Subspace, name: str, choose: Callable[[Tensor], Tensor]) -> Subspace:
    if set(first.sites) != set(second.sites):
        only = ", ".join(str(site) for site in sorted(set(first.sites) ^ set(second.sites)))
        raise DataError(
            f"the {name} needs the same sites on both sides, and {only} is on one only; use runs of one model"
        )
    sites = {site: _combine(part, second.sites[site], choose) for site, part in first.sites.items()}
    return Subspace(sites, {**first.metadata, "algebra": name})


def _combine(first: SiteSubspace, second: SiteSubspace, choose: Callable[[Tensor], Tensor]) -> SiteSubspace:
    """The chosen eigenvectors of the sum of both projectors: its eigenvalues are 1 + cos and 1 - cos of the angles."""
    a_DR, b_DS = first.basis_DR.double(), second.basis_DR.double()
    share_D, vector_DD = torch.linalg.eigh(a_DR @ a_DR.T + b_DS @ b_DS.T)
    span_DQ = vector_DD[:, choose(share_D)]
    moment_DD = _kept_moment(first) + _kept_moment(second)
    strength_Q, turn_QQ = torch.linalg.eigh(span_DQ.T @ moment_DD @ span_DQ)
    eigenvalue_D = torch.linalg.eigvalsh(moment_DD).flip(0).clamp_min(0)
    return SiteSubspace(
        basis_DR=signed((span_DQ @ turn_QQ).flip(1)).float(),
        eigenvalue_D=eigenvalue_D,
        energy_fraction=min(1.0, (strength_Q.sum() / eigenvalue_D.sum()).item()),
        certificate=_cut_certificate(first) + _cut_certificate(second),
    )


def _kept_moment(part: SiteSubspace) -> Tensor:
    """The second moment as far as the basis keeps it."""
    basis_DR = part.basis_DR.double()
    return (basis_DR * part.eigenvalue_D[: basis_DR.shape[1]]) @ basis_DR.T


def _cut_certificate(part: SiteSubspace) -> Certificate:
    """The certificate of `_kept_moment` against the rows."""
    tail = part.eigenvalue_D[part.basis_DR.shape[1] :]
    return replace(
        part.certificate,
        delta=part.certificate.delta + (tail[0].item() if len(tail) else 0.0),
        lost_energy=part.certificate.lost_energy + tail.sum().item(),
        num_shrinks=part.certificate.num_shrinks + 1,
    )
