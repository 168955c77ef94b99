"""The subspaces that the capability subspace is held against, all of its rank, site by site.

Shapes: D width of a site, R rank.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from spd_dist.analysis.subspace_algebra import complement_basis, fix_signs
from spd_dist.config import Mechanism
from spd_dist.errors import ConfigError
from spd_dist.seeding import generator
from spd_dist.stages.calibrate import CalibrationMoments, Moments
from spd_dist.stages.project.subspace import DIRECTIONS
from spd_dist.types import KVSite, SiteSubspace, Subspace

M = TypeVar("M")
log = logging.getLogger(__name__)

SPD = "spd"


class Control(NamedTuple):
    """A kind of subspace."""

    kind: Literal["control", "candidate"]
    """A candidate knows of correctness, and might do better than the method's."""
    sentence: str


CONTROLS = {
    "activation_pca": Control("control", "the activations' strongest directions"),
    "full_gradient": Control("control", "the strongest directions of the whole sequence's gradients"),
    "shuffled_tokens": Control("control", "of the gradients of as many tokens, drawn at random"),
    "wrong_answers": Control("control", "of the gradients of wrong answers"),
    "complement": Control("control", "what is orthogonal to the subspace"),
    "other_task": Control("control", "another task's subspace"),
    "gradient_x_activation": Control(
        "candidate", "the directions whose removal raises the calibration loss most, to first order"
    ),
    "generalised": Control("candidate", "gradients against activations: what matters beyond what is merely large"),
    "right_minus_wrong": Control("candidate", "of the right answers' gradients less the wrong ones'"),
    "cleaned": Control("candidate", "of the gradients without the activations' strongest directions"),
}
"""By the names that `mechanism.controls` takes."""

RIDGE = 1e-6
"""Of the activations' mean eigenvalue: keeps their covariance from being singular."""
CLEANED_SHARE = 16
"""The cleaned subspace goes without one in so many directions."""
BISECTIONS = 40
LARGEST_POWER = 16.0
ENERGY_TOLERANCE = 0.01
"""Of the energy that is asked for, or of that which is left out, whichever is less."""


@dataclasses.dataclass(frozen=True)
class Material:
    """What subspaces are cut of."""

    spd: Subspace
    """The method's, at the sites that the run calibrated."""
    controls: tuple[str, ...]
    """Those that are compared with: names of `CONTROLS`."""
    calibration: CalibrationMoments | None = None
    """What `needs_moments` tells of."""
    full: Moments | None = None
    shuffled: Moments | None = None
    wrong: Moments | None = None
    other: Subspace | None = None
    further: Mapping[KVSite, SiteSubspace] = dataclasses.field(default_factory=dict)
    """What the method would keep at the sites of layers that only a comparison names."""


def chosen_controls(names: Sequence[str], *, has_wrong: bool, has_other: bool) -> list[str]:
    """The controls of `mechanism.controls`; under `all`, those that there is material for.

    Raises:
        ConfigError: an unknown one, or one that there is none for.
    """
    for name in names:
        if name not in ("all", *CONTROLS):
            (nearest,) = difflib.get_close_matches(name, CONTROLS, 1, 0)
            raise ConfigError(
                f"mechanism.controls: {name!r} is no control; the nearest is {nearest}, and there are all, "
                f"{', '.join(CONTROLS)}"
            )
    lacking = {name for name in ("wrong_answers", "right_minus_wrong") if not has_wrong}
    lacking |= set() if has_other else {"other_task"}
    asked = sorted(lacking & set(names))
    if asked:
        remedy = "set mechanism.other_subspace" if asked[0] == "other_task" else "this task has no wrong answers"
        raise ConfigError(f"mechanism.controls: {asked[0]!r} cannot be made: {remedy}; or leave it out")
    return [name for name in CONTROLS if name not in lacking and ("all" in names or name in names)]


def control_subspace(name: str, spd: Subspace, material: Material) -> Subspace:
    """A control of the rank of `spd` at each of its sites; the complement has what is left of the width.

    Raises:
        ConfigError: another task's subspace has no such site, or another width there.
    """
    bases = {site: fix_signs(_basis(name, site, part, material)).float() for site, part in spd.sites.items()}
    return with_bases(spd, bases)


def with_bases(spd: Subspace, bases: Mapping[KVSite, Tensor]) -> Subspace:
    """`spd` with other directions; everything else that it says stays the method's own."""
    sites = {site: dataclasses.replace(part, basis_DR=bases[site]) for site, part in spd.sites.items()}
    return Subspace(sites, spd.metadata)


def _basis(name: str, site: KVSite, part: SiteSubspace, material: Material) -> Tensor:
    rank = part.basis_DR.shape[1]
    if name in ("full_gradient", "shuffled_tokens", "wrong_answers"):
        other = {"full_gradient": material.full, "shuffled_tokens": material.shuffled, "wrong_answers": material.wrong}
        return strongest(given(other[name])[site], rank)
    if name in ("gradient_x_activation", "generalised", "right_minus_wrong", "cleaned"):
        return _candidate(name, site, rank, material)
    if name == "activation_pca":
        return strongest(given(material.calibration).activation[site], rank)
    if name == "complement":
        return complement_basis(part.basis_DR)
    return other_basis(site, rank, given(material.other))


def _candidate(name: str, site: KVSite, rank: int, material: Material) -> Tensor:
    moments = given(material.calibration)
    gradient_DD, activation_DD = moments.gradient[site], moments.activation[site]
    if name == "gradient_x_activation":
        return strongest(-moments.cross[site], rank)
    if name == "generalised":
        return _generalised(gradient_DD, activation_DD, rank)
    if name == "cleaned":
        return _cleaned(gradient_DD, activation_DD, rank)
    wrong_DD = given(material.wrong)[site]
    return strongest(gradient_DD / gradient_DD.trace() - wrong_DD / wrong_DD.trace(), rank)


def cuts_anew(config: Mechanism) -> bool:
    """Whether a comparison has the method's subspace at another rank or layer than the run cut it at."""
    return config.fraction is not None or any("fraction=" in word or "layers=" in word for word in config.explore)


NEED_MOMENTS = ("activation_pca", "gradient_x_activation", "generalised", "right_minus_wrong", "cleaned")


def needs_moments(controls: Sequence[str], config: Mechanism) -> bool:
    """Whether the calibration examples must be passed once more, for moments that the subspace's file does not hold."""
    return cuts_anew(config) or config.num_equal_energy > 0 or bool(set(controls) & set(NEED_MOMENTS))


def given(material: M | None) -> M:
    """Material that is there."""
    assert material is not None, "`chosen_controls` leaves out what there is no material for"
    return material


def directions_of(found: Subspace, moments: CalibrationMoments, site: KVSite, rank: int) -> Tensor:
    """What the method keeps at a site, at any rank: float64 columns, by the directions that `found` was made of."""
    return strongest(moments.ranked_by(found.metadata.get(DIRECTIONS, "gradient"))[site], rank)


def strongest(moment_DD: Tensor, rank: int) -> Tensor:
    """The eigenvectors of the largest eigenvalues, as columns, the largest first; float64."""
    return torch.linalg.eigh(moment_DD).eigenvectors.flip(1)[:, :rank]


def _generalised(gradient_DD: Tensor, activation_DD: Tensor, rank: int) -> Tensor:
    """The span of the R largest v of G v = lambda A v."""
    width = len(activation_DD)
    ridge_DD = RIDGE * activation_DD.trace() / width * torch.eye(width, dtype=torch.float64)
    root_DD = torch.linalg.cholesky(activation_DD + ridge_DD)
    half_DD = torch.linalg.solve_triangular(root_DD, gradient_DD, upper=False)
    whitened_DD = torch.linalg.solve_triangular(root_DD, half_DD.T, upper=False)
    vector_DR = strongest((whitened_DD + whitened_DD.T) / 2, rank)
    return torch.linalg.qr(torch.linalg.solve_triangular(root_DD.T, vector_DR, upper=True)).Q


def _cleaned(gradient_DD: Tensor, activation_DD: Tensor, rank: int) -> Tensor:
    """The strongest directions of the gradients, orthogonal to the activations' strongest."""
    width = len(gradient_DD)
    num_removed = min(max(1, width // CLEANED_SHARE), width - rank)
    removed_DQ = strongest(activation_DD, num_removed)
    rest_DP = complement_basis(removed_DQ)
    return rest_DP @ strongest(rest_DP.T @ gradient_DD @ rest_DP, rank)


def other_basis(site: KVSite, rank: int, other: Subspace) -> Tensor:
    """Another subspace's strongest directions (D, R) at a site, float64.

    Raises:
        ConfigError: it has no such site, or fewer directions, or another width there.
    """
    by_name = {str(each): part.basis_DR for each, part in other.sites.items()}
    found_DR = by_name.get(str(site))
    if found_DR is None or found_DR.shape[0] != site.width or found_DR.shape[1] < rank:
        what = "nothing" if found_DR is None else f"rank {found_DR.shape[1]} of width {found_DR.shape[0]}"
        raise ConfigError(
            f"mechanism.other_subspace: it has {what} at {site}, where rank {rank} of width {site.width} is needed; "
            "name a subspace of the same model, layers and rank"
        )
    return found_DR[:, :rank].double()


def random_subspace(spd: Subspace, seed: int, number: int) -> Subspace:
    """Uniformly random directions, as many as `spd` has at each site: the `number`-th of the seed."""
    return _drawn(spd, lambda site, rank: torch.linalg.qr(_normal(site, rank, seed, "random", number)).Q)


def equal_energy_subspace(spd: Subspace, activation: Moments, seed: int, number: int) -> Subspace:
    """Random directions that hold as much of the activations' energy as `spd` does at each site.

    They are drawn with a power of the activations' covariance, that is found by bisection: power 0 gives uniform ones.
    """

    def draw(site: KVSite, rank: int) -> Tensor:
        value_D, vector_DD = torch.linalg.eigh(activation[site])
        value_D = value_D.clamp_min(1e-12 * value_D[-1])
        own_DR = spd.sites[site].basis_DR.double()
        target = energy_share(own_DR, activation[site])
        normal_DR = vector_DD.T @ _normal(site, rank, seed, "equal_energy", number)
        allowed = ENERGY_TOLERANCE * min(target, 1 - target)
        low, high, drawn_DR, energy = -LARGEST_POWER, LARGEST_POWER, own_DR, target
        for _ in range(BISECTIONS):
            power = (low + high) / 2
            scaled_DR = (value_D / value_D[-1]).pow(power / 2)[:, None] * normal_DR
            drawn_DR = vector_DD @ torch.linalg.qr(scaled_DR).Q
            energy = energy_share(drawn_DR, activation[site])
            if abs(energy - target) <= allowed:
                return drawn_DR
            low, high = (power, high) if energy < target else (low, power)
        log.warning("mechanism: %s: equal_energy_%03d holds %.4g of the activations' energy, the subspace %.4g",
                    site, number, energy, target)  # fmt: skip
        return drawn_DR

    return _drawn(spd, draw)


def energy_share(basis_DR: Tensor, moment_DD: Tensor) -> float:
    """The share of a moment's trace that a subspace holds."""
    return ((basis_DR * (moment_DD @ basis_DR)).sum() / moment_DD.trace()).item()


def _drawn(spd: Subspace, draw: Callable[[KVSite, int], Tensor]) -> Subspace:
    bases = {site: fix_signs(draw(site, part.basis_DR.shape[1])).float() for site, part in spd.sites.items()}
    return with_bases(spd, bases)


def _normal(site: KVSite, rank: int, seed: int, name: str, number: int) -> Tensor:
    source = generator(seed, "mechanism", name, number, str(site))
    return torch.randn(site.width, rank, generator=source, dtype=torch.float64)
