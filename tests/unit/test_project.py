"""What is cut from the moments, what is proved of it, and what generation applies."""

import dataclasses
import json
import math

import pytest
import torch
from gradients import ALONE, batches, kv_site, power_law, sketch_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spd_dist.config import Project, Reduce, Sketch
from spd_dist.errors import ConfigError, DataError
from spd_dist.stages.project import (
    angle_bound,
    certified_energy_fraction,
    certified_energy_share,
    projection,
    site_summaries,
    subspace,
)
from spd_dist.stages.reduce import reduce
from spd_dist.stages.sketch import ShardPlan, sketch
from spd_dist.types import Certificate, KVSite, SiteMoments, SiteOperator, SiteSubspace, Subspace

SITE = kv_site(width=12, num_heads=3)


def fixed(rank: int, **changes) -> Project:
    return Project(rank_rule="fixed", rank=rank, **changes)


def exact_moments(rows_ND: Tensor, num_zero_rows: int = 0) -> SiteMoments:
    gram_DD = rows_ND.T @ rows_ND
    certificate = Certificate(gram_DD.trace().item(), num_rows=len(rows_ND) + num_zero_rows)
    return SiteMoments(gram_DD, rows_ND.sum(0), certificate)


def cut(rows_ND: Tensor, config: Project, site: KVSite = SITE) -> SiteSubspace:
    return subspace({site: exact_moments(rows_ND)}, [site], config, ALONE).sites[site]


def sketched(rows_ND: Tensor, size: int, config: Project) -> SiteSubspace:
    state = sketch_of(rows_ND, size)
    (site,) = state
    owned = reduce({0: state}, [site], Reduce(), num_shards=1, world=ALONE)
    return subspace(owned, [site], config, ALONE).sites[site]


def projector(part: SiteSubspace) -> Tensor:
    basis_DR = part.basis_DR.double()
    return basis_DR @ basis_DR.T


def matrix(operator: SiteOperator) -> Tensor:
    """The operator as the formula of its docstring."""
    factor_DR = operator.factor_DR.double()
    identity_DD = torch.eye(len(factor_DR), dtype=torch.float64)
    return operator.keep * identity_DD + (factor_DR * operator.weight_R.double()) @ factor_DR.T


def operator_of(whole: Subspace, config: Project, seed: int = 0, site: KVSite = SITE) -> SiteOperator:
    return projection(whole, config, seed).operators[site]


def whole_of(rows_ND: Tensor, config: Project) -> Subspace:
    return subspace({SITE: exact_moments(rows_ND)}, [SITE], config, ALONE)


def test_basis_spans_the_top_right_singular_vectors():
    rows_ND = power_law(200, 12)
    part = cut(rows_ND, fixed(4))
    vt = torch.linalg.svd(rows_ND, full_matrices=False)[2][:4]
    torch.testing.assert_close(projector(part), vt.T @ vt, rtol=0, atol=1e-6)
    torch.testing.assert_close(part.eigenvalue_D.sqrt(), torch.linalg.svdvals(rows_ND))
    assert part.energy_fraction == pytest.approx((part.eigenvalue_D[:4].sum() / part.eigenvalue_D.sum()).item())


@pytest.mark.parametrize(
    ("config", "rank"),
    [
        (Project(), 6),
        (fixed(5), 5),
        (Project(rank_rule="fraction", fraction=0.75), 9),
        (Project(rank_rule="fraction", fraction=0.01), 1),
        (Project(rank_rule="energy", energy=0.9), 2),
        (Project(rank_rule="energy", energy=1.0), 3),
    ],
)
def test_rank_follows_its_rule(config, rank):
    rows_ND = torch.diag(torch.tensor([8.0, 6, 1] + [0] * 9, dtype=torch.float64))  # energies 64, 36, 1
    part = cut(rows_ND, config)
    assert part.basis_DR.shape == (12, rank)
    assert part.num_null_directions == max(0, rank - 3)


def test_ranks_that_no_site_can_have_are_refused():
    with pytest.raises(ConfigError, match=r"project\.rank: 13 is too large: layers\.0\.key has width 12"):
        cut(power_law(20, 12), fixed(13))
    with pytest.raises(ConfigError, match=r"project\.rank: None is not valid with project\.rank_rule=fixed"):
        cut(power_law(20, 12), Project(rank_rule="fixed"))


def test_a_site_without_gradient_is_an_error_that_names_it():
    with pytest.raises(DataError, match=r"layers\.0\.key: the energy of its 5 gradient rows is 0"):
        cut(torch.zeros(5, 12, dtype=torch.float64), fixed(2))


def test_null_directions_are_reported_and_do_not_hang_on_rounding(caplog):
    rows_ND = power_law(200, 3) @ power_law(3, 12, seed=5)  # rank 3
    noise_ND = 1e-9 * power_law(200, 12, decay=0, seed=6)
    parts = [cut(rows, fixed(7)) for rows in (rows_ND, rows_ND + noise_ND, rows_ND[torch.randperm(200)])]
    assert [part.num_null_directions for part in parts] == [4, 4, 4]
    for part in parts:
        torch.testing.assert_close(projector(part), projector(parts[0]), rtol=0, atol=1e-5)
        torch.testing.assert_close(part.basis_DR.T @ part.basis_DR, torch.eye(7), rtol=0, atol=1e-6)
    assert "rank 7 is above the numerical rank 3 of the gradients: 4 directions are arbitrary" in caplog.text


def test_centring_takes_the_mean_off_with_the_rows_that_are_zero_counted():
    rows_ND = power_law(80, 12) + 3
    moments = exact_moments(rows_ND, num_zero_rows=20)
    part = subspace({SITE: moments}, [SITE], fixed(4, centered=True), ALONE).sites[SITE]
    all_ND = torch.cat([rows_ND, torch.zeros(20, 12, dtype=torch.float64)])
    centred_ND = all_ND - all_ND.mean(0)
    torch.testing.assert_close(projector(part), projector(cut(centred_ND, fixed(4))), rtol=0, atol=1e-6)
    assert part.eigenvalue_D.sum() == pytest.approx(centred_ND.square().sum().item())


def test_centring_after_frequent_directions_keeps_the_certificate_true():
    rows_ND = power_law(300, 12) + 0.3
    state = sketch_of(rows_ND, 6)
    (site,) = state
    part = subspace(dict(state), [site], fixed(3, centered=True), ALONE).sites[site]
    centred_ND = rows_ND - rows_ND.mean(0)
    spectrum_D = torch.linalg.svdvals(centred_ND).square()
    captured = (centred_ND @ part.basis_DR.double()).square().sum().item()
    assert captured / spectrum_D[:3].sum().item() >= certified_energy_fraction(part)
    assert (spectrum_D <= part.eigenvalue_D + part.certificate.delta + 1e-9).all()


@given(st.integers(0, 2**31), st.integers(2, 14), st.sampled_from([0.0, 0.5, 1.0, 2.0]), st.data())
@settings(deadline=None, max_examples=60)
def test_what_is_certified_is_true(seed, size, decay, data):
    rows_ND = power_law(data.draw(st.integers(20, 150)), 16, decay=decay, seed=seed)
    rank = data.draw(st.integers(1, size))
    part = sketched(rows_ND, size, fixed(rank))
    exact_DD = rows_ND.T @ rows_ND
    eigenvalue_D, vector_DD = (each.flip(-1) for each in torch.linalg.eigh(exact_DD))
    captured = (rows_ND @ part.basis_DR.double()).square().sum().item()
    assert captured / eigenvalue_D[:rank].sum().item() >= certified_energy_fraction(part) - 1e-6
    assert captured / eigenvalue_D.sum().item() >= certified_energy_share(part) - 1e-6
    bound = angle_bound(part)
    if bound is not None:
        missed_DR = vector_DD[:, :rank] - projector(part) @ vector_DD[:, :rank]
        assert torch.linalg.matrix_norm(missed_DR, 2).item() <= bound + 1e-6


def test_an_angle_is_certified_only_where_there_is_a_gap():
    rows_ND = power_law(4000, 12, decay=0)  # a flat spectrum: no subspace of it is determined
    assert angle_bound(sketched(rows_ND, 6, fixed(3))) is None
    gapped_ND = rows_ND * torch.tensor([30.0] * 3 + [1] * 9)
    assert angle_bound(sketched(gapped_ND, 6, fixed(3))) < 0.02
    assert angle_bound(cut(torch.eye(12, dtype=torch.float64), fixed(3))) is None
    assert angle_bound(cut(rows_ND, fixed(12))) == 0


def test_directions_per_head_stay_within_their_heads():
    rows_ND = power_law(200, 12)
    whole = whole_of(rows_ND, fixed(7, insertion="head"))
    part = whole.sites[SITE]
    heads_R = (part.basis_DR.view(3, 4, 7) != 0).any(1).sum(0)
    assert heads_R.tolist() == [1] * 7
    spectrum = [torch.linalg.svdvals(rows_ND[:, start : start + 4]).square() for start in (0, 4, 8)]
    torch.testing.assert_close(part.eigenvalue_D, torch.cat(spectrum).sort(descending=True).values)
    for mode in ("hard", "random", "blend"):
        config = fixed(7, insertion="head", mode=mode, rho=0.25)
        blocks = matrix(operator_of(whole, config)).view(3, 4, 3, 4)
        for row in range(3):
            for column in range(3):
                assert row == column or blocks[row, :, column].abs().max() == 0
        assert torch.linalg.eigvalsh(blocks.view(12, 12)).sum() == pytest.approx(
            7 + (0 if mode == "hard" else 5 * 0.25)
        )


@pytest.mark.parametrize("rank", [4, 6, 9, 12])
def test_operators_are_what_their_mode_says(rank):
    whole = whole_of(power_law(200, 12), fixed(rank))
    held_DD, identity_DD = projector(whole.sites[SITE]), torch.eye(12, dtype=torch.float64)
    expected = {
        "hard": held_DD,
        "blend": held_DD + 0.3 * (identity_DD - held_DD),
        "isotropic": (rank / 12 + 0.3 * (1 - rank / 12)) * identity_DD,
        "identity": identity_DD,
    }
    for mode, expected_DD in expected.items():
        operator = operator_of(whole, fixed(rank, mode=mode, rho=0.3))
        torch.testing.assert_close(matrix(operator), expected_DD, rtol=0, atol=1e-6)
        assert operator.factor_DR.shape[1] == (min(rank, 12 - rank) if mode in ("hard", "blend") else 0)


def test_soft_operators_pass_each_direction_by_its_share_of_the_spectrum():
    whole = whole_of(power_law(200, 12), fixed(5))
    part = whole.sites[SITE]
    gain_D = torch.linalg.eigvalsh(matrix(operator_of(whole, fixed(5, mode="soft")))).flip(0)
    noise, outside = part.eigenvalue_D[4], part.eigenvalue_D[5:].mean()
    torch.testing.assert_close(gain_D[:5], part.eigenvalue_D[:5] / (part.eigenvalue_D[:5] + noise), rtol=0, atol=1e-6)
    torch.testing.assert_close(gain_D[5:], (outside / (outside + noise)).expand(7), rtol=0, atol=1e-6)
    full = whole_of(power_law(200, 12), fixed(12))
    assert torch.linalg.eigvalsh(matrix(operator_of(full, fixed(12, mode="soft")))).min() == pytest.approx(
        0.5, abs=1e-6
    )


def test_random_subspaces_have_the_rank_and_come_from_their_name_alone():
    whole = whole_of(power_law(200, 12), fixed(5))
    config = fixed(5, mode="random")
    first = matrix(operator_of(whole, config, seed=1))
    torch.manual_seed(0)
    assert torch.equal(matrix(operator_of(whole, config, seed=1)), first)
    assert not torch.allclose(matrix(operator_of(whole, config, seed=2)), first)
    torch.testing.assert_close(first @ first, first, rtol=0, atol=1e-6)
    assert first.trace() == pytest.approx(5, abs=1e-5)


@pytest.mark.parametrize(("kinds", "expected"), [("both", {"key", "value"}), ("key", {"key"}), ("value", {"value"})])
def test_only_the_chosen_kinds_are_projected(kinds, expected):
    sites = [kv_site(0, kind, 12) for kind in ("key", "value")]
    owned = {site: exact_moments(power_law(40, 12)) for site in sites}
    config = Project(kinds=kinds)
    result = projection(subspace(owned, sites, config, ALONE), config, 0)
    assert {site.kind for site in result.operators} == expected


def test_the_summary_of_a_site_has_all_that_is_known_and_json_can_hold_it():
    site = kv_site(width=12)
    stream = batches({site: power_law(200, 12)}, num_zero_rows=1)
    states = sketch(stream, [site], Sketch(method="frequent_directions", size=8), ALONE, ShardPlan(1, lambda _: 4))
    owned = reduce(states, [site], Reduce(), num_shards=1, world=ALONE)
    whole = subspace(owned, [site], fixed(4), ALONE, metadata={"base_model": "tiny"})
    assert (whole.metadata["base_model"], whole.metadata["rank_rule"]) == ("tiny", "fixed")
    entry = dataclasses.asdict(site_summaries(whole, sketch_sizes={12: 8})["layers.0.key"])
    assert json.loads(json.dumps(entry, allow_nan=False)) == entry
    assert (entry["width"], entry["rank"], entry["sketch_size"]) == (12, 4, 8)
    assert entry["num_rows"] == 200 + 29
    assert 0 < entry["certified_energy_fraction"] <= 1
    assert entry["angle_bound"] == "not certified" or 0 <= entry["angle_bound"] <= math.sqrt(0.5)
    assert len(entry["spectrum"]) == 12
    assert entry["certificate"]["num_shrinks"] > 0
