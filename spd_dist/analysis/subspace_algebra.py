"""Subspace algebra, site by site: angles, overlap, union, intersection, complement; bases made the same everywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import combinations, islice
from pathlib import Path

import torch
from torch import Tensor

from spd_dist.errors import DataError
from spd_dist.storage.subspace_file import load_subspace
from spd_dist.types import Certificate, KVSite, SiteSubspace, Subspace


def fix_signs(basis_DR: Tensor) -> Tensor:
    """The basis with each column's largest entry (the first of equals) positive."""
    if basis_DR.shape[1] == 0:
        return basis_DR
    largest_R = basis_DR.gather(0, basis_DR.abs().argmax(0, keepdim=True))
    return torch.where(largest_R < 0, -basis_DR, basis_DR)


def complete_basis(basis_DR: Tensor, num_columns: int) -> Tensor:
    """The basis with columns added until it has `num_columns`: unit vectors in order, made orthogonal to what is there.

    A unit vector is passed over if less than 1 / (2 D) of it is new. If all of them were passed over with a direction
    still missing, the new parts, which sum to at least 1, would sum to less than 1/2: so the order always suffices.
    """
    width = len(basis_DR)
    columns_DR = basis_DR.double()
    for index in range(width):
        if columns_DR.shape[1] >= num_columns:
            break
        new_D = -(columns_DR @ columns_DR[index])
        new_D[index] += 1
        if new_D.square().sum() < 1 / (2 * width):
            continue
        new_D -= columns_DR @ (columns_DR.T @ new_D)  # a second pass, for orthogonality to the last bit
        columns_DR = torch.cat([columns_DR, (new_D / new_D.norm())[:, None]], dim=1)
    return columns_DR


def complement_basis(basis_DR: Tensor) -> Tensor:
    """An orthonormal basis of everything orthogonal to `basis_DR`, float64, D - R columns."""
    rank = basis_DR.shape[1]
    if rank == 0:
        return torch.eye(len(basis_DR), dtype=torch.float64)
    full_DD = torch.linalg.qr(basis_DR.double(), mode="complete").Q
    return fix_signs(full_DD[:, rank:])


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
        basis_DR=fix_signs((span_DQ @ turn_QQ).flip(1)).float(),
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


NUM_PAIRS = 8
"""Pairs of a kind that are compared, the first ones: a model may have hundreds of sites."""


def angles(run_folder: Path, arms: Iterable[str]) -> dict[str, dict[str, list[float]]]:
    """In degrees, smallest first: `sites`, pairs of the method's own; `arms`, others' subspaces against the method's.

    Raises:
        DataError: a subspace is corrupt.
    """
    file = run_folder / "project" / "subspace.safetensors"
    if not file.exists():
        return {"sites": {}, "arms": {}}
    own = load_subspace(file).sites
    same_width = ((a, b) for a, b in combinations(sorted(own), 2) if a.width == b.width)
    between_arms = (
        (f"{arm}, {site}", own[site], part)
        for arm in arms
        for path in [run_folder / "arms" / arm / "project" / file.name]
        if path.exists()
        for site, part in load_subspace(path).sites.items()
        if site in own
    )
    return {
        "sites": {f"{a} and {b}": _degrees(own[a], own[b]) for a, b in islice(same_width, NUM_PAIRS)},
        "arms": {name: _degrees(mine, other) for name, mine, other in islice(between_arms, NUM_PAIRS)},
    }


def _degrees(first: SiteSubspace, second: SiteSubspace) -> list[float]:
    return (principal_angles(first, second) * (180 / math.pi)).tolist()
