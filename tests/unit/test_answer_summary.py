"""Several samples an example: majorities, distinct right answers, and the decode-only control."""

from __future__ import annotations

import dataclasses
from statistics import fmean

import pytest
from answering_samples import answer

from spd_dist.analysis.answer_summary import majority_share, paired_measures, sample_measures
from spd_dist.analysis.side_comparisons import decode_controls
from spd_dist.arms import chosen, swept
from spd_dist.data.scoring.programs import canonical, program_in
from spd_dist.overrides import config_of_arm, load_config


def samples(key, votes):
    return [answer(key, number, vote, vote in ("1", "one")) for number, vote in enumerate(votes)]


@pytest.mark.parametrize(
    ("votes", "share"),
    [("1 1 2 3", 1.0), ("1 2 2 3", 0.0), ("1 1 2 2", 0.5), ("1 2 3 4", 0.25), ("1 - - -", 1.0), ("- - - -", 0.0)],
)
def test_the_majority_is_of_those_that_answer(votes, share):
    assert majority_share(samples("a", [None if vote == "-" else vote for vote in votes.split()])) == share


def test_measures_of_one_arm_and_their_paired_differences():
    weak = samples("a", ["1", "2", "2", "3"]) + samples("b", ["2", "2", "2", "2"])
    strong = samples("a", ["1", "1", "one", "3"]) + samples("b", ["1", "2", "2", "2"])
    found = sample_measures(strong)
    assert {name: one.value for name, one in found.items()} == pytest.approx(
        {"pass@2": (1 + 0.5) / 2, "maj@2": fmean([1.0, 0.5, 0.5, 0.0]), "pass@4": 1.0, "maj@4": 0.5,
         "distinct": 2.5, "distinct_correct": 1.5, "repetition": 0.0}
    )  # fmt: skip
    apart = paired_measures(weak, strong, seed=0)
    assert apart["pass@4"].value == 0.5
    assert apart["distinct_correct"].interval[0] <= apart["distinct_correct"].value == 1.0
    assert sample_measures([answer("a", 0, "1", True), answer("b", 0, "1", True)]).keys() == {"repetition"}
    assert sample_measures([answer("a", 0, "1", True)]) == {}  # one example has no interval


def test_entropy_and_repetition_have_intervals_and_are_paired_where_both_arms_measured_them():
    def arm(entropies):
        rows = [answer(str(number), 0, "1", True) for number in range(len(entropies))]
        return [
            dataclasses.replace(one, entropy=entropy, is_repetitive=entropy < 1)
            for one, entropy in zip(rows, entropies, strict=True)
        ]

    sure, unsure = arm([0.5, 1.5, 0.7, 0.9]), arm([1.0, 2.0, 1.2, 1.4])
    found = sample_measures(sure)
    assert found["token_entropy"].value == pytest.approx(0.9)
    assert found["token_entropy"].interval[0] < 0.9 < found["token_entropy"].interval[1]
    assert found["repetition"].value == 0.75
    apart = paired_measures(unsure, sure, seed=0)
    assert apart["token_entropy"].interval == pytest.approx([-0.5, -0.5])  # the same in every example
    assert apart["repetition"].value == 0.75
    silent = [dataclasses.replace(one, entropy=None) for one in sure]
    assert paired_measures(silent, sure, seed=0).keys() == {"repetition"}


@pytest.mark.parametrize(
    ("left", "right", "is_same"),
    [
        ("1,000", "1000.0", True),
        ("1/2", "0.5", True),
        ("(A)", "(a)", True),
        ("def f(x):\n    # twice\n    return 2*x", 'def f(x):\n    """Doubles."""\n    return 2 * x', True),
        ("def f(x): return 2*x", "def f(x): return x*2", False),
        ("yes", "no", False),
    ],
)
def test_answers_that_say_the_same_have_one_vote(left, right, is_same):
    assert (canonical(left) == canonical(right)) is is_same


def test_a_program_that_is_too_deep_for_its_tree_has_a_vote_as_text():
    deep = f"def f(x):\n    return {' + '.join(['x'] * 900)}"
    assert canonical(deep) == canonical(deep.replace(" + ", "  +  "))
    used = f"{deep}\ny = 1"
    assert program_in([used, "def g(x):\n    return y * x"], {"g"}) == "def g(x):\n    return y * x\n"


def test_a_sweep_adds_arms_of_base_and_students_that_share_their_student():
    config = load_config([], ["evaluate.arms=[base,projected,spd]", "evaluate.temperatures=[0.2,0.8]"])
    added = ["base@evaluate.temperature=0.2", "base@evaluate.temperature=0.8", "spd@evaluate.temperature=0.2"]
    assert list(config.evaluate.arms)[:6] == ["base", "projected", "spd", *added]
    assert swept(config.evaluate.arms, config.evaluate.temperatures) == config.evaluate.arms  # as when it is read again
    arm = chosen(["spd@evaluate.temperature=0.2"])[0]
    assert arm.stage("finetune") == "finetune"
    assert config_of_arm(config, arm).evaluate.temperature == 0.2


def test_the_control_pays_for_choosing_its_temperature():
    """Which temperature is best is seen on one half and judged on the other, so chance does not flatter base."""
    keys = [str(number) for number in range(40)]

    def arm(right):
        return [answer(key, 0, "1" if key in right else "2", key in right) for key in keys]

    answers = {
        "base": arm(keys[:10]),
        "base@evaluate.temperature=0.2": arm(keys[:20]),
        "spd": arm(keys[:20]),
        "psr": arm(keys[:5]),
    }
    spd, psr = decode_controls(answers, "accuracy", seed=0)
    assert (spd.after, spd.chosen, spd.difference) == ("spd", ["base@evaluate.temperature=0.2"] * 2, 0.0)
    assert "no difference is shown" in spd.sentence
    assert psr.difference == pytest.approx(-15 / 40)
    assert decode_controls({"base": answers["base"], "spd": answers["spd"]}, "accuracy", seed=0) == []
