"""The decode-only control: is a gain more than what the untouched model has at a better temperature?

The temperature is chosen on one half of the examples and judged on the other, and the other way round, so that the
choice is paid for (nested folds).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from spd_dist.analysis.answer_summary import values_by_id
from spd_dist.analysis.intervals import paired_bootstrap, paired_t
from spd_dist.types import Answer

AT = "@evaluate.temperature="


@dataclass(frozen=True)
class DecodeControl:
    """A student against the untouched model at the temperature that suits it best."""

    after: str
    chosen: list[str]
    """The arm of the untouched model that was best on each half, for the other."""
    difference: float
    interval: list[float]
    p_value: float
    num_examples: int
    sentence: str


def decode_controls(answers: Mapping[str, Sequence[Answer]], metric: str, seed: int) -> list[DecodeControl]:
    """One for every student, and for every student at its own best temperature; none if base was not swept."""
    families: dict[str, list[str]] = {}
    for arm in answers:
        families.setdefault(arm.partition(AT)[0], []).append(arm)
    if len(families.get("base", ())) < 2:
        return []
    values = {arm: values_by_id(given, metric) for arm, given in answers.items()}
    chosen, best = _best(families.pop("base"), values, metric, seed)
    found = []
    for student, arms in families.items():
        found.append(_compared(student, chosen, best, values[student], metric, seed))
        if len(arms) > 1:
            own = _best(arms, values, metric, seed)[1]
            found.append(_compared(f"{student} at its best temperature", chosen, best, own, metric, seed))
    return found


def _best(
    arms: Sequence[str], values: Mapping[str, Mapping[str, float]], metric: str, seed: int
) -> tuple[list[str], dict[str, float]]:
    """The arm chosen for each half on the other one, and each example's value of the arm chosen for its half."""
    keys = sorted(values[arms[0]], key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest())
    halves = keys[::2], keys[1::2] or keys[::2]
    sign = -1 if metric == "nll" else 1
    chosen = [max(arms, key=lambda arm: sign * fmean(values[arm][key] for key in other)) for other in halves[::-1]]
    return chosen, {key: values[arm][key] for arm, half in zip(chosen, halves, strict=True) for key in half}


def _compared(
    after: str, chosen: list[str], before: Mapping[str, float], own: Mapping[str, float], metric: str, seed: int
) -> DecodeControl:
    outcome, p_value = paired_bootstrap(before, own, seed), paired_t(before, own).p_value
    low, high = outcome.interval
    scale, unit = (1, "nats") if metric == "nll" else (100, "points")
    is_shown = "no difference is shown" if low <= 0 <= high else "a difference beyond chance over examples"
    sentence = (
        f"{after.upper()} against BASE at its best temperature ({', '.join(dict.fromkeys(chosen))}, chosen on the "
        f"other half of the examples): {scale * outcome.difference:+.1f} {unit} "
        f"(95 % interval {scale * low:+.1f} to {scale * high:+.1f}, n {outcome.num_examples}): {is_shown}."
    )
    return DecodeControl(
        after, chosen, outcome.difference, list(outcome.interval), p_value, outcome.num_examples, sentence
    )
