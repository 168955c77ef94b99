"""What a difference between arms is worth: intervals, paired tests, and the smallest difference that n can show.

Arms are compared example by example, on the same examples: different sets of ids are refused.

Shapes: N examples.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from scipy.optimize import brentq
from scipy.stats import binomtest, norm, t, ttest_rel

from spd_dist.errors import DataError
from spd_dist.seeding import generator

SIGNIFICANCE = 0.05
"""A p value below it is called more than chance."""
RESAMPLES_AT_ONCE = 500


class Interval(NamedTuple):
    """Bounds of a confidence interval."""

    low: float
    high: float


class PairedDifference(NamedTuple):
    """Mean of `after - before` over the same examples."""

    difference: float
    interval: Interval
    num_examples: int


class PairedT(NamedTuple):
    """Student's test that the mean of `after - before` over the same examples is zero."""

    p_value: float
    detectable: float | None
    """The smallest mean that such a test finds in four of five cases; None where nothing varies."""


class McNemar(NamedTuple):
    """Exact test that as many examples are gained as lost."""

    p_value: float
    num_gained: int
    """Wrong before, right after."""
    num_lost: int


class Spread(NamedTuple):
    """One arm over several seeds."""

    mean: float
    standard_deviation: float
    """Between seeds, with n - 1."""
    interval: Interval
    """Of the mean, by Student's t: it covers the seed, and not which examples were asked."""


def wilson_interval(num_correct: int, num_examples: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927): it holds near 0 and 1, where the normal one does not."""
    if not 0 <= num_correct <= num_examples or num_examples == 0:
        raise ValueError(f"{num_correct} of {num_examples} is not a proportion")
    return wilson(num_correct / num_examples, num_examples, norm.ppf(0.5 + confidence / 2))


def wilson(share: float, num_examples: float, quantile: Any) -> Interval:
    """Wilson's interval of a share, for any number of examples; `quantile` is of the normal distribution."""
    spread = quantile * quantile / num_examples
    middle = share + spread / 2
    half = quantile * math.sqrt(share * (1 - share) / num_examples + spread / (4 * num_examples))
    return Interval(max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread)))


def share_interval(shares: Sequence[float], num_samples: int = 1, confidence: float = 0.95) -> Interval:
    """Wilson's interval of the mean of shares in [0, 1], one an example: for as many examples as have its variance.

    Of shares that are 0 or 1 it is `wilson_interval`.

    Args:
        shares: Of the samples that are right.
        num_samples: Of each example; no more than all samples together are counted as examples.
        confidence: Coverage of the interval.
    """
    count, mean = len(shares), math.fsum(shares) / len(shares)
    if all(share in (0, 1) for share in shares):
        return wilson_interval(round(math.fsum(shares)), count, confidence)
    variance = math.fsum((share - mean) ** 2 for share in shares) / count
    size = min(num_samples, mean * (1 - mean) / variance) if variance > 0 else 1
    return wilson(mean, count * size, norm.ppf(0.5 + confidence / 2))


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, Interval]:
    """The mean, and its interval by Student's t.

    Raises:
        DataError: fewer than two values.
    """
    count = len(values)
    if count < 2:
        raise DataError(f"the mean of {count} values has no interval; raise data.num_test to 2 or more")
    mean = math.fsum(values) / count
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(t.ppf(0.5 + confidence / 2, count - 1)) * deviation / math.sqrt(count)
    return mean, Interval(mean - half, mean + half)


def paired(before: Mapping[str, float], after: Mapping[str, float]) -> list[tuple[float, float]]:
    """The scores of two arms, example by example, in the order of the ids.

    Raises:
        DataError: the arms did not answer the same examples.
    """
    only = sorted(before.keys() ^ after.keys())
    if only or not before:
        raise DataError(
            f"arms with {len(before)} and {len(after)} examples cannot be compared: {len(only)} ids are in one of them "
            f"only ({', '.join([*map(repr, only[:3]), '...'])}); evaluate both on the same test set"
        )
    return [(before[key], after[key]) for key in sorted(before)]


def paired_bootstrap(
    before: Mapping[str, float],
    after: Mapping[str, float],
    seed: int,
    *,
    num_resamples: int = 10_000,
    confidence: float = 0.95,
) -> PairedDifference:
    """The mean difference with its percentile interval over resampled examples (Efron 1979).

    `before` and `after` are the scores of two arms by example id.

    Raises:
        DataError: the arms did not answer the same examples.
    """
    pairs = paired(before, after)
    difference_N = torch.tensor([b - a for a, b in pairs], dtype=torch.float64)
    draws = generator(seed, "statistics", "paired_bootstrap")
    means = []
    for start in range(0, num_resamples, RESAMPLES_AT_ONCE):
        shape = (min(RESAMPLES_AT_ONCE, num_resamples - start), len(pairs))
        means.append(difference_N[torch.randint(len(pairs), shape, generator=draws)].mean(1))
    tail = (1 - confidence) / 2
    low, high = torch.cat(means).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return PairedDifference(difference_N.mean().item(), Interval(low, high), len(pairs))


def paired_t(before: Mapping[str, float], after: Mapping[str, float]) -> PairedT:
    """Student's paired test, two-sided; what it finds with power 0.8 is (t_0.975 + t_0.8) standard errors.

    Raises:
        DataError: the arms did not answer the same examples.
    """
    pairs = paired(before, after)
    differences = [b - a for a, b in pairs]
    if len(set(differences)) == 1:
        return PairedT(1.0, None)  # a constant difference has no spread to be tested against
    error, freedom = statistics.stdev(differences) / math.sqrt(len(pairs)), len(pairs) - 1
    p_value = float(ttest_rel([b for _, b in pairs], [a for a, _ in pairs]).pvalue)
    return PairedT(p_value, float(t.ppf(0.975, freedom) + t.ppf(0.8, freedom)) * error)


def mcnemar(before: Mapping[str, float], after: Mapping[str, float]) -> McNemar:
    """The exact two-sided test on the examples where two arms differ (McNemar 1947).

    Raises:
        DataError: the arms did not answer the same examples.
    """
    pairs = paired(before, after)
    gained = sum(b > a for a, b in pairs)
    lost = sum(b < a for a, b in pairs)
    p_value = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return McNemar(p_value, gained, lost)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P values adjusted for their number (Holm 1979): below `SIGNIFICANCE` each is so over the whole family."""
    adjusted, worst = {}, 0.0
    for index, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        worst = max(worst, min(1.0, (len(p_values) - index) * p_values[name]))
        adjusted[name] = worst
    return {name: adjusted[name] for name in p_values}


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased chance that one of k samples is right: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021)."""
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs at least {k} samples; there are {num_samples}, {num_correct} of them correct")
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def detectable_difference(
    num_examples: int, discordant: float, *, power: float = 0.8, significance: float = SIGNIFICANCE
) -> float:
    """The smallest paired difference that McNemar's test finds with this power (Connor 1987), at most 1.

    `discordant` is the share of the examples on which the two arms differ.
    """
    if not 0 < discordant <= 1:
        raise ValueError(
            f"discordant: {discordant} must be above 0 and at most 1: two arms that never differ show nothing"
        )
    z_level, z_power = map(float, norm.ppf([1 - significance / 2, power]))

    def missing(difference: float) -> float:
        noise = z_level * math.sqrt(discordant) + z_power * math.sqrt(max(0.0, discordant - difference**2))
        return difference * math.sqrt(num_examples) - noise

    return float(cast("Any", brentq(missing, 0.0, discordant))) if missing(discordant) > 0 else 1.0


def between_seeds(values: Sequence[float], confidence: float = 0.95) -> Spread:
    """Mean and spread of one arm's metric over seeds."""
    count = len(values)
    if count < 2:
        raise ValueError(f"a spread between seeds needs at least 2 seeds, not {count}; run more seeds")
    mean, interval = mean_interval(values, confidence)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return Spread(mean, deviation, interval)
