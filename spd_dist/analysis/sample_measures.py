"""What the answers to an example say together: pass@k, maj@k, how many differ, how sure the model was, and loops."""

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
    """`token_entropy` and `repetition` of one arm; of several samples an example `pass@k`, `maj@k` and `distinct`, too.

    `distinct` counts different answers of an example, `distinct_correct` the right ones among them; programs differ by
    their syntax tree. `token_entropy` is there where an engine measured it.
    """
    found = {}
    for name, values in _by_example(answers).items():
        if len(values) < 2:
            continue  # no interval
        value, interval = mean_interval(list(values.values()))
        found[name] = Measured(value, list(interval))
    return found


def paired_measures(before: Sequence[Answer], after: Sequence[Answer], seed: int) -> dict[str, Measured]:
    """How two arms differ in each of the measures, example by example."""
    values, others, found = _by_example(before), _by_example(after), {}
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


def _by_example(answers: Sequence[Answer]) -> Mapping[str, Mapping[str, float]]:
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
