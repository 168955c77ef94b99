"""One arm's answers to one task in numbers: the metric with its interval, what else could explain it, and what the
samples of an example say together: pass@k, maj@k, how many differ, how sure the model was, and loops.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from spd_dist.analysis.intervals import mean_interval, paired_bootstrap, pass_at_k, share_interval
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


@dataclass(frozen=True)
class Measured:
    """A mean over the examples, or over their paired differences, with its interval of 95 %."""

    value: float
    interval: list[float]


def sample_measures(answers: Sequence[Answer]) -> dict[str, Measured]:
    """`token_entropy` and `repetition` of one arm; of several samples an example `pass@k`, `maj@k` and `distinct`, too.

    `distinct` counts different answers of an example, `distinct_correct` the right ones among them; programs differ by
    their syntax tree. `token_entropy` is there where an engine measured it.
    """
    found = {}
    for name, values in measures_by_id(answers).items():
        if len(values) < 2:
            continue  # no interval
        value, interval = mean_interval(list(values.values()))
        found[name] = Measured(value, list(interval))
    return found


def paired_measures(before: Sequence[Answer], after: Sequence[Answer], seed: int) -> dict[str, Measured]:
    """How two arms differ in each of the measures, example by example."""
    values, others, found = measures_by_id(before), measures_by_id(after), {}
    for name in [name for name in values if name in others]:
        outcome = paired_bootstrap(values[name], others[name], seed)
        found[name] = Measured(outcome.difference, list(outcome.interval))
    return found


def majority_share(samples: Sequence[Answer]) -> float:
    """Whether the answer that most samples give is right; of equally many, the share of them that are right.

    Samples without an answer have no vote.
    """
    votes = Counter(answer.vote for answer in samples if answer.vote is not None)
    most = max(votes.values(), default=0)
    leading = [vote for vote, count in votes.items() if count == most]
    right = {answer.vote for answer in samples if answer.correct}
    return fmean(vote in right for vote in leading) if leading else 0.0


def measures_by_id(answers: Sequence[Answer]) -> Mapping[str, Mapping[str, float]]:
    """Each measure of each example. maj@k is the mean over the disjoint groups of k samples, in their order."""
    by_id = samples_by_id(answers)
    num = len(next(iter(by_id.values()), ()))
    found: dict[str, dict[str, float]] = {}
    sizes = sorted({2**power for power in range(1, num.bit_length())} | {num}) if num > 1 else []
    for key, samples in by_id.items() if sizes else ():
        num_correct = sum(answer.correct for answer in samples)
        for k in sizes:
            groups = [samples[start : start + k] for start in range(0, num - k + 1, k)]
            found.setdefault(f"pass@{k}", {})[key] = pass_at_k(num, num_correct, k)
            found.setdefault(f"maj@{k}", {})[key] = fmean(map(majority_share, groups))
        given = {answer.vote for answer in samples} - {None}
        found.setdefault("distinct", {})[key] = float(len(given))
        right = {answer.vote for answer in samples if answer.correct}
        found.setdefault("distinct_correct", {})[key] = float(len(right))
    entropies = {key: [one.entropy for one in samples if one.entropy is not None] for key, samples in by_id.items()}
    if entropies and all(entropies.values()):
        found["token_entropy"] = {key: fmean(values) for key, values in entropies.items()}
    found["repetition"] = {key: fmean(one.is_repetitive for one in samples) for key, samples in by_id.items()}
    return found
