"""What the mechanism test says: effects with intervals, ranks among random subspaces, correction for many looks.

Shapes: C comparisons, J subspaces that are exchangeable under the hypothesis: the method's own and the random ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import spearmanr

from spd_dist.analysis.intervals import SIGNIFICANCE
from spd_dist.errors import DataError


@dataclass(frozen=True)
class ControlEffect:
    """What one other subspace does."""

    name: str
    effect: float
    """Mean over rows of NLL(projected) - NLL(base) of the gold answer: nats an answer, negative is better."""
    interval: tuple[float, float]
    """95 %, by the paired bootstrap over rows."""
    kl: float
    """KL(base || projected), nats a token."""


@dataclass(frozen=True)
class MatchedKL:
    """The method's subspace and the random ones at equal distortion, pair by pair."""

    p_value: float
    """One-sided: (1 + random subspaces at least as low) / (1 + random subspaces)."""
    effect: float
    """Of the method's subspace: the mean over pairs, in which it is blended where it distorts more."""
    kl: float
    """Its mean divergence in these pairs."""


@dataclass(frozen=True)
class MechanismResult:
    """`mechanism/mechanism.json`: the primary comparison."""

    num_rows: int
    num_random: int
    effect: float
    interval: tuple[float, float]
    p_value: float
    """One-sided, among the random subspaces of the same rank, whatever they distort."""
    matched_kl: MatchedKL
    controls: list[ControlEffect]


SCHEMA = 1


@dataclass(frozen=True)
class MatchedPair:
    """The method's subspace (`own`) and another at equal distortion."""

    name: str
    blended: str
    """Which of the two was blended down: `spd`, the other's name, or neither."""
    share: float
    """Of its projection that was left."""
    kl: float
    other_kl: float
    effect: float
    other_effect: float
    difference: float
    """Own less other, over the same rows: negative speaks for the method's subspace."""
    interval: tuple[float, float]
    is_matched: bool


@dataclass(frozen=True)
class VariantSummary:
    """What one projection did, on average over the rows."""

    comparison: str
    prompt: str
    name: str
    kind: str
    """spd, random, equal_energy, control, candidate."""
    share: float
    """Of the projection; below 1 it is blended."""
    num_rows: int
    effect: float
    interval: tuple[float, float]
    solution_effect: float
    """The same of the whole reference answer's NLL."""
    log_odds_change: float | None
    kl: float
    kl_prompt: float | None
    kl_solution: float | None
    kl_answer: float | None
    entropy_change: float
    leakage: float


@dataclass(frozen=True)
class ExploredComparison:
    """A comparison that the config did not name as the primary one."""

    name: str
    prompt: str
    num_rows: int
    num_random: int
    effect: float
    interval: tuple[float, float]
    kl: float
    mean_random_effect: float
    mean_random_kl: float
    p_value: float
    p_corrected: float
    """For the number of explored comparisons, by the largest statistic over the same random subspaces."""


@dataclass(frozen=True)
class Answered:
    """A subspace under which the rows were answered, too."""

    name: str
    effect: float
    value: float
    """The task's metric."""


@dataclass(frozen=True)
class Validity:
    """Whether a lower NLL of the gold answers goes with better answers, over subspaces."""

    num_rows: int
    base_value: float
    subspaces: list[Answered]
    rank_correlation: float | None
    """Spearman's, of effect and metric, or the metric's negative if it is an NLL: near -1 if the test says what the
    answers say; None where one does not vary."""


@dataclass(frozen=True)
class MechanismDetails:
    """`mechanism/details.json`: everything that the page shows."""

    schema_version: int
    sentence: str
    task: str
    model: str
    prompt: str
    kinds: str
    operator: str
    rank: dict[str, int]
    base_nll: float
    """Mean of the gold answer under the untouched policy, nats."""
    variants: list[VariantSummary]
    matches: list[MatchedPair]
    explored: list[ExploredComparison]
    validity: Validity | None = None


def rank_p_value(own: float, random: Sequence[float]) -> float:
    """The share of the subspaces, the method's own included, whose effect is at least as low."""
    return (1 + sum(one <= own for one in random)) / (1 + len(random))


def num_at_least_as_low(pairs: Sequence[MatchedPair]) -> int:
    """Random subspaces that do as well at equal distortion, or are left at another one, so that it is not known."""
    return sum(one.other_effect <= one.effect or not one.is_matched for one in pairs)


def max_statistic_p_values(effects: Sequence[Sequence[float]]) -> list[float]:
    """P values of several comparisons, corrected for their number by the largest statistic (Westfall and Young 1993).

    Each comparison's effects are standardised over its J subspaces; a subspace's statistic is the largest of its
    comparisons. Under the hypothesis the method's own is one among J alike, in all comparisons together.

    Args:
        effects: Of each comparison, the method's own first, then those of the random subspaces, in one order.

    Raises:
        DataError: comparisons with different numbers of subspaces, or with fewer than two.
    """
    if not effects:
        return []
    if len({len(one) for one in effects}) != 1 or len(effects[0]) < 2:
        raise DataError(
            f"comparisons with {sorted({len(one) for one in effects})} subspaces cannot be corrected for their number; "
            "each needs the same random subspaces, at least one"
        )
    effect_CJ = torch.tensor(effects, dtype=torch.float64)
    spread_C1 = effect_CJ.std(1, keepdim=True).clamp_min(1e-300)
    statistic_CJ = (effect_CJ.mean(1, keepdim=True) - effect_CJ) / spread_C1
    largest_J = statistic_CJ.max(0).values
    reached_CJ = largest_J[None, :] >= statistic_CJ[:, :1] - 1e-12
    return reached_CJ.double().mean(1).tolist()


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's, mean ranks for ties; None where one of the two does not vary."""
    if min(len(set(first)), len(set(second))) < 2:
        return None
    found: Any = spearmanr(first, second)  # scipy types it by its version
    return float(found.statistic)


def sentence(result: MechanismResult, random: Sequence[MatchedPair]) -> str:
    """The verdict in one sentence.

    Args:
        result: The primary comparison.
        random: The method's subspace and each random one at equal distortion.
    """
    low, high = result.interval
    matched, total, num_lower = result.matched_kl, len(random), num_at_least_as_low(random)
    is_blended = any(one.blended == "spd" for one in random)
    effect = matched.effect if is_blended else result.effect
    blended = f"; blended to the distortion of others it {_changes(effect)} on average" if is_blended else ""
    num_matched = sum(one.is_matched for one in random)
    equal = "at equal distortion" + ("" if num_matched == total else f" ({num_matched} of them within 5 %)")
    if matched.p_value > SIGNIFICANCE and num_lower and effect < 0:
        than = f"no more than {num_lower} of {total} random subspaces {equal}"
    else:
        doubt = "" if matched.p_value <= SIGNIFICANCE else ", too few to show it"
        than = f"{'more' if effect < 0 else 'less'} than {total - num_lower} of {total} random subspaces {equal}{doubt}"
    what = "the gold answer's NLL"
    return (
        f"The capability subspace {_changes(result.effect, what)} "
        f"(95 % interval of the change {low:+.3f} to {high:+.3f}, n {result.num_rows}){blended}, {than} "
        f"(p {matched.p_value:.3f})."
    )


def _changes(effect: float, what: str = "it") -> str:
    return f"{'lowers' if effect < 0 else 'raises'} {what} by {abs(effect):.3f} nats"


def explored_lines(explored: Sequence[ExploredComparison]) -> list[str]:
    """A line for each comparison that explores, for a terminal."""
    return [
        f"Explored: {one.name}: {one.effect:+.3f} nats (95 % interval {one.interval[0]:+.3f} to "
        f"{one.interval[1]:+.3f}, n {one.num_rows}); {one.num_random} random subspaces: "
        f"{one.mean_random_effect:+.3f} on average; corrected p {one.p_corrected:.3f}."
        for one in explored
    ]
