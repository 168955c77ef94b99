"""Subspace -> Projection: one symmetric operator a site, by `project.mode`, with as few columns as its form allows.

Shapes: D width of a site, R rank of its subspace, Q columns of an operator's factor.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from spd_dist.analysis.subspace_algebra import complement_basis, fix_signs
from spd_dist.config import Project
from spd_dist.errors import ConfigError
from spd_dist.seeding import generator
from spd_dist.stages.project.subspace import DIRECTIONS, NULL, blocks
from spd_dist.types import KVSite, Projection, SiteOperator, SiteSubspace, Subspace


def projection(whole: Subspace, config: Project, seed: int) -> Projection:
    """What generation applies at the sites of `project.kinds`; sites of the other kind have no operator.

    hard       the subspace stays, the rest goes: P = VV'
    blend      of the rest, the share rho stays: P + rho (I - P)
    soft       direction i stays by lambda_i / (lambda_i + lambda_R), a Wiener filter: from near 1 for the strongest to
               1/2 for the weakest of the subspace; outside of it, all by the gain of the mean eigenvalue there
    random     blend, with a random subspace of the same rank (of each KV head, under `head`), from a named generator
    isotropic  the mean gain of blend, R/D + rho (1 - R/D), in every direction: how much of an effect is mere shrinking
    identity   nothing goes

    Raises:
        ConfigError: soft, of a subspace whose directions are not the gradients'.
    """
    if config.mode == "soft" and DIRECTIONS in whole.metadata:
        raise ConfigError(
            f"project.mode: soft is not valid with a subspace of directions {whole.metadata[DIRECTIONS]}, since its "
            "gains are of the gradients' own directions; set project.mode=hard"
        )
    operators = {
        site: _operator(site, part, config, seed)
        for site, part in whole.sites.items()
        if config.kinds in ("both", site.kind)
    }
    return Projection(operators, config.insertion)


def with_random_directions(found: Subspace, seed: int) -> Subspace:
    """As many uniformly random directions at each site, those that `project.mode=random` projects to."""
    sites = {
        site: dataclasses.replace(part, basis_DR=_random(site, part.basis_DR, [slice(0, site.width)], seed))
        for site, part in found.sites.items()
    }
    return Subspace(sites, found.metadata)


def _operator(site: KVSite, part: SiteSubspace, config: Project, seed: int) -> SiteOperator:
    width, rank = part.basis_DR.shape
    parts = blocks(site, config.insertion)
    match config.mode:
        case "hard":
            return _two_gains(part.basis_DR, parts, outside=0.0)
        case "blend":
            return _two_gains(part.basis_DR, parts, outside=config.rho)
        case "random":
            return _two_gains(_random(site, part.basis_DR, parts, seed), parts, outside=config.rho)
        case "soft":
            gain_R, outside = _wiener(part.eigenvalue_D, rank)
            return SiteOperator(outside, part.basis_DR, (gain_R - outside).float())
        case "isotropic":
            return _multiple(rank / width + config.rho * (1 - rank / width), width)
        case "identity":
            return _multiple(1.0, width)


def _two_gains(basis_DR: Tensor, parts: list[slice], *, outside: float) -> SiteOperator:
    """Gain 1 in the subspace and `outside` elsewhere: by the columns of whichever side has fewer."""
    width, rank = basis_DR.shape
    if rank <= width - rank:
        return SiteOperator(outside, basis_DR, torch.full((rank,), 1 - outside))
    removed_DQ = torch.zeros(width, width - rank)
    column = 0
    for part in parts:
        inside_HR = basis_DR[part]
        removed_HQ = complement_basis(inside_HR[:, inside_HR.any(0)])
        removed_DQ[part, column : column + removed_HQ.shape[1]] = removed_HQ.float()
        column += removed_HQ.shape[1]
    return SiteOperator(1.0, removed_DQ, torch.full((width - rank,), outside - 1))


def _multiple(gain: float, width: int) -> SiteOperator:
    return SiteOperator(gain, torch.zeros(width, 0), torch.zeros(0))


def _wiener(eigenvalue_D: Tensor, rank: int) -> tuple[Tensor, float]:
    """The gains of the kept directions, and the one gain outside."""
    noise = eigenvalue_D[rank - 1].clamp_min(NULL * eigenvalue_D[0])
    outside = eigenvalue_D[rank:].mean() if rank < len(eigenvalue_D) else eigenvalue_D.new_zeros(())
    return eigenvalue_D[:rank] / (eigenvalue_D[:rank] + noise), (outside / (outside + noise)).item()


def _random(site: KVSite, basis_DR: Tensor, parts: list[slice], seed: int) -> Tensor:
    """Uniformly random directions, as many in each block as the subspace has there."""
    random_DR, column = torch.zeros_like(basis_DR), 0
    source = generator(seed, "project", "random", str(site))
    for part in parts:
        rank = int(basis_DR[part].any(0).sum())
        normal_HR = torch.randn(part.stop - part.start, rank, generator=source, dtype=torch.float64)
        random_DR[part, column : column + rank] = fix_signs(torch.linalg.qr(normal_HR).Q).float()
        column += rank
    return random_DR
