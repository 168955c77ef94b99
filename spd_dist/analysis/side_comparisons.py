"""Comparisons beside that of the arms: with the untouched model at its best temperature, and on other tasks.

The temperature is chosen on one half of the examples and judged on the other, and the other way round, so that the
choice is paid for (nested folds). What is claimed is corrected for the number of comparisons of its kind.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple

from spd_dist.analysis.answer_summary import answers_summary, samples_of, values_by_id
from spd_dist.analysis.intervals import SIGNIFICANCE, holm, mcnemar, paired_bootstrap, paired_t
from spd_dist.analysis.random_effects import crossed
from spd_dist.types import ADDED_LATER, Answer

AT = "@evaluate.temperature="
Values = Mapping[str, float]
"""By example id."""


@dataclass(frozen=True)
class DecodeControl:
    """A student against the untouched model at the temperature that suits it best."""

    after: str
    chosen: list[str]
    """The arm of the untouched model that was best on each half, for the other; over seeds, of one after the other."""
    difference: float
    interval: list[float]
    p_value: float
    num_examples: int
    sentence: str
    p_holm: float | None = field(default=None, metadata=ADDED_LATER)
    """The p value adjusted for all students beside it; None in a report that corrected nothing."""


class _Nested(NamedTuple):
    """A student and the untouched model, each example at a temperature that was chosen on the other half."""

    after: str
    chosen: list[str]
    before: Values
    own: Values


def decode_controls(answers: Mapping[str, Sequence[Answer]], metric: str, seed: int) -> list[DecodeControl]:
    """One for every student, and for every student at its own best temperature; none if base was not swept."""
    found = []
    for after, chosen, before, own in _nested(answers, metric, seed):
        outcome = paired_bootstrap(before, own, seed)
        p_value = _p_value(before, own, metric, samples_of(answers["base"]))
        found.append(_control(after, chosen, outcome.difference, outcome.interval, p_value, outcome.num_examples))
    return _spoken(found, metric)


def decode_controls_over_seeds(
    by_seed: Sequence[Mapping[str, Sequence[Answer]]], metric: str, seeds: Sequence[int]
) -> list[DecodeControl]:
    """As `decode_controls` of each seed, and their differences for other seeds and other examples.

    `by_seed` has the answers by arm, of the same arms under each of `seeds`.
    """
    found = []
    nested = [_nested(answers, metric, seed) for answers, seed in zip(by_seed, seeds, strict=True)]
    for each in zip(*nested, strict=True):
        spread = crossed([{key: one.own[key] - one.before[key] for key in one.before} for one in each])
        chosen = [arm for one in each for arm in one.chosen]
        size = len(each[0].before)
        found.append(_control(each[0].after, chosen, spread.mean, spread.interval, spread.p_value, size))
    return _spoken(found, metric, num_seeds=len(by_seed))


def _nested(answers: Mapping[str, Sequence[Answer]], metric: str, seed: int) -> list[_Nested]:
    """Every student with the untouched model, and every one at its own best temperature; none if base was not swept."""
    families: dict[str, list[str]] = {}
    for arm in answers:
        families.setdefault(arm.partition(AT)[0], []).append(arm)
    if len(families.get("base", ())) < 2:
        return []
    values = {arm: values_by_id(given, metric) for arm, given in answers.items()}
    chosen, best = _best(families.pop("base"), values, metric, seed)
    found = []
    for student, arms in families.items():
        found.append(_Nested(student, chosen, best, values[student]))
        if len(arms) > 1:
            own = _best(arms, values, metric, seed)[1]
            found.append(_Nested(f"{student} at its best temperature", chosen, best, own))
    return found


def _best(
    arms: Sequence[str], values: Mapping[str, Values], metric: str, seed: int
) -> tuple[list[str], dict[str, float]]:
    """The arm chosen for each half on the other one, and each example's value of the arm chosen for its half."""
    keys = sorted(values[arms[0]], key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest())
    halves = keys[::2], keys[1::2] or keys[::2]
    sign = -1 if metric == "nll" else 1
    chosen = [max(arms, key=lambda arm: sign * fmean(values[arm][key] for key in other)) for other in halves[::-1]]
    return chosen, {key: values[arm][key] for arm, half in zip(chosen, halves, strict=True) for key in half}


def _p_value(before: Values, after: Values, metric: str, num_samples: int) -> float:
    """By the test that the comparison of the arms has, too."""
    is_right_or_wrong = metric != "nll" and num_samples == 1
    return mcnemar(before, after).p_value if is_right_or_wrong else paired_t(before, after).p_value


def _control(
    after: str, chosen: list[str], difference: float, interval: Sequence[float], p_value: float, num_examples: int
) -> DecodeControl:
    return DecodeControl(after, chosen, difference, list(interval), p_value, num_examples, sentence="")


def _spoken(found: Sequence[DecodeControl], metric: str, num_seeds: int = 1) -> list[DecodeControl]:
    """Corrected for their number (Holm), each with its sentence."""
    adjusted = holm({one.after: one.p_value for one in found})
    over = f", over {num_seeds} seeds," if num_seeds > 1 else ""
    under, basis = (" under each seed", "examples and seeds") if num_seeds > 1 else ("", "examples")
    spoken = []
    for one in found:
        low, high = one.interval
        if low <= 0 <= high:
            end = ": no difference is shown"
        elif adjusted[one.after] >= SIGNIFICANCE:
            end = f", {_not_shown(len(found))}"
        else:
            end = f": a difference beyond chance over {basis}"
        sentence = (
            f"{one.after.upper()}{over} against BASE at its best temperature ({', '.join(dict.fromkeys(one.chosen))}, "
            f"chosen on the other half of the examples{under}): "
            f"{_size(one.difference, one.interval, metric, one.num_examples)}{end}."
        )
        spoken.append(dataclasses.replace(one, p_holm=adjusted[one.after], sentence=sentence))
    return spoken


def _size(difference: float, interval: Sequence[float], metric: str, num_examples: int) -> str:
    scale, digits, unit = (1, 3, "nats") if metric == "nll" else (100, 1, "points")
    value, low, high = (f"{scale * one:+.{digits}f}" for one in (difference, *interval))
    return f"{value} {unit} (95 % interval {low} to {high}, n {num_examples})"


def _not_shown(num_comparisons: int) -> str:
    """What is said where an interval leaves out zero, and the p value is too large."""
    if num_comparisons == 1:
        return "which its test does not show"
    return f"which does not survive the correction for {num_comparisons} comparisons"


@dataclass(frozen=True)
class OtherTask:
    """One arm on one task of another domain."""

    task: str
    arm: str
    metric: str
    value: float
    interval: list[float]
    num_examples: int
    difference: float | None
    """From the first arm, over the same examples; None, as what follows, for the first itself."""
    difference_interval: list[float] | None
    p_value: float | None = field(default=None, metadata=ADDED_LATER)
    p_holm: float | None = field(default=None, metadata=ADDED_LATER)
    """The p value adjusted for all arms and tasks beside it."""


def other_tasks(
    answers: Mapping[str, Mapping[str, Sequence[Answer]]], metrics: Mapping[str, str], seed: int
) -> list[OtherTask]:
    """One a task and arm, from each task's answers by arm; `metrics` by task, `seed` of the bootstrap."""
    each = [_of_arm(task, arm, by_arm, metrics[task], seed) for task, by_arm in answers.items() for arm in by_arm]
    return corrected_tasks(each)


def corrected_tasks(found: Sequence[OtherTask]) -> list[OtherTask]:
    """Each with its p value adjusted for all arms and tasks that are compared (Holm)."""
    p_values = {(one.task, one.arm): one.p_value for one in found}
    adjusted = holm({f"{task} {arm}": p_value for (task, arm), p_value in p_values.items() if p_value is not None})
    return [dataclasses.replace(one, p_holm=adjusted.get(f"{one.task} {one.arm}")) for one in found]


def _of_arm(task: str, arm: str, by_arm: Mapping[str, Sequence[Answer]], metric: str, seed: int) -> OtherTask:
    summary, first = answers_summary(by_arm[arm], metric), next(iter(by_arm))
    own = OtherTask(task, arm, metric, summary.value, summary.interval, summary.num_examples, None, None)
    if arm == first:
        return own
    before, after = values_by_id(by_arm[first], metric), values_by_id(by_arm[arm], metric)
    outcome, p_value = paired_bootstrap(before, after, seed), _p_value(before, after, metric, summary.num_samples)
    return dataclasses.replace(
        own, difference=outcome.difference, difference_interval=list(outcome.interval), p_value=p_value
    )


def forgetting_notes(found: Sequence[OtherTask]) -> list[str]:
    """Where an arm lost beyond chance, of all arms and tasks; where one alone would have; one line if none did."""
    lost, unclear, num_compared = [], [], sum(one.difference is not None for one in found)
    for one in found:
        if one.difference is None or one.difference_interval is None:
            continue
        low, high = one.difference_interval
        if not (low > 0 if one.metric == "nll" else high < 0):
            continue
        size = _size(one.difference, one.difference_interval, one.metric, one.num_examples)
        if one.p_holm is not None and one.p_holm < SIGNIFICANCE:
            lost.append(f"{one.arm.upper()} lost on {one.task}: {size}.")
        else:
            unclear.append(f"{one.arm.upper()} on {one.task}: {size}, {_not_shown(num_compared)}.")
    if not found or lost:
        return [*lost, *unclear]
    tasks = ", ".join(dict.fromkeys(one.task for one in found))
    return [*unclear, f"No arm is shown to have lost on {tasks}."]
