"""What Frequent Directions promises, on any rows: the oracles are float64 and know nothing of how the sketch works."""

import logging
import math

import pytest
import torch
from gradients import ALONE, batches, kv_site, power_law, sketch_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from spd_dist.config import Project, Sketch
from spd_dist.errors import DataError
from spd_dist.stages.sketch import ShardPlan, ShardSketch, load_sketches, plan_sketches, save_sketches, sketch
from spd_dist.stages.sketch.frequent_directions import shrink
from spd_dist.stages.sketch.shard import TENSORS
from spd_dist.storage.artifacts import read_tensors
from spd_dist.types import Certificate, GradientBatch, SiteMoments

SITE = kv_site()
FREQUENT = Sketch(method="frequent_directions", size=4)
GRAM = Sketch(method="gram")


def run(stream, config: Sketch, sites=(SITE,), initial=None) -> dict[int, ShardSketch]:
    rank = Project().planned_rank
    return sketch(stream, list(sites), config, ALONE, ShardPlan(8, rank, initial or {}))


def moments_of(rows_ND: Tensor, size: int | None, **options) -> SiteMoments:
    (moments,) = sketch_of(rows_ND, size, **options).values()
    return moments


def tolerance(rows_ND: Tensor, certificate: Certificate) -> float:
    """Rounding of float64 sums: a share of the largest eigenvalue."""
    largest = torch.linalg.matrix_norm(rows_ND.double(), 2).item() ** 2
    return 1e-12 * largest * (1 + math.sqrt(certificate.num_shrinks))


@st.composite
def gradient_rows(draw) -> Tensor:
    """Rows of every unkind sort, float64 or float32."""
    width, num_rows = draw(st.integers(1, 24)), draw(st.integers(0, 120))
    source = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows_ND = torch.randn(num_rows, width, generator=source, dtype=torch.float64)
    kind = draw(st.sampled_from(["flat", "low rank", "decades", "duplicates", "zeros", "drift", "rising", "falling"]))
    if kind == "low rank":
        rank = draw(st.integers(0, width))
        rows_ND[:, rank:] = 0
        rows_ND @= torch.linalg.qr(torch.randn(width, width, generator=source, dtype=torch.float64)).Q
    elif kind == "decades":
        rows_ND *= 10 ** (12 * torch.rand(num_rows, 1, generator=source, dtype=torch.float64) - 6)
    elif kind == "duplicates":
        rows_ND = rows_ND[: max(1, num_rows // 5)].repeat(5, 1)[:num_rows]
    elif kind == "zeros":
        rows_ND[torch.rand(num_rows, generator=source) < 0.5] = 0
    elif kind == "drift":  # one direction after another: what pure truncation never learns
        rows_ND = torch.eye(width, dtype=torch.float64)[torch.arange(num_rows) * width // max(1, num_rows)]
        rows_ND *= torch.linspace(1, 1.5, num_rows, dtype=torch.float64)[:, None]
    elif kind in ("rising", "falling"):
        rows_ND = rows_ND[rows_ND.norm(dim=1).argsort(descending=kind == "falling")]
    rows_ND *= 2.0 ** draw(st.integers(-60, 60))
    return rows_ND.to(draw(st.sampled_from([torch.float64, torch.float32])))


@given(gradient_rows(), st.integers(1, 28), st.integers(1, 40), st.sampled_from([1.0, 0.5, 0.2]))
@settings(deadline=None, max_examples=80)
def test_certificate_bounds_what_any_rows_lose(rows_ND, size, rows_per_batch, alpha):
    moments = moments_of(rows_ND, size, sizes=rows_per_batch, alpha=alpha)
    certificate, exact_DD = moments.certificate, rows_ND.double().T @ rows_ND.double()
    slack = tolerance(rows_ND, certificate)
    error_D = torch.linalg.eigvalsh(exact_DD - moments.gram_DD)
    assert error_D.min() >= -slack
    assert error_D.max() <= certificate.delta + slack
    assert certificate.energy == pytest.approx(exact_DD.trace().item(), rel=1e-12, abs=0)
    assert (
        abs(certificate.energy - moments.gram_DD.trace().item() - certificate.lost_energy) <= rows_ND.shape[1] * slack
    )
    shrunk_directions = math.ceil(alpha * size)
    assert certificate.delta <= certificate.lost_energy / (shrunk_directions + 1) + slack
    spectrum_D = torch.linalg.eigvalsh(exact_DD).flip(0).clamp_min(0)
    if alpha == 1:  # the best bound known before seeing the result (Ghashami et al. 2016)
        width = rows_ND.shape[1]
        tails = [spectrum_D[k:].sum().item() / (size + 1 - k) for k in range(min(size, width) + 1) if k <= size]
        assert certificate.delta <= min(tails) + slack
    held_D = torch.linalg.eigvalsh(moments.gram_DD).flip(0)
    assert (held_D <= spectrum_D + slack).all()
    assert (spectrum_D <= held_D + certificate.delta + slack).all()
    torch.testing.assert_close(moments.sum_D, rows_ND.double().sum(0), rtol=1e-9, atol=slack**0.5)


@given(gradient_rows(), st.integers(1, 28), st.data())
@settings(deadline=None, max_examples=60)
def test_sketch_does_not_depend_on_how_rows_are_batched(rows_ND, size, data):
    cuts = data.draw(st.lists(st.integers(0, len(rows_ND)), max_size=6).map(sorted))
    sizes = [stop - start for start, stop in zip([0, *cuts], [*cuts, len(rows_ND)], strict=True)]
    whole, parts = moments_of(rows_ND, size, sizes=max(1, len(rows_ND))), moments_of(rows_ND, size, sizes=sizes)
    assert torch.equal(whole.gram_DD, parts.gram_DD)
    assert whole.certificate == parts.certificate


@pytest.mark.parametrize("kind", ["rank", "rows", "size"])
def test_nothing_is_lost_while_the_sketch_can_hold_all(kind):
    rows_ND = power_law(300, 16)
    if kind == "rank":
        rows_ND = rows_ND[:, :5] @ power_law(5, 16, seed=1)
    moments = moments_of(rows_ND[:5] if kind == "rows" else rows_ND, 16 if kind == "size" else 5)
    expected_DD = (rows_ND[:5].T @ rows_ND[:5]) if kind == "rows" else rows_ND.T @ rows_ND
    assert moments.certificate.delta == 0
    torch.testing.assert_close(moments.gram_DD, expected_DD, rtol=1e-11, atol=1e-11)


def test_rows_that_wait_in_the_buffer_count():
    rows_ND = power_law(9, 12)  # with 4 rows kept and 4 in the buffer, one row waits behind a shrink
    moments = moments_of(rows_ND, 4)
    assert moments.certificate.num_shrinks == 1
    assert moments.certificate.num_rows == 9
    without = moments_of(rows_ND[:8], 4)
    torch.testing.assert_close(moments.gram_DD.trace() + moments.certificate.lost_energy, rows_ND.square().sum())
    assert without.certificate.num_shrinks == 0


def test_reading_a_sketch_leaves_it_as_it_is():
    rows_ND = power_law(100, 8)
    read, unread = (run(batches({SITE: rows_ND[:50]}), FREQUENT) for _ in range(2))
    assert read[0][SITE].certificate.num_rows == 50
    later = [run(batches({SITE: rows_ND[50:]}), FREQUENT, initial=state)[0][SITE] for state in (read, unread)]
    assert torch.equal(later[0].gram_DD, later[1].gram_DD)


@given(gradient_rows(), st.integers(1, 28))
@settings(deadline=None, max_examples=40)
def test_a_power_of_two_scales_a_sketch_bit_for_bit(rows_ND, size):
    plain, scaled = moments_of(rows_ND.double(), size), moments_of(rows_ND.double() * 2.0**-20, size)
    assert torch.equal(plain.gram_DD * 2.0**-40, scaled.gram_DD)
    assert plain.certificate.delta * 2.0**-40 == scaled.certificate.delta


def test_signs_of_rows_and_rotations_of_the_width_change_nothing_else():
    rows_ND = power_law(200, 12)
    rotation_DD = torch.linalg.qr(power_law(12, 12, decay=0, seed=3)).Q
    signs_N1 = torch.where(torch.arange(200) % 3 == 0, -1.0, 1.0)[:, None].double()
    plain = moments_of(rows_ND, 5)
    for changed, expected_DD in (
        (rows_ND * signs_N1, plain.gram_DD),
        (rows_ND @ rotation_DD, rotation_DD.T @ plain.gram_DD @ rotation_DD),
    ):
        moments = moments_of(changed, 5)
        torch.testing.assert_close(moments.gram_DD, expected_DD, rtol=1e-9, atol=1e-9)
        assert moments.certificate.delta == pytest.approx(plain.certificate.delta)


def test_duplicated_rows_weigh_as_often_as_they_come():
    rows_ND = power_law(60, 8)
    once, thrice = moments_of(rows_ND, None), moments_of(rows_ND.repeat(3, 1), None)
    torch.testing.assert_close(thrice.gram_DD, 3 * once.gram_DD)
    assert thrice.certificate.num_rows == 180


@pytest.mark.parametrize("config", [FREQUENT, GRAM], ids=["frequent_directions", "gram"])
def test_positions_known_to_be_zero_are_counted_and_change_no_bit(config):
    rows_ND = power_law(60, 8)
    plain, padded = (run(batches({SITE: rows_ND}, num_zero_rows=n), config)[0][SITE] for n in (0, 5))
    assert torch.equal(plain.gram_DD, padded.gram_DD)
    assert padded.certificate.num_rows == 60 + 9 * 5


def test_six_thousand_shrinks_keep_count_of_their_energy():
    rows_ND = power_law(4 * 6000 + 5, 12).float()
    moments = moments_of(rows_ND, 4, sizes=1000)
    certificate = moments.certificate
    assert certificate.num_shrinks == 6000
    gap = certificate.energy - moments.gram_DD.trace().item() - certificate.lost_energy
    assert abs(gap) < 1e-11 * certificate.energy


def test_sites_of_equal_width_in_lockstep_are_what_each_is_alone():
    sites = [kv_site(0, "key", 8), kv_site(0, "value", 8), kv_site(1, "key", 12)]
    rows = {site: power_law(90, site.width, seed=i) for i, site in enumerate(sites)}
    together = run(batches(rows), FREQUENT, sites)[0]
    for site in sites:
        alone = run(batches({site: rows[site]}), FREQUENT, [site])[0]
        torch.testing.assert_close(together[site].gram_DD, alone[site].gram_DD, rtol=1e-12, atol=1e-12)
        assert together[site].certificate.num_shrinks == alone[site].certificate.num_shrinks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_gram_matrix_is_exact_for_the_rows_as_they_are_stored(dtype, precision):
    rows_ND = power_law(600, 70).to(dtype)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)  # TF32 or bfloat16 products, as some trainers choose
    try:
        moments = moments_of(rows_ND, None)
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(moments.gram_DD, rows_ND.double().T @ rows_ND.double(), rtol=1e-12, atol=1e-12)


def test_an_update_takes_delta_off_the_weakest_directions_only_if_alpha_says_so():
    rows_ND = torch.diag(torch.tensor([5.0, 4, 3, 2, 1], dtype=torch.float64))
    shrunk = shrink(rows_ND[None], 4, alpha=0.5)
    assert shrunk.delta_G.item() == 1
    assert sorted(shrunk.squared_GL[0].tolist()) == pytest.approx([4 - 1, 9 - 1, 16, 25])


@pytest.mark.parametrize("config", [FREQUENT, GRAM], ids=["frequent_directions", "gram"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_skipped_rows_are_counted_and_leave_no_trace(config, value):
    rows_ND = power_law(40, 8)
    spoiled_ND = rows_ND.clone()
    spoiled_ND[17, 2] = value
    clean_ND = rows_ND.clone()
    clean_ND[17] = 0
    config = Sketch(**vars(config) | {"non_finite": "skip"})
    spoiled, clean = (run(batches({SITE: rows}), config)[0][SITE] for rows in (spoiled_ND, clean_ND))
    assert torch.equal(spoiled.gram_DD, clean.gram_DD)
    assert torch.equal(spoiled.sum_D, clean.sum_D)
    assert (spoiled.certificate.num_dropped_rows, spoiled.certificate.num_rows) == (1, 39)


def test_a_non_finite_row_fails_after_the_stream_and_names_its_micro_batch():
    consumed = []

    def stream():
        rows_ND = power_law(40, 8)
        rows_ND[17, 2] = math.nan
        for batch in batches({SITE: rows_ND}, shard=5):
            consumed.append(batch)
            yield batch

    message = r"rank 0, layers\.0\.key, shard 5, micro-batch 2: gradient rows hold NaN or Inf \(1 at this site\)"
    with pytest.raises(DataError, match=message):
        run(stream(), FREQUENT)
    assert len(consumed) == 6  # under ZeRO-3 every rank must take part to the end


def test_wrong_rows_name_the_site_and_fail_after_the_stream():
    other = kv_site(1)
    wide = GradientBatch(0, {SITE: torch.zeros(3, 4)})
    with pytest.raises(DataError, match=r"layers\.0\.key takes gradients of shape \(N, 8\), not \(3, 4\)"):
        run([wide], GRAM)
    with pytest.raises(DataError, match=r"layers\.1\.key: a micro-batch of shard 0 has no gradient rows"):
        run([GradientBatch(0, {SITE: torch.zeros(3, 8)})], GRAM, [SITE, other])
    uneven = GradientBatch(0, {SITE: torch.zeros(3, 8), other: torch.zeros(2, 8)})
    with pytest.raises(DataError, match="the sites of a micro-batch have different numbers of rows"):
        run([uneven], GRAM, [SITE, other])


@pytest.mark.parametrize("config", [FREQUENT, GRAM], ids=["frequent_directions", "gram"])
def test_a_state_saved_within_the_stream_goes_on_bit_for_bit(config, tmp_path):
    sites = [SITE, kv_site(0, "value"), kv_site(1, "key", 12, num_heads=3)]
    stream = [
        batch for shard in (0, 3)
        for batch in batches({s: power_law(63, s.width, seed=shard + i) for i, s in enumerate(sites)}, shard=shard)
    ]  # fmt: skip
    whole = run(stream, config, sites)
    save_sketches(tmp_path / "state.safetensors", run(stream[:13], config, sites))
    resumed = run(stream[13:], config, sites, load_sketches(tmp_path / "state.safetensors"))
    assert list(resumed) == list(whole) == [0, 3]
    for shard, state in whole.items():
        assert list(state) == list(resumed[shard]) == sorted(sites, key=lambda site: site.width)
        for site in sites:
            assert torch.equal(state[site].gram_DD, resumed[shard][site].gram_DD)
            assert torch.equal(state[site].sum_D, resumed[shard][site].sum_D)
            assert state[site].certificate == resumed[shard][site].certificate


def test_a_state_that_was_read_lies_at_addresses_like_those_of_a_new_one(tmp_path):
    file = tmp_path / "state.safetensors"
    save_sketches(file, run(batches({SITE: power_law(63, SITE.width)}), GRAM))
    stored = read_tensors(file).tensors.values()
    assert any(tensor.data_ptr() % 16 for tensor in stored), "else this shows nothing"
    (state,) = load_sketches(file).values()
    addresses = [getattr(group, name).data_ptr() for group in state.groups.values() for name in TENSORS]
    assert not any(address % 16 for address in addresses)


def test_a_state_of_another_form_is_refused():
    state = run(batches({SITE: power_law(9, 8)}), FREQUENT)
    with pytest.raises(DataError, match="shard 0: the saved sketch state has other sites or another form"):
        run([], GRAM, initial=state)
    with pytest.raises(DataError, match="shard 0: the saved sketch state has other sites or another form"):
        run([], FREQUENT, [SITE, kv_site(1)], state)


def test_a_file_that_is_no_state_is_refused(tmp_path):
    from spd_dist.storage.artifacts import write_tensors

    write_tensors(tmp_path / "other.safetensors", {"weight": torch.zeros(1)})
    with pytest.raises(DataError, match=r"other\.safetensors is no sketch state: its metadata has no `shards`"):
        load_sketches(tmp_path / "other.safetensors")


@pytest.mark.parametrize("config", [FREQUENT, GRAM], ids=["frequent_directions", "gram"])
def test_state_does_not_grow_with_the_rows(config):
    few, many = (run(batches({SITE: power_law(n, 8)}, 50), config)[0] for n in (10, 5000))
    assert few.num_bytes() == many.num_bytes()


def test_auto_takes_gram_matrices_within_the_budget_and_says_why(caplog):
    site, rank = kv_site(width=512), Project().planned_rank
    fits = plan_sketches([site], Sketch(), planned_rank=rank, num_shards=8)[512]
    assert fits.form == "gram"
    tight = plan_sketches([site], Sketch(memory_gib=0.01, size=64), planned_rank=lambda _: 32, num_shards=8)[512]
    assert (tight.form, tight.size) == ("frequent_directions", 64)
    assert "more than sketch.memory_gib=0.01" in tight.reason
    assert tight.num_bytes(512) < fits.num_bytes(512)
    with caplog.at_level(logging.INFO):
        run([], Sketch())
    assert "since the Gram matrices of 1 sites and 8 shards take" in caplog.text


def test_a_sketch_as_large_as_the_width_is_held_as_a_gram_matrix():
    config = Sketch(method="frequent_directions")  # at rank D / 2 the default size is D
    plan = plan_sketches([SITE], config, planned_rank=Project().planned_rank, num_shards=1)[8]
    assert plan.form == "gram"
    assert "8 rows lose nothing" in plan.reason


def test_default_size_follows_the_rank_and_a_small_one_is_pointed_out():
    config = Sketch(method="frequent_directions")
    plans = plan_sketches([kv_site(width=256)], config, planned_rank=lambda _: 16, num_shards=1)
    assert plans[256].size == 48
    small = plan_sketches([kv_site(width=256)], FREQUENT, planned_rank=lambda _: 16, num_shards=1)
    assert "below twice the rank 16" in small[256].reason
