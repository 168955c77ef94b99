"""What a number is worth over the same examples under several seeds: both are sources of chance.

Two-way random effects without replication (Searle, Casella and McCulloch 1992).

Shapes: S seeds, N examples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from scipy.stats import norm, t

from spd_dist.analysis.intervals import Interval, wilson
from spd_dist.errors import DataError


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

    Two-way random effects without replication (Searle, Casella and McCulloch 1992): the mean's variance is
    (MS_examples + MS_seeds - MS_rest) / (examples * seeds), and at least that of either source alone; degrees of
    freedom by Satterthwaite (1946).

    Args:
        by_seed: The value of each example, by id, under each seed: at least two of both.
        confidence: Coverage of the interval.

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
    mean = value_SN.mean()
    by_example_N, by_seed_S = value_SN.mean(0) - mean, value_SN.mean(1) - mean
    rest_SN = value_SN - mean - by_example_N - by_seed_S[:, None]
    squares = num_seeds * by_example_N.square().sum(), num_examples * by_seed_S.square().sum(), rest_SN.square().sum()
    freedoms = num_examples - 1, num_seeds - 1, (num_examples - 1) * (num_seeds - 1)
    examples, seeds, rest = ((square / freedom).item() for square, freedom in zip(squares, freedoms, strict=True))
    error, freedom = satterthwaite((examples, seeds, rest), num_examples, num_seeds)
    if not error > 1e-12:
        return Crossed(mean.item(), Interval(mean.item(), mean.item()), 1.0, None)
    half = float(t.ppf(0.5 + confidence / 2, freedom)) * error
    p_value = float(2 * t.sf(abs(mean.item()) / error, freedom))
    detectable = half + float(t.ppf(0.8, freedom)) * error
    return Crossed(mean.item(), Interval(mean.item() - half, mean.item() + half), p_value, detectable)


def satterthwaite(mean_squares: tuple[float, float, float], num_examples: int, num_seeds: int) -> tuple[float, float]:
    """The standard error of a mean over examples and seeds, and its degrees of freedom (Satterthwaite 1946).

    Args:
        mean_squares: Of examples, of seeds, and of the rest.
        num_examples: At least 2.
        num_seeds: At least 2.
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
