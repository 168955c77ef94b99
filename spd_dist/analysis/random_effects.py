"""Means over the same examples under several seeds, both sources of chance: what one is worth, and how many show it.

Two-way random effects without replication (Searle, Casella and McCulloch 1992): a paired difference of two arms varies
between examples, between seeds, between examples under a seed, and between samples of one answer. Each part shrinks by
another count.

Shapes: S seeds, N examples, K samples of each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from scipy.stats import norm, t
from torch import Tensor

from spd_dist.analysis.answer_summary import sample_values, samples_of
from spd_dist.analysis.intervals import Interval, wilson
from spd_dist.errors import DataError
from spd_dist.types import Answer

MOST_EXAMPLES = 1_000_000
"""More are not looked for."""
POWER = 0.8
"""A difference is shown if it is found in four of five cases."""


class Crossed(NamedTuple):
    """A mean over the same examples under several seeds, with both as sources of chance."""

    mean: float
    interval: Interval
    p_value: float
    """Two-sided, against zero."""
    detectable: float | None
    """The smallest mean that such a test finds in four of five cases; None where nothing varies."""


def crossed(by_seed: Sequence[Mapping[str, float]], confidence: float = 0.95) -> Crossed:
    """The mean of a value, or of a paired difference, over examples and seeds: for other examples and other seeds.

    The mean's variance is (MS_examples + MS_seeds - MS_rest) / (examples * seeds), and at least that of either source
    alone; degrees of freedom by Satterthwaite (1946). `by_seed` has the value of each example, by id, under each seed:
    at least two of both.

    Raises:
        DataError: seeds with other examples, or fewer than two of either.
    """
    if len(by_seed) < 2 or len(by_seed[0]) < 2 or any(one.keys() != by_seed[0].keys() for one in by_seed):
        raise DataError(
            f"{len(by_seed)} seeds of {sorted({len(one) for one in by_seed})} examples make no interval; run at least "
            "2 seeds on the same examples, at least 2"
        )
    value_SN = torch.tensor([[one[key] for key in sorted(one)] for one in by_seed], dtype=torch.float64)
    num_seeds, num_examples = value_SN.shape
    mean = value_SN.mean().item()
    error, freedom = satterthwaite(_mean_squares(value_SN), num_examples, num_seeds)
    if not error > 1e-12:
        return Crossed(mean, Interval(mean, mean), 1.0, None)
    half = float(t.ppf(0.5 + confidence / 2, freedom)) * error
    p_value = float(2 * t.sf(abs(mean) / error, freedom))
    detectable = half + float(t.ppf(0.8, freedom)) * error
    return Crossed(mean, Interval(mean - half, mean + half), p_value, detectable)


def _mean_squares(value_SN: Tensor) -> tuple[float, float, float]:
    """Of examples, of seeds, and of the rest; at least two of both."""
    num_seeds, num_examples = value_SN.shape
    mean = value_SN.mean()
    by_example_N, by_seed_S = value_SN.mean(0) - mean, value_SN.mean(1) - mean
    rest_SN = value_SN - mean - by_example_N - by_seed_S[:, None]
    return (
        (num_seeds * by_example_N.square().sum() / (num_examples - 1)).item(),
        (num_examples * by_seed_S.square().sum() / (num_seeds - 1)).item(),
        (rest_SN.square().sum() / ((num_examples - 1) * (num_seeds - 1))).item(),
    )


def satterthwaite(mean_squares: tuple[float, float, float], num_examples: int, num_seeds: int) -> tuple[float, float]:
    """The standard error of a mean over examples and seeds, and its degrees of freedom (Satterthwaite 1946).

    `mean_squares` are of examples, of seeds, and of the rest; there are at least two of both. Few seeds that vary by
    much make a test of 5 % one of up to 7 % (three seeds, 300 examples, 3 points between seeds) or 11 % (two).
    """
    examples, seeds, rest = mean_squares
    freedoms = num_examples - 1, num_seeds - 1, (num_examples - 1) * (num_seeds - 1)
    total = max(examples + seeds - rest, examples, seeds)
    parts = sum(part**2 / freedom for part, freedom in zip(mean_squares, freedoms, strict=True))
    return math.sqrt(total / (num_examples * num_seeds)), total**2 / parts if parts > 0 else float(num_examples - 1)


def crossed_share(by_seed: Sequence[Mapping[str, float]], confidence: float = 0.95) -> Crossed:
    """`crossed` of values in [0, 1]: its interval is Wilson's, for as many examples as have the same variance.

    Raises:
        DataError: as of `crossed`.
    """
    found = crossed(by_seed, confidence)
    half, quantile = found.interval.high - found.mean, float(norm.ppf(0.5 + confidence / 2))
    num_examples: float = len(by_seed[0])
    if half > 0:
        num_examples = found.mean * (1 - found.mean) * (quantile / half) ** 2
    return found._replace(interval=wilson(found.mean, num_examples, quantile))


@dataclass(frozen=True)
class DifferenceVariance:
    """The variances of a paired difference, in squares of the metric's unit."""

    examples: float
    """Between examples, the same under all seeds."""
    seeds: float | None
    """Between seeds, the same for all examples; None if the pilot has one seed, which cannot show it."""
    rest: float
    """Between examples under a seed: what another seed would change of each."""
    samples: float
    """Between pairs of samples of one example under one seed; 0 if the pilot has one pair of each.

    A pair is of one number: both arms draw it by the same random numbers, which takes away much of what one varies by.
    """


@dataclass(frozen=True)
class Design:
    """How much is asked."""

    seeds: int
    examples: int
    samples: int


def difference_variance(
    by_seed: Sequence[tuple[Sequence[Answer], Sequence[Answer]]], metric: str
) -> DifferenceVariance:
    """The parts of the variance of `after - before`, by the mean squares of a pilot.

    `by_seed` is what both arms answered under each seed, to the same examples, at least two.

    Raises:
        DataError: fewer than two examples, or arms and seeds of other examples or numbers of samples.
    """
    num_samples = samples_of(by_seed[0][0])
    values = [tuple(sample_values(answers, metric) for answers in pair) for pair in by_seed]
    ids = sorted(values[0][0])
    if len(ids) < 2 or any(one.keys() != values[0][0].keys() for pair in values for one in pair):
        raise DataError(f"a pilot needs the same examples under every seed, at least 2; it has {len(ids)}")
    before_SNK, after_SNK = (
        torch.tensor([[pair[side][key] for key in ids] for pair in values], dtype=torch.float64) for side in (0, 1)
    )
    difference_SN = after_SNK.mean(2) - before_SNK.mean(2)
    sampled = 0.0
    if num_samples > 1:
        sampled = (after_SNK - before_SNK).var(2).mean().item()
    of_a_mean = sampled / num_samples
    num_seeds, num_examples = difference_SN.shape
    if num_seeds == 1:
        return DifferenceVariance(max(0.0, difference_SN.var().item() - of_a_mean), None, 0.0, sampled)
    examples, seeds, rest = _mean_squares(difference_SN)
    return DifferenceVariance(
        examples=max(0.0, (examples - rest) / num_seeds),
        seeds=max(0.0, (seeds - rest) / num_examples),
        rest=max(0.0, rest - of_a_mean),
        samples=sampled,
    )


def detectable(variance: DifferenceVariance, design: Design, num_comparisons: int = 1) -> float:
    """The smallest true difference that a two-sided test at 5 % finds in four of five cases, in the metric's unit.

    Of several comparisons it is found whatever the others show: at 5 % shared among them, Holm's first step.
    """
    rest = variance.rest + variance.samples / design.samples
    if design.seeds == 1:
        error, freedom = math.sqrt((variance.examples + rest) / design.examples), design.examples - 1.0
    else:
        squares = (
            design.seeds * variance.examples + rest,
            design.examples * (variance.seeds or 0.0) + rest,
            rest,
        )
        error, freedom = satterthwaite(squares, design.examples, design.seeds)
    quantile = 1 - 0.025 / num_comparisons
    return float(t.ppf(quantile, freedom) + t.ppf(POWER, freedom)) * error if error > 0 else 0.0


def examples_needed(
    variance: DifferenceVariance, difference: float, seeds: int, samples: int, num_comparisons: int = 1
) -> int | None:
    """The fewest examples that show `difference`; None if none do: seeds differ by too much.

    Ever more examples may show less: what is left is the seeds' chance, of which few seeds say little (their degrees of
    freedom fall). So the first that are enough are looked for, upwards.
    """

    def is_enough(num_examples: int) -> bool:
        return detectable(variance, Design(seeds, num_examples, samples), num_comparisons) <= difference

    low, high = 1, 2
    while not is_enough(high):
        low, high = high, math.ceil(1.1 * high)
        if high > MOST_EXAMPLES:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high
