"""One arm's answers to one task in numbers: the metric with its interval, and what else could explain it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from spd_dist.analysis.intervals import mean_interval, pass_at_k, share_interval
from spd_dist.errors import DataError
from spd_dist.types import Answer


@dataclass(frozen=True)
class AnswersSummary:
    """One arm on one task. Of several samples an example `value` is of their means, the other shares of all answers."""

    metric: str
    num_examples: int
    num_samples: int
    """Of each example."""
    value: float
    """The metric."""
    interval: list[float]
    """Of 95 %, its two ends."""
    num_correct: int
    pass_at_k: dict[str, float]
    strict_accuracy: float
    lenient_accuracy: float
    ended_fraction: float
    strict_extraction_fraction: float
    lenient_extraction_fraction: float
    repetition_fraction: float
    mean_tokens: float
    num_tokens: int
    unfinished_fraction: float
    """Answers that are wrong because their thought was cut at the limit."""
    reasons: dict[str, int]
    """How many answers are right or wrong for each reason, the most frequent first."""


def answers_summary(answers: Sequence[Answer], metric: str) -> AnswersSummary:
    """One arm on one task: the metric with its 95 % interval, and what else could explain it.

    Of several samples an example, the metric is of their means; `num_correct` and the shares are of all answers.

    Args:
        answers: All of them, at least one.
        metric: `accuracy`, with Wilson's interval, or `nll`, with Student's t over the examples.

    Raises:
        DataError: examples with different numbers of samples.
    """
    num, num_samples = len(answers), samples_of(answers)
    values = list(values_by_id(answers, metric).values())

    def share(holds: Iterable[bool]) -> float:
        return sum(holds) / num

    num_correct = sum(answer.correct for answer in answers)
    if metric == "nll":
        value, interval = mean_interval(values)
    else:
        value, interval = num_correct / num, share_interval(values, num_samples)
    return AnswersSummary(
        metric=metric,
        num_examples=len(values),
        num_samples=num_samples,
        value=value,
        interval=list(interval),
        num_correct=num_correct,
        pass_at_k={} if metric == "nll" else _pass_at_k(values, num_samples),
        strict_accuracy=share(answer.strict_correct for answer in answers),
        lenient_accuracy=share(answer.lenient_correct for answer in answers),
        ended_fraction=share(answer.finish_reason == "stop" for answer in answers),
        strict_extraction_fraction=share(answer.strict is not None for answer in answers),
        lenient_extraction_fraction=share(answer.lenient is not None for answer in answers),
        repetition_fraction=share(answer.is_repetitive for answer in answers),
        mean_tokens=sum(answer.num_tokens for answer in answers) / num,
        num_tokens=sum(answer.num_tokens for answer in answers),
        unfinished_fraction=share(answer.reason == "unfinished" for answer in answers),
        reasons=dict(Counter(answer.reason for answer in answers).most_common()),
    )


def samples_by_id(answers: Sequence[Answer]) -> dict[str, list[Answer]]:
    """The answers to each example, in the order of both."""
    found: dict[str, list[Answer]] = {}
    for answer in answers:
        found.setdefault(answer.id, []).append(answer)
    return found


def samples_of(answers: Sequence[Answer]) -> int:
    """How many answers each example has.

    Raises:
        DataError: not all as many.
    """
    counts = sorted({len(samples) for samples in samples_by_id(answers).values()})
    if len(counts) != 1:
        raise DataError(
            f"examples with {counts} answers each have no common denominator; evaluate all with one "
            "evaluate.num_samples"
        )
    return counts[0]


def values_by_id(answers: Sequence[Answer], metric: str) -> dict[str, float]:
    """What the metric is the mean of, example by example: of several samples, their mean."""
    return {key: fmean(values) for key, values in sample_values(answers, metric).items()}


def sample_values(answers: Sequence[Answer], metric: str) -> dict[str, list[float]]:
    """The metric of every sample, example by example."""
    return {key: [_value(answer, metric) for answer in samples] for key, samples in samples_by_id(answers).items()}


def _value(answer: Answer, metric: str) -> float:
    if metric != "nll":
        return float(answer.correct)
    assert answer.nll is not None  # what such a task is measured by
    return answer.nll


def manner(temperature: float, num_samples: int) -> str:
    """How the examples were answered, in words."""
    if temperature == 0:
        return "greedy"
    return f"{num_samples} sample{'s' if num_samples > 1 else ''} at temperature {temperature:g}"


def _pass_at_k(values: Sequence[float], num_samples: int) -> dict[str, float]:
    """The chance that one of k samples is right, the mean over the examples: k a power of two, or all samples."""
    sizes = sorted({2**power for power in range(num_samples.bit_length())} | {num_samples})
    num_correct = [round(value * num_samples) for value in values]
    return {str(k): fmean(pass_at_k(num_samples, count, k) for count in num_correct) for k in sizes}
