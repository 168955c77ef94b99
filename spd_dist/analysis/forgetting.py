"""What arms lost on tasks of other domains: the same arms, answered in the same run, compared with the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spd_dist.analysis.answer_summary import answers_summary, values_by_id
from spd_dist.analysis.intervals import paired_bootstrap
from spd_dist.types import Answer


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
