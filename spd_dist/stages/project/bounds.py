"""What a sketch's certificate proves of the subspace cut from it, however the rows were.

Notation of the docstrings: C is the second moment of all rows, of eigenvalues lambda_i; the sketch holds C^, of
lambda^_i, with 0 <= C - C^ <= Delta I and trace tau. The bounds hold for centred moments too: C - C^ is the same.

Shapes: D width of a site, R rank of its subspace.
"""

from __future__ import annotations

import math

import torch

from spd_dist.types import SiteSubspace


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
