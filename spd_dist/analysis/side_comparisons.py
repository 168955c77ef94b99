"""Comparisons beside that of the arms: with the untouched model at its best temperature, and on other tasks.

The temperature is chosen on one half of the examples and judged on the other, and the other way round, so that the
choice is paid for (nested folds).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from spd_dist.analysis.answer_summary import answers_summary, values_by_id
from spd_dist.analysis.intervals import paired_bootstrap, paired_t
from spd_dist.types import Answer

AT = "@evaluate.temperature="


@dataclass(frozen=True)
class DecodeControl:
    """A student against the untouched model at the temperature that suits it best."""

    after: str
    chosen: list[str]
    """The arm of the untouched model that was best on each half, for the other."""
    difference: float
    interval: list[float]
    p_value: float
    num_examples: int
    sentence: str


def decode_controls(answers: Mapping[str, Sequence[Answer]], metric: str, seed: int) -> list[DecodeControl]:
    """One for every student, and for every student at its own best temperature; none if base was not swept."""
    families: dict[str, list[str]] = {}
    for arm in answers:
        families.setdefault(arm.partition(AT)[0], []).append(arm)
    if len(families.get("base", ())) < 2:
        return []
    values = {arm: values_by_id(given, metric) for arm, given in answers.items()}
    chosen, best = _best(families.pop("base"), values, metric, seed)
    found = []
    for student, arms in families.items():
        found.append(_compared(student, chosen, best, values[student], metric, seed))
        if len(arms) > 1:
            own = _best(arms, values, metric, seed)[1]
            found.append(_compared(f"{student} at its best temperature", chosen, best, own, metric, seed))
    return found


def _best(
    arms: Sequence[str], values: Mapping[str, Mapping[str, float]], metric: str, seed: int
) -> tuple[list[str], dict[str, float]]:
    """The arm chosen for each half on the other one, and each example's value of the arm chosen for its half."""
    keys = sorted(values[arms[0]], key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest())
    halves = keys[::2], keys[1::2] or keys[::2]
    sign = -1 if metric == "nll" else 1
    chosen = [max(arms, key=lambda arm: sign * fmean(values[arm][key] for key in other)) for other in halves[::-1]]
    return chosen, {key: values[arm][key] for arm, half in zip(chosen, halves, strict=True) for key in half}


def _compared(
    after: str, chosen: list[str], before: Mapping[str, float], own: Mapping[str, float], metric: str, seed: int
) -> DecodeControl:
    outcome, p_value = paired_bootstrap(before, own, seed), paired_t(before, own).p_value
    low, high = outcome.interval
    scale, unit = (1, "nats") if metric == "nll" else (100, "points")
    is_shown = "no difference is shown" if low <= 0 <= high else "a difference beyond chance over examples"
    sentence = (
        f"{after.upper()} against BASE at its best temperature ({', '.join(dict.fromkeys(chosen))}, chosen on the "
        f"other half of the examples): {scale * outcome.difference:+.1f} {unit} "
        f"(95 % interval {scale * low:+.1f} to {scale * high:+.1f}, n {outcome.num_examples}): {is_shown}."
    )
    return DecodeControl(
        after, chosen, outcome.difference, list(outcome.interval), p_value, outcome.num_examples, sentence
    )


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
    """From the first arm, over the same examples; None for the first itself."""
    difference_interval: list[float] | None


def other_tasks(
    answers: Mapping[str, Mapping[str, Sequence[Answer]]], metrics: Mapping[str, str], seed: int
) -> list[OtherTask]:
    """One a task and arm, from each task's answers by arm; `metrics` by task, `seed` of the bootstrap."""
    return [_of_arm(task, arm, by_arm, metrics[task], seed) for task, by_arm in answers.items() for arm in by_arm]


def _of_arm(task: str, arm: str, by_arm: Mapping[str, Sequence[Answer]], metric: str, seed: int) -> OtherTask:
    summary, first = answers_summary(by_arm[arm], metric), next(iter(by_arm))
    difference, bounds = None, None
    if arm != first:
        outcome = paired_bootstrap(values_by_id(by_arm[first], metric), values_by_id(by_arm[arm], metric), seed)
        difference, bounds = outcome.difference, list(outcome.interval)
    return OtherTask(task, arm, metric, summary.value, summary.interval, summary.num_examples, difference, bounds)


def forgetting_notes(found: Sequence[OtherTask]) -> list[str]:
    """Where an arm lost beyond chance over the examples; and one line if none did."""
    lost = []
    for one in found:
        if one.difference is None or one.difference_interval is None:
            continue
        low, high = one.difference_interval
        if low > 0 if one.metric == "nll" else high < 0:
            scale, unit = (1, " nats") if one.metric == "nll" else (100, " points")
            lost.append(
                f"{one.arm.upper()} lost on {one.task}: {scale * one.difference:+.1f}{unit} "
                f"(95 % interval {scale * low:+.1f} to {scale * high:+.1f}, n {one.num_examples})."
            )
    if not found or lost:
        return lost
    tasks = ", ".join(dict.fromkeys(one.task for one in found))
    return [f"No arm is shown to have lost on {tasks}."]
