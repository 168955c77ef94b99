"""Arms against each other, example by example, and what may be said of it in a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from scipy.stats import ttest_rel

from spd_dist.runtime.answers import values_by_id
from spd_dist.runtime.statistics import detectable_difference, holm, mcnemar, paired, paired_bootstrap
from spd_dist.types import Answer

SIGNIFICANCE = 0.05
NOTEWORTHY = 0.1
"""A shift of a diagnostic by so much could explain a gain, and is put in words."""
DIAGNOSTICS = {
    "ended_fraction": ("Answers that end by themselves", " A gain may be of that."),
    "strict_extraction_fraction": ("Answers in the form that was asked for", " A gain may be of form."),
    "lenient_extraction_fraction": ("Answers that a result can be taken from", ""),
    "repetition_fraction": ("Answers that repeat themselves", ""),
}


def comparisons(answers: Mapping[str, Sequence[Answer]], metric: str, seed: int) -> list[dict[str, Any]]:
    """Paired differences of every arm from the first, and of the method (`spd`) from every other.

    Args:
        answers: Each arm's, in the order of the arms.
        metric: `accuracy` or `nll`.
        seed: Of the bootstrap.

    Raises:
        DataError: two arms did not answer the same examples.
    """
    found = [_compared(before, after, answers, metric, seed) for before, after in arm_pairs(list(answers))]
    adjusted = holm({f"{one['before']} {one['after']}": one["p_value"] for one in found})
    return [{**one, "p_holm": adjusted[f"{one['before']} {one['after']}"]} for one in found]


def arm_pairs(arms: Sequence[str]) -> list[tuple[str, str]]:
    """The family of comparisons: every arm after the first, and the method (`spd`) after every other."""
    first, *others = arms
    controls = [arm for arm in others if arm != "spd"] if "spd" in others else []
    return list(chain(((first, arm) for arm in others), ((arm, "spd") for arm in controls)))


def _compared(
    before: str, after: str, answers: Mapping[str, Sequence[Answer]], metric: str, seed: int
) -> dict[str, Any]:
    values = values_by_id(answers[before], metric), values_by_id(answers[after], metric)
    outcome = paired_bootstrap(*values, seed)
    described = {
        "before": before,
        "after": after,
        "difference": outcome.difference,
        "interval": list(outcome.interval),
        "num_examples": outcome.num_examples,
        "identical_fraction": identical_fraction(answers[before], answers[after]),
    }
    if metric == "nll":
        return described | {"test": "paired t", "p_value": _paired_t(*values)}
    test = mcnemar(*values)
    discordant = (test.num_gained + test.num_lost) / outcome.num_examples
    smallest = detectable_difference(outcome.num_examples, discordant) if discordant else 1.0
    return described | {
        "test": "exact McNemar",
        "p_value": test.p_value,
        "num_gained": test.num_gained,
        "num_lost": test.num_lost,
        **_gained_by(answers[before], answers[after]),
        "detectable_difference": smallest if smallest < 1 else None,
    }


def _gained_by(before: Sequence[Answer], after: Sequence[Answer]) -> dict[str, int]:
    """Gains that may be of ending or of form: answers that had been cut, or had been right in another form."""
    others = {answer.id: answer for answer in before}
    gained = [(others[answer.id], answer) for answer in after if answer.correct and not others[answer.id].correct]
    return {
        "num_gained_by_ending": sum(a.finish_reason == "length" and b.finish_reason == "stop" for a, b in gained),
        "num_gained_by_form": sum(a.lenient_correct for a, _ in gained),
    }


def _paired_t(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    pairs = paired(before, after)
    if len({b - a for a, b in pairs}) == 1:
        return 1.0  # a constant difference has no spread to be tested against
    return float(ttest_rel([b for _, b in pairs], [a for a, _ in pairs]).pvalue)


def identical_fraction(before: Sequence[Answer], after: Sequence[Answer]) -> float:
    """The share of examples to which two arms gave the same output, letter by letter."""
    outputs = {answer.id: answer.output for answer in before}
    return sum(outputs.get(answer.id) == answer.output for answer in after) / len(after)


def verdict(found: Sequence[Mapping[str, Any]], metric: str) -> str:
    """One sentence on the method against the untouched model and plain self-retraining: no more than is shown."""
    if not found:
        return "One arm alone: there is nothing to compare."
    last, wanted = wanted_of(found)
    clauses = [_clause(one, metric, len(found)) for one in wanted]
    return f"{last.upper()} {'; '.join(clauses)}."


def wanted_of(found: Sequence[Mapping[str, Any]]) -> tuple[str, list[Mapping[str, Any]]]:
    """The arm that a verdict is about, and its comparisons with the first arm and with plain self-retraining."""
    last = "spd" if any(one["after"] == "spd" for one in found) else found[-1]["after"]
    return last, [one for one in found if one["after"] == last and one["before"] in (found[0]["before"], "psr")]


def _clause(one: Mapping[str, Any], metric: str, num_comparisons: int) -> str:
    low, high = one["interval"]
    bounds = f"{amount(low, metric).split()[0]} to {amount(high, metric).split()[0]}"
    shown = f"{amount(one['difference'], metric)} (95 % interval {bounds}, "
    against = f"against {one['before'].upper()}: {shown}n {one['num_examples']})"
    if low <= 0 <= high:
        smallest = one.get("detectable_difference")
        needs = f"; this test would find about {amount(smallest, metric, signed=False)}" if smallest else ""
        return f"{against}, so no difference is shown{needs}"
    if one["p_holm"] >= SIGNIFICANCE:
        return f"{against}, which does not survive the correction for {num_comparisons} comparisons"
    is_better = (low > 0) != (metric == "nll")
    return f"{against}, {'a gain' if is_better else 'a loss'} beyond chance over examples, of one training seed"


def amount(value: float, metric: str, *, signed: bool = True) -> str:
    """A difference in the metric's unit: percentage points, or nats a token."""
    sign = "+" if signed else ""
    if metric == "nll":
        return f"{value:{sign}.3f} nats"
    return f"{100 * value:{sign}.1f} points"


def notes(summaries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What else changed between the first arm and others, that could be taken for a gain in skill: one line a kind."""
    first, *others = summaries
    found = []
    for name, (what, warning) in DIAGNOSTICS.items():
        share = {arm: summary[name] for arm, summary in summaries.items()}
        shifted = [arm for arm in others if abs(share[arm] - share[first]) >= NOTEWORTHY]
        if shifted:
            named = ", ".join(f"{arm.upper()} {share[arm]:.0%}" for arm in (first, *shifted))
            found.append(f"{what}: {named}.{warning}")
    return found


def overlap_notes(overlaps: Sequence[Mapping[str, Any]]) -> list[str]:
    """Test problems that stand in another split, in words: an arm may have seen them."""
    return [
        f"{one['num_exact']} exact and {one['num_near']} near copies of test problems are among the {one['num_rows']} "
        f"{one['split']} rows; data.leaks=remove drops them."
        for one in overlaps
        if one["other"] == "test" and one["num_exact"] + one["num_near"] > 0
    ]
