import dataclasses

import pytest
from answering import answers, sampled
from scipy.stats import ttest_1samp

from spd_dist.analysis.answer_summary import answers_summary
from spd_dist.analysis.comparison import arm_pairs, comparisons, identical_fraction, meaning, verdict
from spd_dist.analysis.notes import blind_notes, notes, overlap_notes, shown_notes, size_notes
from spd_dist.errors import DataError
from spd_dist.types import LeakReport


def sentence(base, spd, psr=None, num=200):
    arms = {"base": answers(base, num)} | ({} if psr is None else {"psr": answers(psr, num)})
    return verdict(comparisons(arms | {"spd": answers(spd, num)}, "accuracy", 0), "accuracy")


def test_every_arm_is_compared_with_the_first_and_the_method_with_every_arm():
    arms = {name: answers(100 + index) for index, name in enumerate(("base", "psr", "spd", "projected"))}
    pairs = [(one.before, one.after) for one in comparisons(arms, "accuracy", 0)]
    assert pairs == [("base", "psr"), ("base", "spd"), ("base", "projected"), ("psr", "spd"), ("projected", "spd")]


RANKS = ["base", "psr", "spd@rank=16", "random@rank=16"]


def test_a_variant_of_the_method_is_compared_with_its_controls():
    assert arm_pairs(RANKS)[3:] == [("psr", "spd@rank=16"), ("random@rank=16", "spd@rank=16")]
    both = arm_pairs(["base", "psr", "spd", "random", "spd@rank=16", "random@rank=16"])[5:]
    assert both == [("psr", "spd"), ("random", "spd"), ("psr", "spd@rank=16"), ("random@rank=16", "spd@rank=16")]
    assert arm_pairs(["base", "random", "spd@rank=16"])[2:] == [("random", "spd@rank=16")], "the plain one, for want"
    assert arm_pairs(["base", "spd", "random@rank=16", "spd@rank=16"])[3:] == [("random@rank=16", "spd@rank=16")]


def test_a_control_may_have_changes_of_its_own():
    arms = ["base", "spd@rank=16", "random@rank=16", "random@mode=isotropic@rank=16"]
    assert arm_pairs(arms)[3:] == [(arm, "spd@rank=16") for arm in arms[2:]]
    assert arm_pairs(["base", "spd", "random", "random@mode=isotropic"])[3:] == [
        ("random", "spd"), ("random@mode=isotropic", "spd"),
    ]  # fmt: skip


def test_a_variant_with_a_name_is_held_against_the_control_of_that_name():
    arms = ["base", "psr", "spd", "random", "spd_distil", "random_distil", "filtered"]
    assert arm_pairs(arms)[6:] == [
        ("psr", "spd"), ("random", "spd"), ("psr", "spd_distil"), ("random_distil", "spd_distil"),
        ("psr", "filtered"), ("random", "filtered"), ("spd", "filtered"),
    ]  # fmt: skip
    assert arm_pairs(["base", "spd_distil", "random_onpolicy"])[2:] == []
    assert arm_pairs(["base", "spd", "random", "spd_distil"])[3:] == [("random", "spd"), ("random", "spd_distil")]
    rho = ["base", "spd_distil", "random_distil@rho=0.4"]
    assert arm_pairs(rho)[2:] == [("random_distil@rho=0.4", "spd_distil")]


def test_what_is_filtered_is_held_against_as_many_samples_that_are_not():
    arms = ["base", "spd", "spd@generate.num_samples=4", "filtered", "filtered@generate.num_samples=8"]
    found = arm_pairs(arms)[4:]
    assert found == [
        ("spd@generate.num_samples=4", "filtered"),
        ("spd", "filtered@generate.num_samples=8"),
    ]


def test_a_control_that_is_changed_is_held_against_itself_and_against_the_method_changed_alike():
    start = "@finetune.lora_init=eva"
    assert arm_pairs(["base", "psr", "spd", f"psr{start}"])[3:] == [("psr", "spd"), ("psr", f"psr{start}")]
    assert arm_pairs(["base", "psr", f"spd{start}", f"psr{start}"])[3:] == [(f"psr{start}", f"spd{start}")]


def test_a_start_in_the_subspace_is_held_against_one_in_random_directions():
    start = "psr@finetune.lora_init=spd"
    arms = ["base", "psr", start, f"{start}@project.mode=random", "psr@finetune.lora_init=eva"]
    plain = [("psr", arm) for arm in arms[2:]]
    assert arm_pairs(arms)[4:] == [*plain, (f"{start}@project.mode=random", start)]


def test_answers_at_another_temperature_are_no_controls():
    hot = "@evaluate.temperature=0.7"
    arms = ["base", "psr", "spd", f"base{hot}", f"psr{hot}", f"spd{hot}"]
    assert arm_pairs(arms)[5:] == [("psr", "spd")]


def test_what_is_meant_is_said_of_the_method_and_not_of_its_last_variant():
    arms = {arm: answers(100 + 10 * index) for index, arm in enumerate(["base", "spd", "spd@rank=16"])}
    assert meaning(comparisons(arms, "accuracy", 0), "accuracy").startswith("In short: SPD answers better than BASE")


def test_the_verdict_is_about_every_variant_of_the_method_and_about_no_control():
    found = comparisons({arm: answers(100 + 10 * index) for index, arm in enumerate(RANKS)}, "accuracy", 0)
    text = verdict(found, "accuracy")
    assert text.startswith("SPD@RANK=16 against BASE: +10.0 points")
    assert "; against PSR: +5.0 points" in text
    assert "RANDOM" not in text
    assert shown_notes(found, "accuracy") == [
        "Shown, too, after the correction: psr - base +5.0 points (Holm p 0.0059), random@rank=16 - base +15.0 points "
        "(Holm p 9.3e-09), spd@rank=16 - random@rank=16 -5.0 points (Holm p 0.0059)."
    ]
    two = {arm: answers(100 + 10 * index) for index, arm in enumerate(["base", "spd@rank=4", "spd", "random"])}
    sentences = verdict(comparisons(two, "accuracy", 0), "accuracy").split(". ")
    assert [one.partition(" ")[0] for one in sentences] == ["SPD@RANK=4", "SPD"]


def test_variants_count_in_the_family_that_is_corrected():
    found = comparisons({arm: answers(100 + 3 * index) for index, arm in enumerate(RANKS)}, "accuracy", 0)
    assert len(found) == 5
    smallest = min(found, key=lambda one: one.p_value)
    assert smallest.p_holm == pytest.approx(5 * smallest.p_value)


def test_a_comparison_holds_difference_interval_test_and_overlap():
    one = comparisons({"base": answers(100), "spd": answers(130)}, "accuracy", 0)[0]
    assert one.difference == pytest.approx(0.15)
    assert one.interval[0] < 0.15 < one.interval[1]
    assert (one.num_gained, one.num_lost) == (30, 0)
    assert one.p_holm == one.p_value == pytest.approx(2 * 0.5**30)
    assert one.identical_fraction == 0.85
    assert 0 < one.detectable_difference < 0.15


def test_the_family_of_comparisons_is_corrected():
    arms = {"base": answers(100), "psr": answers(106), "spd": answers(106)}
    found = comparisons(arms, "accuracy", 0)
    assert found[0].p_value == pytest.approx(2 * 0.5**6)
    assert found[0].p_holm == pytest.approx(3 * 2 * 0.5**6)


def test_arms_over_different_examples_are_refused():
    with pytest.raises(DataError, match="200 and 150 examples cannot be compared"):
        comparisons({"base": answers(100), "spd": answers(100, num=150)}, "accuracy", 0)


def test_the_verdict_claims_a_gain_only_where_the_interval_shows_it():
    assert "a gain beyond chance over examples, of one training seed" in sentence(100, 130)
    assert "a loss beyond chance" in sentence(130, 100)
    assert "+2.0 points" in sentence(100, 104)
    assert "no difference is shown" in sentence(100, 102)
    assert "no difference is shown" in sentence(100, 100)


def test_a_difference_that_falls_to_the_correction_is_no_gain():
    assert sentence(100, 106, psr=100).count("does not survive the correction for 3 comparisons") == 2


def test_the_verdict_says_what_this_many_examples_could_have_shown():
    found = comparisons({"base": answers(100), "spd": answers(100, first=20)}, "accuracy", 0)
    assert "n 200), so no difference is shown; this test would find about 8.8 points." in verdict(found, "accuracy")
    assert blind_notes(found) == []


def test_arms_that_hardly_differ_are_said_to_show_nothing():
    found = comparisons({"base": answers(100), "psr": answers(100, first=20), "spd": answers(101)}, "accuracy", 0)
    assert [one.detectable_difference is None for one in found] == [False, True, False]
    assert blind_notes(found) == [
        "Too few examples to find any difference in 4 runs of 5, since so few answers differ: spd - base."
    ]


def test_the_verdict_speaks_of_base_and_of_plain_retraining_and_of_no_other_arm():
    text = sentence(100, 130, psr=129)
    assert text.startswith("SPD against BASE: +15.0 points (95 % interval +")
    assert "; against PSR: +0.5 points" in text


def test_without_the_method_the_last_arm_is_spoken_of_and_one_arm_is_not_compared():
    found = comparisons({"base": answers(100), "psr": answers(130)}, "accuracy", 0)
    assert verdict(found, "accuracy").startswith("PSR against BASE")
    assert verdict(comparisons({"base": answers(3)}, "accuracy", 0), "accuracy").startswith("One arm alone")


def test_lower_likelihood_loss_is_a_gain():
    rows = answers(0)
    before = [dataclasses.replace(row, nll=1.0 + 0.01 * (i % 7)) for i, row in enumerate(rows)]
    after = [dataclasses.replace(row, nll=0.9 + 0.01 * (i % 5)) for i, row in enumerate(rows)]
    found = comparisons({"base": before, "spd": after}, "nll", 0)
    assert found[0].difference == pytest.approx(-0.11, abs=0.001)
    assert found[0].test == "paired t"
    assert "-0.110 nats" in verdict(found, "nll")
    assert "a gain" in verdict(found, "nll")
    (same,) = comparisons({"base": before, "spd": before}, "nll", 0)
    assert (same.p_value, same.detectable_difference) == (1.0, None)


def test_the_verdict_says_which_likelihood_could_have_been_told_apart():
    rows = answers(0)
    before = [dataclasses.replace(row, nll=1.0 + 0.01 * (i % 7)) for i, row in enumerate(rows)]
    after = [dataclasses.replace(row, nll=1.0 + 0.01 * (i % 5)) for i, row in enumerate(rows)]
    after[0] = dataclasses.replace(after[0], nll=3.0)
    found = comparisons({"base": before, "spd": after}, "nll", 0)
    assert "so no difference is shown; this test would find about 0.0" in verdict(found, "nll")


def test_several_samples_are_compared_by_their_means():
    arms = {"base": sampled([0, 1, 2, 3] * 10), "spd": sampled([1, 1, 4, 4] * 10)}
    (one,) = comparisons(arms, "accuracy", 0)
    assert (one.difference, one.num_examples, one.test) == (pytest.approx(0.25), 40, "paired t")
    assert one.p_value == pytest.approx(ttest_1samp([0.25, 0, 0.5, 0.25] * 10, 0).pvalue)
    assert one.identical_fraction == pytest.approx(1 - 0.25), "sample by sample"
    assert one.num_gained is None
    assert "SPD against BASE: +25.0 points" in verdict([one], "accuracy")


def test_arms_that_answered_another_number_of_times_are_refused():
    with pytest.raises(DataError, match=r"different numbers of answers an example cannot be compared \(\{'base': 1"):
        comparisons({"base": answers(2, num=4), "spd": sampled([1, 2, 3, 4])}, "accuracy", 0)


def test_identical_outputs_are_counted():
    assert identical_fraction(answers(100), answers(150)) == 0.75


def test_a_model_that_only_learned_to_stop_is_put_in_words():
    before = answers_summary(answers(100, finish_reason="length"), "accuracy")
    after = answers_summary(answers(130), "accuracy")
    found = notes({"base": before, "psr": before, "spd": after})
    assert found == ["Answers that end by themselves: BASE 0%, SPD 100%. A gain may be of that."]
    assert notes({"base": after, "spd": after}) == []


def test_test_problems_that_an_arm_may_have_seen_are_put_in_words():
    overlap = LeakReport("train", "test", num_rows=96, num_exact=2, num_near=1, leaks=())
    none = dataclasses.replace(overlap, split="calibration", num_exact=0, num_near=0)
    inside = dataclasses.replace(overlap, other="train", split="calibration")
    assert overlap_notes([none, overlap, inside]) == [
        "2 exact and 1 near copies of test problems are among the 96 train rows; data.leaks=remove drops them."
    ]


def test_a_part_of_the_published_split_is_put_in_words():
    assert size_notes(100, 1319) == [
        "100 examples; the published test split has 1319: not to be put beside numbers of it."
    ]
    assert size_notes(1319, 1319) == size_notes(100, None) == []


def test_gains_that_may_be_of_ending_or_of_form_are_counted():
    before = answers(0, num=20, finish_reason="length", lenient_correct=False)
    before[0] = dataclasses.replace(before[0], lenient_correct=True)
    after = [
        dataclasses.replace(row, finish_reason="stop" if index < 5 else "length")
        for index, row in enumerate(answers(8, num=20))
    ]
    (one,) = comparisons({"base": before, "spd": after}, "accuracy", 0)
    assert (one.num_gained, one.num_gained_by_ending, one.num_gained_by_form) == (8, 5, 1)
