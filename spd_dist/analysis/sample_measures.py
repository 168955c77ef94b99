"""What several samples of an example say together: pass@k, maj@k, and how many different right answers there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from spd_dist.analysis.answer_summary import samples_by_id
from spd_dist.analysis.intervals import mean_interval, paired_bootstrap, pass_at_k
from spd_dist.types import Answer


@dataclass(frozen=True)
class Measured:
    """A mean over the examples, or over their paired differences, with its interval of 95 %."""

    value: float
    interval: list[float]


def sample_measures(answers: Sequence[Answer]) -> dict[str, Measured]:
    """`pass@k`, `maj@k` and `distinct_correct` of one arm; nothing where each example has one answer."""
    found = {}
    for name, values in _by_example(answers).items():
        value, interval = mean_interval(list(values.values()))
        found[name] = Measured(value, list(interval))
    return found


def paired_measures(before: Sequence[Answer], after: Sequence[Answer], seed: int) -> dict[str, Measured]:
    """How two arms differ in each of the measures, example by example."""
    pairs = zip(_by_example(before).items(), _by_example(after).values(), strict=True)
    found = {}
    for (name, values), others in pairs:
        outcome = paired_bootstrap(values, others, seed)
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


def _by_example(answers: Sequence[Answer]) -> Mapping[str, Mapping[str, float]]:
    """Each measure of each example. maj@k is the mean over the disjoint groups of k samples, in their order."""
    by_id = samples_by_id(answers)
    num = len(next(iter(by_id.values()), ()))
    if num < 2:
        return {}
    sizes = sorted({2**power for power in range(1, num.bit_length())} | {num})
    found: dict[str, dict[str, float]] = {}
    for key, samples in by_id.items():
        num_correct = sum(answer.correct for answer in samples)
        for k in sizes:
            groups = [samples[start : start + k] for start in range(0, num - k + 1, k)]
            found.setdefault(f"pass@{k}", {})[key] = pass_at_k(num, num_correct, k)
            found.setdefault(f"maj@{k}", {})[key] = fmean(map(majority_share, groups))
        distinct = {answer.vote for answer in samples if answer.correct}
        found.setdefault("distinct_correct", {})[key] = float(len(distinct))
    return found
