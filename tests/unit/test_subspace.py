"""How far a subspace moved since earlier rounds: angles, and energies of this round's moments."""

import math

import pytest
import torch

from spd_dist.config import Project
from spd_dist.distributed.world import World
from spd_dist.errors import DataError
from spd_dist.stages.project import drift
from spd_dist.types import Certificate, KVSite, SiteMoments, SiteSubspace, Subspace

ALONE = World(0, 1, torch.device("cpu"))
SITE = KVSite(1, "key", "k_proj", ((0, 4),))


def of_basis(*columns: int, energy: float = 10.0, turn: float = 0.0) -> Subspace:
    """The span of unit vectors, the first turned towards the last direction by `turn` radians."""
    basis_DR = torch.eye(4, dtype=torch.float64)[:, list(columns)].clone()
    basis_DR[columns[0], 0], basis_DR[3, 0] = math.cos(turn), basis_DR[3, 0] + math.sin(turn)
    part = SiteSubspace(basis_DR.float(), torch.tensor([4.0, 3.0, 2.0, 1.0]), 0.7, Certificate(energy=energy))
    return Subspace({SITE: part})


def moments() -> dict[KVSite, SiteMoments]:
    spectrum_D = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    return {SITE: SiteMoments(spectrum_D.diag(), torch.zeros(4, dtype=torch.float64), Certificate(10.0, num_rows=9))}


def test_there_is_none_in_the_first_round():
    assert drift(moments(), of_basis(0, 1), {}, Project(), ALONE) == {}


def test_an_earlier_subspace_holds_the_share_of_the_energy_that_lies_in_it():
    found = drift(moments(), of_basis(0, 1, energy=30.0), {1: of_basis(0, 2), 2: of_basis(0, 1)}, Project(), ALONE)
    first, second = (found[number][str(SITE)] for number in ("1", "2"))
    assert first.energy_fraction_held == pytest.approx(0.6)
    assert second.energy_fraction_held == pytest.approx(0.7)
    assert first.energy_ratio == pytest.approx(3.0)
    assert first.angles_degrees == pytest.approx([0, 90], abs=1e-4)
    assert (first.largest_angle_degrees, second.largest_angle_degrees) == pytest.approx((90, 0), abs=1e-4)
    assert (first.overlap_fraction, second.overlap_fraction) == pytest.approx((0.5, 1.0))


def test_a_turned_direction_is_as_many_degrees_away():
    found = drift(moments(), of_basis(0, 1), {1: of_basis(0, 1, turn=math.radians(20))}, Project(), ALONE)
    assert found["1"][str(SITE)].mean_angle_degrees == pytest.approx(10, abs=1e-3)
    assert found["1"][str(SITE)].energy_fraction_held == pytest.approx(
        (4 * math.cos(math.radians(20)) ** 2 + math.sin(math.radians(20)) ** 2 + 3) / 10
    )


def test_rounds_of_other_sites_are_refused():
    other = Subspace({KVSite(2, "key", "k_proj", ((0, 4),)): next(iter(of_basis(0, 1).sites.values()))})
    with pytest.raises(DataError, match="a round before has a subspace of other sites"):
        drift(moments(), of_basis(0, 1), {1: other}, Project(), ALONE)
