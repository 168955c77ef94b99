"""From rows under projections to what is kept of them: the primary comparison, and everything that the page shows."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spd_dist.analysis.intervals import PairedDifference, paired_bootstrap
from spd_dist.analysis.mechanism_verdict import (
    SCHEMA,
    ControlEffect,
    ExploredComparison,
    MatchedKL,
    MatchedPair,
    MechanismDetails,
    MechanismResult,
    VariantSummary,
    max_statistic_p_values,
    num_at_least_as_low,
    rank_p_value,
    sentence,
)
from spd_dist.data.held_out import PARTS
from spd_dist.mechanism.comparisons import Comparison, Lineup
from spd_dist.mechanism.controls import CONTROLS, SPD
from spd_dist.stages.distortion import Measurement, Pair, Values, Variant, base


@dataclass(frozen=True)
class MechanismOutcome:
    """What a measurement gives."""

    result: MechanismResult
    details: MechanismDetails
    rows: list[dict[str, Any]]
    """Of the Parquet file: every row under every variant."""


@dataclass(frozen=True)
class Compared:
    """One comparison, measured."""

    comparison: Comparison
    lineup: Lineup
    batches: Sequence[int]


def sum_up(
    measurement: Measurement, compared: Sequence[Compared], pairs: Mapping[str, Pair], doses: Sequence[Variant]
) -> MechanismOutcome:
    """Effects, ranks and corrections; the first comparison is the primary one.

    `measurement` holds the values of everything that is named here; `pairs` are the primary one's subspaces at the
    distortion of the method's, by name, `doses` blends of some of them.
    """
    summing = _Summing(measurement, compared[0].batches)
    primary = compared[0]
    own, effects = summing.effect(SPD, primary.lineup.own), {}
    for name, variant in {**primary.lineup.random, **primary.lineup.others}.items():
        effects[name] = summing.effect(name, variant)
    matches = [summing.pair(name, pair) for name, pair in pairs.items()]
    random = [one for one in matches if one.name in primary.lineup.random]
    result = MechanismResult(
        num_rows=len(summing.ids),
        num_random=len(random),
        effect=own.effect,
        interval=own.interval,
        p_value=rank_p_value(own.effect, [effects[one.name].effect for one in random]),
        matched_kl=MatchedKL(
            p_value=(1 + num_at_least_as_low(random)) / (1 + len(random)),
            effect=statistics.fmean(one.effect for one in random),
            kl=statistics.fmean(one.kl for one in random),
        ),
        controls=list(effects.values()),
    )
    details = MechanismDetails(
        schema_version=SCHEMA,
        sentence=sentence(result, random),
        task=measurement.context.facts.get("task", ""),
        model=measurement.policy.name,
        prompt=primary.comparison.prompt,
        kinds=primary.comparison.kinds,
        operator=primary.comparison.operator,
        rank={str(site): rank for site, rank in primary.lineup.rank.items()},
        base_nll=statistics.fmean(one.nll_answer for one in summing.base.values()),
        variants=list(_summaries(measurement, compared, pairs, doses)),
        matches=matches,
        explored=_explored(measurement, compared[1:]),
    )
    blends = [each for pair in pairs.values() for each in (pair.own, pair.other)]
    wanted = [*(each for one in compared for each in one.lineup.all()), *blends, *doses]
    return MechanismOutcome(result, details, list(_lines(measurement, wanted)))


class _Summing:
    """Effects over the rows of some batches."""

    def __init__(self, measurement: Measurement, batches: Sequence[int]) -> None:
        self.measurement, self.batches = measurement, batches
        self.base: Values = {}
        self.ids: list[str] = []
        self._of = ""
        self._effects: dict[str, ControlEffect] = {}

    def values(self, variant: Variant) -> Values:
        """Of a variant, and of the base that goes with it."""
        if self._of != variant.prompt:
            self._of, self.base = variant.prompt, self.measurement.values_of(base(variant.prompt), self.batches)
            self.ids = list(self.base)
        return self.measurement.values_of(variant, self.batches)

    def effect(self, name: str, variant: Variant) -> ControlEffect:
        """The effect of a variant on the gold answers."""
        values = self.values(variant)
        if variant.key not in self._effects:
            found = self._between(self.base, values)
            kl = self.measurement.mean_kl(variant, self.batches)
            self._effects[variant.key] = ControlEffect(name, found.difference, found.interval, kl)
        return dataclasses.replace(self._effects[variant.key], name=name)

    def pair(self, name: str, pair: Pair) -> MatchedPair:
        """Two subspaces at equal distortion."""
        own, other = self.effect(SPD, pair.own), self.effect(name, pair.other)
        between = self._between(self.values(pair.other), self.values(pair.own))
        blended = "neither" if pair.share == 1 else SPD if pair.is_own_blended else name
        effects = own.kl, other.kl, own.effect, other.effect
        return MatchedPair(name, blended, pair.share, *effects, between.difference, between.interval, pair.is_matched)

    def _between(self, before: Values, after: Values) -> PairedDifference:
        """Of the gold answers' NLL, by row."""
        first, second = ({key: one.nll_answer for key, one in values.items()} for values in (before, after))
        return paired_bootstrap(first, second, self.measurement.context.seed)

    def summary(self, comparison: Comparison, name: str, variant: Variant, share: float) -> VariantSummary:
        """Everything of one variant."""
        values, found = self.values(variant), self.effect(name, variant)
        before, after = [self.base[key] for key in self.ids], [values[key] for key in self.ids]
        pairs = list(zip(before, after, strict=True))
        odds = [b.log_odds - a.log_odds for a, b in pairs if a.log_odds is not None and b.log_odds is not None]
        parts = {part: [value for one in after if (value := getattr(one, f"kl_{part}")) is not None] for part in PARTS}
        means = {part: statistics.fmean(each) if each else None for part, each in parts.items()}
        return VariantSummary(
            comparison=comparison.name,
            prompt=comparison.prompt,
            name=name,
            kind=kind_of(name),
            share=share,
            num_rows=len(pairs),
            effect=found.effect,
            interval=found.interval,
            solution_effect=statistics.fmean(b.nll_solution - a.nll_solution for a, b in pairs),
            log_odds_change=statistics.fmean(odds) if odds else None,
            kl=found.kl,
            kl_prompt=means["prompt"],
            kl_solution=means["solution"],
            kl_answer=means["answer"],
            entropy_change=statistics.fmean(b.entropy - a.entropy for a, b in pairs),
            leakage=max((one.leakage for one in after if one.leakage is not None), default=0.0),
        )


def kind_of(name: str) -> str:
    """Of a subspace's name: spd, random, equal_energy, control or candidate."""
    family = name.rpartition("_")[0]
    return CONTROLS[name].kind if name in CONTROLS else family or name


def _summaries(
    measurement: Measurement, compared: Sequence[Compared], pairs: Mapping[str, Pair], doses: Sequence[Variant]
) -> Iterator[VariantSummary]:
    for one in compared:
        summing = _Summing(measurement, one.batches)
        for name, variant in {SPD: one.lineup.own, **one.lineup.random, **one.lineup.others}.items():
            yield summing.summary(one.comparison, name, variant, 1.0)
    primary = compared[0]
    summing = _Summing(measurement, primary.batches)
    blends = {variant.key: variant for variant in doses}
    blends |= {each.key: each for pair in pairs.values() if pair.share != 1 for each in (pair.own, pair.other)}
    for variant in blends.values():
        name, _, share = variant.name.partition("~")
        if share:
            yield summing.summary(primary.comparison, name, variant, float(share))


def _explored(measurement: Measurement, compared: Sequence[Compared]) -> list[ExploredComparison]:
    effects = []
    for one in compared:
        summing = _Summing(measurement, one.batches)
        random = [summing.effect(name, variant) for name, variant in one.lineup.random.items()]
        effects.append((summing.effect(SPD, one.lineup.own), random))
    corrected = max_statistic_p_values([[own.effect, *(one.effect for one in random)] for own, random in effects])
    return [
        ExploredComparison(
            name=one.comparison.name,
            prompt=one.comparison.prompt,
            num_rows=len(measurement.values_of(one.lineup.own, one.batches)),
            num_random=len(random),
            effect=own.effect,
            interval=own.interval,
            kl=own.kl,
            mean_random_effect=statistics.fmean(each.effect for each in random),
            mean_random_kl=statistics.fmean(each.kl for each in random),
            p_value=rank_p_value(own.effect, [each.effect for each in random]),
            p_corrected=p_value,
        )
        for one, (own, random), p_value in zip(compared, effects, corrected, strict=True)
    ]


def _lines(measurement: Measurement, wanted: Sequence[Variant]) -> Iterator[dict[str, Any]]:
    """Every row under every variant, in an order that no rank and no kill changes: not what was tried on a few rows."""
    for key in sorted({each.key for one in wanted for each in (one, base(one.prompt))}):
        prompt, _, variant = key.partition("|")
        name, _, share = variant.partition("~")
        found = measurement.values[key]
        for row_id in sorted(found):
            share_of = 0.0 if name == "base" else float(share or 1)
            line = {"prompt": prompt, "variant": name, "share": share_of, "id": row_id}
            yield line | dataclasses.asdict(found[row_id])
