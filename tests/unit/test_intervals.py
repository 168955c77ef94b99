"""Known answers: every formula against scipy, statsmodels, a brute force or a simulation."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint
from statsmodels.stats.weightstats import DescrStatsW

from spd_dist.analysis.intervals import (
    between_seeds,
    detectable_difference,
    holm,
    mcnemar,
    mean_interval,
    paired_bootstrap,
    paired_t,
    pass_at_k,
    share_interval,
    wilson_interval,
)
from spd_dist.analysis.random_effects import crossed, crossed_share
from spd_dist.errors import DataError


def arms(both=0, lost=0, gained=0, neither=0):
    pairs = [(1, 1)] * both + [(1, 0)] * lost + [(0, 1)] * gained + [(0, 0)] * neither
    random.Random(0).shuffle(pairs)
    return {f"p{i}": float(a) for i, (a, _) in enumerate(pairs)}, {f"p{i}": float(b) for i, (_, b) in enumerate(pairs)}


@given(
    st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.9, 0.95, 0.99])
)
def test_wilson_intervals_are_those_of_statsmodels(counts, confidence):
    expected = proportion_confint(*counts, alpha=1 - confidence, method="wilson")
    assert wilson_interval(*counts, confidence) == pytest.approx(expected, abs=1e-12)


def test_the_interval_of_shares_is_wilsons_for_single_answers_and_holds_the_truth_for_many():
    assert share_interval([1.0, 0.0, 0.0, 1.0, 1.0]) == wilson_interval(3, 5)
    assert share_interval([0.5] * 10, 4) == pytest.approx(wilson_interval(5, 10)), "alike by chance: not surer than so"
    narrow = share_interval([0.25, 0.5, 0.5, 0.5, 0.75, 0.5], 4)
    assert narrow == pytest.approx(wilson_interval(12, 24)), "no surer than by 24 examples"
    draws, num_held = torch.Generator().manual_seed(4), 0
    for _ in range(1000):
        chance_N = torch.rand(40, generator=draws, dtype=torch.float64) ** 2  # mean 1/3
        right_NS = torch.rand(40, 4, generator=draws, dtype=torch.float64) < chance_N[:, None]
        low, high = share_interval(right_NS.double().mean(1).tolist(), 4)
        num_held += low <= 1 / 3 <= high
    assert num_held / 1000 == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("counts", [(3, 2), (-1, 2), (0, 0)])
def test_what_is_not_a_proportion_has_no_interval(counts):
    with pytest.raises(ValueError, match="is not a proportion"):
        wilson_interval(*counts)


@given(st.integers(0, 30), st.integers(0, 40), st.integers(0, 40), st.integers(1, 30))
def test_mcnemar_is_that_of_statsmodels(both, lost, gained, neither):
    test = mcnemar(*arms(both, lost, gained, neither))
    expected = reference_mcnemar([[both, lost], [gained, neither]], exact=True)
    assert test.p_value == pytest.approx(min(1.0, expected.pvalue), abs=1e-12)
    assert (test.num_gained, test.num_lost) == (gained, lost)


def test_the_paired_bootstrap_agrees_with_scipys():
    before, after = arms(both=120, lost=20, gained=45, neither=115)
    ours = paired_bootstrap(before, after, seed=1)
    differences = [after[key] - before[key] for key in before]
    scipys = stats.bootstrap(
        (differences,), lambda x, axis: x.mean(axis), n_resamples=10_000, method="percentile", random_state=0
    ).confidence_interval
    assert ours.difference == pytest.approx(25 / 300)
    assert ours.num_examples == 300
    assert ours.interval.low == pytest.approx(scipys.low, abs=0.005)
    assert ours.interval.high == pytest.approx(scipys.high, abs=0.005)


def test_the_paired_bootstrap_is_the_same_for_the_same_seed_whatever_the_order():
    before, after = arms(both=20, lost=5, gained=9, neither=10)
    shuffled = dict(reversed(before.items()))
    assert paired_bootstrap(before, after, seed=3) == paired_bootstrap(shuffled, after, seed=3)
    uneven = {key: value + 0.01 * index for index, (key, value) in enumerate(after.items())}
    assert paired_bootstrap(before, uneven, seed=3) != paired_bootstrap(before, uneven, seed=4)


def test_pairing_narrows_the_interval_of_arms_that_mostly_agree():
    paired = paired_bootstrap(*arms(both=45, lost=2, gained=4, neither=49), seed=0).interval
    alone = wilson_interval(49, 100)
    assert paired.high - paired.low < (alone.high - alone.low) / 1.5


def test_arms_over_different_examples_are_refused():
    before, after = arms(both=3, neither=2)
    with pytest.raises(DataError, match=r"5 and 4 examples cannot be compared: 1 ids .*'p4', \.\.\.\); evaluate both"):
        paired_bootstrap(before, {key: after[key] for key in list(after)[:4]}, seed=0)
    with pytest.raises(DataError, match="5 and 5 examples cannot be compared: 10 ids"):
        mcnemar(before, {f"q{key}": value for key, value in after.items()})
    with pytest.raises(DataError, match="0 and 0 examples cannot be compared"):
        mcnemar({}, {})


@pytest.mark.seconds
@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
@settings(max_examples=10, deadline=None)
def test_holms_correction_is_that_of_statsmodels(values):
    p_values = {f"arm {index}": value for index, value in enumerate(values)}
    expected = multipletests(values, method="holm")[1]
    adjusted = holm(p_values)
    assert list(adjusted) == list(p_values)
    assert list(adjusted.values()) == pytest.approx(list(expected), abs=1e-12)


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
@settings(max_examples=50)
def test_pass_at_k_is_the_share_of_all_choices_of_k_that_hold_a_correct_one(counts):
    num_samples, num_correct, k = counts
    samples = [True] * num_correct + [False] * (num_samples - num_correct)
    choices = [any(choice) for choice in itertools.combinations(samples, k)]
    assert pass_at_k(num_samples, num_correct, k) == pytest.approx(sum(choices) / len(choices))


def test_pass_at_k_needs_k_samples():
    with pytest.raises(ValueError, match="pass@5 needs at least 5 samples; there are 4"):
        pass_at_k(4, 1, 5)


@pytest.mark.parametrize(("num_examples", "discordant"), [(240, 0.2), (500, 0.1), (1319, 0.3)])
def test_the_detectable_difference_is_found_in_four_runs_of_five(num_examples, discordant):
    difference = detectable_difference(num_examples, discordant)
    draws = torch.Generator().manual_seed(0)
    chances = torch.tensor([(discordant + difference) / 2, (discordant - difference) / 2, 1 - discordant])
    outcome_RN = torch.multinomial(chances.expand(2000, 3), num_examples, replacement=True, generator=draws)
    gained_R, lost_R = (outcome_RN == 0).sum(1), (outcome_RN == 1).sum(1)
    z_R = (gained_R - lost_R) / (gained_R + lost_R).sqrt()
    assert (z_R.abs() > 1.96).double().mean() == pytest.approx(0.8, abs=0.04)


def test_what_the_paired_t_test_can_detect_is_found_in_four_of_five():
    draws, num_found, smallest = torch.Generator().manual_seed(3), 0, []
    for _ in range(1000):
        before_N, noise_N = (torch.randn(40, generator=draws, dtype=torch.float64) for _ in range(2))
        test = paired_t(by_id(before_N.tolist()), by_id((before_N + noise_N + 0.455).tolist()))
        num_found += test.p_value < 0.05
        smallest.append(test.detectable)
    assert sorted(smallest)[500] == pytest.approx(0.455, abs=0.01)
    assert num_found / 1000 == pytest.approx(0.8, abs=0.04)
    assert paired_t({"a": 1.0, "b": 2.0}, {"a": 1.5, "b": 2.5}) == (1.0, None)


def test_more_examples_show_smaller_differences_and_too_few_show_none():
    assert detectable_difference(4000, 0.2) == pytest.approx(detectable_difference(1000, 0.2) / 2, rel=0.02)
    assert detectable_difference(10, 0.2) == 1.0
    with pytest.raises(ValueError, match="discordant: 0 must be above 0"):
        detectable_difference(100, 0)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8, unique=True))
def test_the_spread_between_seeds_is_that_of_statsmodels(values):
    reference = DescrStatsW(values, ddof=1)
    spread = between_seeds(values)
    assert spread.mean == pytest.approx(reference.mean)
    assert spread.standard_deviation == pytest.approx(reference.std, abs=1e-9)
    reference = DescrStatsW(values)
    assert spread.interval == pytest.approx(reference.tconfint_mean(0.05), abs=1e-9)


def test_one_seed_has_no_spread():
    with pytest.raises(ValueError, match="needs at least 2 seeds, not 1"):
        between_seeds([0.5])
    assert not math.isnan(between_seeds([0.5, 0.5]).standard_deviation)


def test_the_mean_of_one_value_has_no_interval():
    with pytest.raises(DataError, match=r"the mean of 1 values has no interval; raise data.num_test"):
        mean_interval([0.5])


def by_id(values):
    return {f"p{index}": float(value) for index, value in enumerate(values)}


def test_with_one_source_of_chance_the_crossed_test_is_the_t_test_over_that_source():
    values = torch.randn(40, generator=torch.Generator().manual_seed(0)).tolist()
    over_examples = crossed([by_id(values)] * 3)
    assert over_examples.p_value == pytest.approx(stats.ttest_1samp(values, 0).pvalue)
    assert over_examples.interval == pytest.approx(DescrStatsW(values).tconfint_mean(0.05))
    over_seeds = crossed([by_id([value] * 30) for value in values[:4]])
    assert over_seeds.p_value == pytest.approx(stats.ttest_1samp(values[:4], 0).pvalue)
    assert over_seeds.interval == pytest.approx(DescrStatsW(values[:4]).tconfint_mean(0.05))


@pytest.mark.parametrize(
    ("num_seeds", "seeds", "examples"), [(3, 0.05, 1.0), (3, 0.5, 0.2), (2, 0.02, 1.0), (5, 0.0, 0.5)]
)
def test_crossed_intervals_hold_the_truth_in_95_of_100_experiments(num_seeds, seeds, examples):
    draws = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=draws, dtype=torch.float64)

    num_held = 0
    for _ in range(400):
        value_SN = normal(num_seeds, 60) + normal(num_seeds, 1) * seeds**0.5 + normal(60) * examples**0.5
        low, high = crossed([by_id(row) for row in value_SN.tolist()]).interval
        num_held += low <= 0 <= high
    assert 0.92 <= num_held / 400 <= 0.985


def test_arms_that_never_differ_show_nothing_and_other_examples_are_refused():
    same = crossed([by_id([0.0] * 5)] * 2)
    assert (same.mean, same.p_value, same.interval, same.detectable) == (0, 1, (0, 0), None)
    for by_seed in ([by_id([1, 2])], [by_id([1])] * 2, [by_id([1, 2]), by_id([1, 2, 3])]):
        with pytest.raises(DataError, match="make no interval; run at least 2 seeds on the same examples"):
            crossed(by_seed)


def test_the_detectable_mean_is_found_in_four_of_five_experiments():
    draws, found, smallest = torch.Generator().manual_seed(2), [], []
    for _ in range(400):
        examples_N = torch.randn(60, generator=draws, dtype=torch.float64)
        value_SN = torch.randn(3, 60, generator=draws, dtype=torch.float64) + examples_N + 0.43
        result = crossed([by_id(row) for row in value_SN.tolist()])
        found.append(result.p_value < 0.05)
        smallest.append(result.detectable)
    assert sorted(smallest)[200] == pytest.approx(0.43, abs=0.03)
    assert sum(found) / 400 == pytest.approx(0.8, abs=0.06)


def test_a_share_over_seeds_has_wilsons_interval_and_stays_within_its_bounds():
    deterministic = crossed_share([by_id([1.0] * 30 + [0.0] * 70)] * 3).interval
    assert deterministic == pytest.approx(wilson_interval(30, 100), abs=0.002)
    never = crossed_share([by_id([0.0] * 50)] * 2)
    assert never.interval == wilson_interval(0, 50)
    rare = crossed_share([by_id([1.0] + [0.0] * 15)] * 2)
    assert 0 < rare.interval.low < 1 / 16 < rare.interval.high
