"""Algebra of subspaces: laws that hold whatever the subspaces are."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gradients import ALONE, kv_site, power_law
from torch import Tensor

from spd_dist.analysis.subspace_algebra import (
    complement,
    complement_basis,
    complete_basis,
    intersection,
    overlap,
    principal_angles,
    shared_sites,
    union,
)
from spd_dist.config import Project
from spd_dist.errors import DataError
from spd_dist.launch.compare import main as compare
from spd_dist.stages.project import subspace
from spd_dist.storage.artifacts import write_tensors
from spd_dist.storage.subspace_file import fingerprint, load_subspace, save_subspace
from spd_dist.types import Certificate, KVSite, SiteMoments, SiteSubspace, Subspace

SITE = kv_site(width=12)


def cut(rows_ND: Tensor, rank: int, site: KVSite = SITE) -> Subspace:
    gram_DD = rows_ND.T @ rows_ND
    moments = SiteMoments(gram_DD, rows_ND.sum(0), Certificate(gram_DD.trace().item(), num_rows=len(rows_ND)))
    return subspace({site: moments}, [site], Project(rank_rule="fixed", rank=rank), ALONE)


def spanned_by(*columns: int) -> Subspace:
    """The subspace of some unit vectors, the first the strongest."""
    rows_ND = torch.eye(12, dtype=torch.float64)[list(columns)]
    return cut(rows_ND * torch.arange(len(columns), 0, -1, dtype=torch.float64)[:, None], len(columns))


def projector(whole: Subspace) -> Tensor:
    basis_DR = whole.sites[SITE].basis_DR.double()
    return basis_DR @ basis_DR.T


def test_angles_are_those_that_were_built_in():
    angle_R = torch.tensor([1e-6, 0.3, 1.2, math.pi / 2], dtype=torch.float64)
    eye_DD = torch.eye(12, dtype=torch.float64)
    turned_DR = eye_DD[:, :4] * angle_R.cos() + eye_DD[:, 4:8] * angle_R.sin()
    part = spanned_by(0, 1, 2, 3).sites[SITE]
    other = replace(part, basis_DR=turned_DR)
    torch.testing.assert_close(principal_angles(part, other), angle_R, rtol=1e-6, atol=1e-12)
    assert overlap(part, other) == pytest.approx(angle_R.cos().square().mean().item())


def test_angles_to_a_subspace_that_holds_the_other_are_zero():
    small, large = spanned_by(2, 5).sites[SITE], spanned_by(1, 2, 5, 7).sites[SITE]
    assert principal_angles(small, large).tolist() == pytest.approx([0, 0], abs=1e-12)
    assert overlap(small, large) == overlap(large, small) == pytest.approx(1)
    assert overlap(small, spanned_by(0, 1).sites[SITE]) == 0


def test_union_and_intersection_are_those_of_sets_of_unit_vectors():
    first, second = spanned_by(0, 3, 5), spanned_by(3, 5, 8, 9)
    for result, expected in (
        (union(first, second), (0, 3, 5, 8, 9)),
        (intersection(first, second), (3, 5)),
        (complement(first), (1, 2, 4, 6, 7, 8, 9, 10, 11)),
    ):
        torch.testing.assert_close(projector(result), projector(spanned_by(*expected)))
    assert intersection(first, complement(first)).sites[SITE].basis_DR.shape == (12, 0)


def test_laws_of_the_algebra_hold_for_subspaces_in_any_position():
    first, second = cut(power_law(50, 12, seed=1), 3), cut(power_law(50, 12, seed=2), 4)
    both = union(first, second)
    assert both.sites[SITE].basis_DR.shape == (12, 7)
    for part in (first, second):
        assert overlap(both.sites[SITE], part.sites[SITE]) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(projector(union(second, first)), projector(both))
    torch.testing.assert_close(projector(union(first, first)), projector(first))
    torch.testing.assert_close(projector(intersection(first, first)), projector(first))
    torch.testing.assert_close(projector(intersection(first, both)), projector(first), rtol=0, atol=1e-5)
    torch.testing.assert_close(projector(complement(complement(first))), projector(first))
    meet_of_complements = intersection(complement(first), complement(second))
    torch.testing.assert_close(projector(complement(both)), projector(meet_of_complements), rtol=0, atol=1e-5)
    assert complement(first).sites[SITE].energy_fraction == pytest.approx(1 - first.sites[SITE].energy_fraction)


def test_certificate_of_a_union_still_bounds_what_is_missing_of_all_rows():
    rows = [power_law(50, 12, seed=seed) for seed in (1, 2)]
    both = union(cut(rows[0], 3), cut(rows[1], 4)).sites[SITE]
    exact_DD = sum(rows_ND.T @ rows_ND for rows_ND in rows)
    basis_DR = both.basis_DR.double()
    kept_R = both.eigenvalue_D[:7]
    assert both.certificate.energy == pytest.approx(exact_DD.trace().item())
    assert both.certificate.lost_energy == pytest.approx((exact_DD.trace() - kept_R.sum()).item(), rel=1e-6)
    missing_DD = exact_DD - (basis_DR * kept_R) @ basis_DR.T
    assert torch.linalg.eigvalsh(missing_DD).max() <= both.certificate.delta * (1 + 1e-6)


def test_union_of_other_sites_is_refused():
    other = cut(power_law(20, 12), 2, kv_site(1, width=12))
    with pytest.raises(DataError, match=r"the union needs the same sites on both sides, and layers\.0\.key, layers\.1"):
        union(spanned_by(0), other)
    with pytest.raises(DataError, match="these subspaces have no site of equal width in common"):
        shared_sites({"a": spanned_by(0), "b": other})


def test_a_basis_is_completed_in_one_way_only():
    basis_DR = torch.linalg.qr(power_law(9, 4, decay=0)).Q
    whole_DD = complete_basis(basis_DR, 9)
    assert torch.equal(whole_DD[:, :4], basis_DR)
    torch.testing.assert_close(whole_DD.T @ whole_DD, torch.eye(9, dtype=torch.float64), rtol=0, atol=1e-14)
    rest_DR = complement_basis(basis_DR)
    torch.testing.assert_close(rest_DR @ rest_DR.T, whole_DD[:, 4:] @ whole_DD[:, 4:].T, rtol=0, atol=1e-14)
    assert torch.equal(complete_basis(torch.zeros(5, 0), 3), torch.eye(5, dtype=torch.float64)[:, :3])


def test_a_saved_subspace_is_the_same_when_loaded(tmp_path):
    whole = Subspace(
        {SITE: cut(power_law(30, 12), 5).sites[SITE], kv_site(1, "value", 8, num_heads=2): _other()}, {"model": "tiny"}
    )
    save_subspace(tmp_path / "subspace.safetensors", whole)
    loaded = load_subspace(tmp_path / "subspace.safetensors")
    assert fingerprint(loaded) == fingerprint(whole)
    assert list(loaded.sites) == list(whole.sites)
    assert loaded.metadata == {"model": "tiny"}


def _other() -> SiteSubspace:
    site = kv_site(1, "value", 8, num_heads=2)
    return cut(power_law(30, 8), 3, site).sites[site]


def test_files_that_are_no_subspace_are_refused(tmp_path):
    path = tmp_path / "subspace.safetensors"
    write_tensors(path, {"weight": torch.zeros(1)})
    with pytest.raises(DataError, match="is no subspace: its metadata has no `sites`"):
        load_subspace(path)
    save_subspace(path, spanned_by(0, 1))
    from spd_dist.storage.artifacts import read_tensors

    tensors, metadata = read_tensors(path)
    write_tensors(path, {"layers.0.key.basis_DR": tensors["layers.0.key.basis_DR"]}, metadata)
    with pytest.raises(DataError, match=r"has no tensor layers\.0\.key\.singular_value_D"):
        load_subspace(path)
    write_tensors(path, tensors | {"layers.0.key.basis_DR": torch.zeros(3, 1)}, metadata)
    with pytest.raises(
        DataError, match=r"layers\.0\.key\.basis_DR is .* of shape \[3, 1\]; it must be float32, of 12 rows"
    ):
        load_subspace(path)


@pytest.mark.seconds
def test_compare_prints_and_draws(tmp_path, capsys):
    paths = [tmp_path / "a.safetensors", tmp_path / "run" / "project" / "subspace.safetensors"]
    for path, seed in zip(paths, (1, 2), strict=True):
        save_subspace(path, cut(power_law(40, 12, seed=seed), 4))
    picture = tmp_path / "compare.png"
    assert compare([str(paths[0]), str(tmp_path / "run"), str(paths[0]), "--png", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "overlap, mean of 1 sites" in printed
    assert "1.000" in printed
    assert picture.read_bytes()[1:4] == b"PNG"
    assert compare([str(paths[0])]) == 0


def test_compare_tells_what_is_wrong_with_an_artifact(tmp_path, capsys):
    assert compare([str(Path(tmp_path) / "none.safetensors")]) == 3
    assert "none.safetensors is missing" in capsys.readouterr().err
