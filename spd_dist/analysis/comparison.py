"""Arms against each other, example by example, and what may be said of it in a sentence."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeVar

from spd_dist.analysis.answer_summary import paired_measures, samples_of, values_by_id
from spd_dist.analysis.intervals import SIGNIFICANCE, detectable_difference, holm, mcnemar, paired_bootstrap, paired_t
from spd_dist.analysis.report import Difference, RunDifference, Shifts
from spd_dist.errors import DataError
from spd_dist.types import Answer

DECODING = "@evaluate."
"""In the name of an arm that another one answers in another way: a control, of which no verdict speaks."""
METHODS = ("spd", "filtered")
"""Kinds of arms that are the method's."""
SAMPLES = "generate.num_samples="

Compared = TypeVar("Compared", bound=Difference)


def comparisons(answers: Mapping[str, Sequence[Answer]], metric: str, seed: int) -> list[RunDifference]:
    """Paired differences of every arm from the first, and of the method's arms from their controls: `arm_pairs`.

    Raises:
        DataError: two arms did not answer the same examples, or not as often.
    """
    counts = {arm: samples_of(rows) for arm, rows in answers.items()}
    if len(set(counts.values())) > 1:
        raise DataError(
            f"arms with different numbers of answers an example cannot be compared ({counts}); evaluate all with one "
            "evaluate.num_samples"
        )
    found = [paired(before, after, answers, metric, seed) for before, after in arm_pairs(list(answers))]
    return corrected(found)


def corrected(found: Sequence[Compared]) -> list[Compared]:
    """The comparisons, each with its p value adjusted for all of them (Holm)."""
    adjusted = holm({f"{one.before} {one.after}": one.p_value for one in found})
    return [dataclasses.replace(one, p_holm=adjusted[f"{one.before} {one.after}"]) for one in found]


def arm_pairs(arms: Sequence[str]) -> list[tuple[str, str]]:
    """The family of comparisons: every arm after the first, each arm of the method after its controls, and variants.

    An arm of the method is `spd`, `filtered`, or a variant: `spd@rank=16`, or one with a name, `spd_distil`. Its
    controls are, of each kind of the other arms, those with the same changes (`random@rank=16`, `random_distil`), or
    else the plain ones (`psr`). How a control projects is its own (`random@rho=0.4`). What is filtered is held against
    all that was sampled, and a control's variant that no arm of the method has in common against the plain control; one
    that begins in the subspace (`psr@finetune.lora_init=spd`) against the same that begins in a random one, too.
    """
    first, *others = arms
    methods = [arm for arm in others if is_method(arm)]
    controls = [arm for arm in others if _kind(arm) not in METHODS and DECODING not in arm]
    family, after_controls = [(first, arm) for arm in others], list[tuple[str, str]]()
    for method in methods:
        after_controls += [(control, method) for control in [*_controls(method, controls), *_sampled(method, methods)]]
    used = {control for control, _ in after_controls}
    plain = {_kind(arm): arm for arm in reversed(controls) if not _changes(arm)}
    variants = [(plain[_kind(arm)], arm) for arm in controls if arm not in used and _kind(arm) in plain]
    drawn = [(one, arm) for one in controls for arm in controls if _kind(one) == _kind(arm) and _is_drawn(one, arm)]
    return family + after_controls + [(before, after) for before, after in variants + drawn if before != after]


def is_method(arm: str) -> bool:
    """Whether an arm is the method, or a variant of it that is not of decoding alone."""
    return _kind(arm) in METHODS and DECODING not in arm


def _controls(method: str, controls: Sequence[str]) -> list[str]:
    wanted = _changes(method)
    changes = {arm: frozenset(one for one in _changes(arm) if one in wanted or not _is_own(one)) for arm in controls}
    same = {_kind(arm) for arm, each in changes.items() if each == wanted}
    return [arm for arm, each in changes.items() if each == (wanted if _kind(arm) in same else frozenset())]


def _sampled(method: str, methods: Sequence[str]) -> list[str]:
    """What was sampled as `filtered` was, and not filtered; the plain method for want of it."""
    if _kind(method) != "filtered":
        return []
    asked = [one for one in _changes(method) if one.startswith(SAMPLES)]
    unfiltered = [arm for arm in methods if _kind(arm) == "spd"]
    alike = [
        arm
        for arm in unfiltered
        if any(one in asked if asked else one.startswith(SAMPLES) for one in _changes(arm)) and len(_changes(arm)) == 1
    ]
    return alike or [arm for arm in unfiltered if not _changes(arm)]


def _is_drawn(one: str, arm: str) -> bool:
    """Whether `one` is `arm` with a random subspace in the place of the gradients'."""
    own, drawn = ({change.removeprefix("project.") for change in _changes(name)} for name in (arm, one))
    return own < drawn == own | {"mode=random"}


def _is_own(change: str) -> bool:
    """Whether it says how a control projects."""
    return change.partition("=")[0].removeprefix("project.") in ("mode", "rho", "match_kl")


def _kind(arm: str) -> str:
    return arm.partition("@")[0].partition("_")[0]


def _changes(arm: str) -> frozenset[str]:
    """What parts it from its kind: settings, and what its name says behind an underscore."""
    name, *settings = arm.split("@")
    _, has_name, named = name.partition("_")
    return frozenset([*settings, *([named] if has_name else [])])


def paired(before: str, after: str, answers: Mapping[str, Sequence[Answer]], metric: str, seed: int) -> RunDifference:
    """The paired difference of two arms, by the names of their answers; `p_holm` is of itself alone.

    Raises:
        DataError: they did not answer the same examples.
    """
    values = values_by_id(answers[before], metric), values_by_id(answers[after], metric)
    outcome = paired_bootstrap(*values, seed)
    if metric == "nll" or samples_of(answers[before]) > 1:
        found = paired_t(*values)
        test, p_value, detectable = "paired t", found.p_value, found.detectable
    else:
        exact = mcnemar(*values)
        discordant = (exact.num_gained + exact.num_lost) / outcome.num_examples
        smallest = detectable_difference(outcome.num_examples, discordant) if discordant else 1.0
        test, p_value, detectable = "exact McNemar", exact.p_value, smallest if smallest < 1 else None
    shifts = shifts_of(answers[before], answers[after], metric)
    return RunDifference(
        identical_fraction=shifts.identical_fraction,
        num_gained=shifts.num_gained,
        num_lost=shifts.num_lost,
        num_gained_by_ending=shifts.num_gained_by_ending,
        num_gained_by_form=shifts.num_gained_by_form,
        before=before,
        after=after,
        difference=outcome.difference,
        interval=list(outcome.interval),
        p_value=p_value,
        detectable_difference=detectable,
        num_examples=outcome.num_examples,
        samples={} if metric == "nll" else paired_measures(answers[before], answers[after], seed),
        test=test,
    )


def shifts_of(before: Sequence[Answer], after: Sequence[Answer], metric: str) -> Shifts:
    """How two arms differ beside the metric: the share of same outputs, and examples gained and lost.

    Gained and lost is only what is right or wrong: one answer an example. A gain may be of ending or of form.
    """
    identical = identical_fraction(before, after)
    if metric == "nll" or samples_of(before) > 1:
        return Shifts(identical, None, None, None, None)
    others = {answer.id: answer for answer in before}
    pairs = [(others[answer.id], answer) for answer in after]
    gained = [(a, b) for a, b in pairs if b.correct and not a.correct]
    return Shifts(
        identical_fraction=identical,
        num_gained=len(gained),
        num_lost=sum(a.correct and not b.correct for a, b in pairs),
        num_gained_by_ending=sum(a.finish_reason == "length" and b.finish_reason == "stop" for a, b in gained),
        num_gained_by_form=sum(a.lenient_correct for a, _ in gained),
    )


def identical_fraction(before: Sequence[Answer], after: Sequence[Answer]) -> float:
    """The share of examples, or samples, to which two arms gave the same output, letter by letter."""
    outputs = {(answer.id, answer.sample): answer.output for answer in before}
    return sum(outputs.get((answer.id, answer.sample)) == answer.output for answer in after) / len(after)


def verdict(found: Sequence[RunDifference], metric: str) -> str:
    """A sentence on each arm of the method against the first and plain self-retraining: no more than is shown."""
    if not found:
        return "One arm alone: there is nothing to compare."
    basis = "examples, of one training seed"
    spoken = [
        f"{arm.upper()} "
        + "; ".join(clause(one, metric, len(found), size=f", n {one.num_examples}", basis=basis) for one in wanted)
        for arm, wanted in wanted_of(found).items()
    ]
    return ". ".join(spoken) + "."


def meaning(found: Sequence[RunDifference], metric: str) -> str:
    """One sentence, in plain words, of what `spd` shows against the first arm; the method's last arm without it."""
    spoken = [one for wanted in wanted_of(found).values() for one in wanted[:1]] if found else []
    if not spoken:
        return "In short: the arm's answers are in the table; there is no other arm to hold them against."
    one = next((each for each in spoken if each.after == "spd"), spoken[-1])
    after, before, num = one.after.upper(), one.before.upper(), one.num_examples
    if not is_shown(one):
        return f"In short: on {num} examples this run cannot tell {after} from {before}; more examples and seeds could."
    word = "better" if (one.difference > 0) != (metric == "nll") else "worse"
    return f"In short: {after} answers {word} than {before} on these {num} examples; other seeds may say otherwise."


def wanted_of(found: Sequence[Compared]) -> dict[str, list[Compared]]:
    """The arms that a verdict is about, each with its comparisons with the first arm and with plain self-retraining.

    They are the method's arms; the last arm where there is none.
    """
    first, afters = found[0].before, list(dict.fromkeys(one.after for one in found))

    def is_wanted(one: Difference) -> bool:
        return one.before == first or _kind(one.before) == "psr"

    spoken = [arm for arm in afters if is_method(arm)] or afters[-1:]
    return {arm: [one for one in found if one.after == arm and is_wanted(one)] for arm in spoken}


def is_shown(one: Difference) -> bool:
    """Whether two arms differ beyond chance, with all comparisons counted."""
    low, high = one.interval
    return not low <= 0 <= high and one.p_holm < SIGNIFICANCE


def clause(
    one: Difference, metric: str, num_comparisons: int, *, basis: str, size: str = "", means: str = "test"
) -> str:
    """What a comparison shows of its second arm: `basis` is what it is beyond chance over, by these `means`."""
    low, high = one.interval
    bounds = f"95 % interval {amount(low, metric).split()[0]} to {amount(high, metric).split()[0]}{size}"
    against = f"against {one.before.upper()}{_otherwise(one)}: {amount(one.difference, metric)} ({bounds})"
    if low <= 0 <= high:
        smallest = one.detectable_difference
        alone = ", before the correction" if num_comparisons > 1 else ""
        found = "" if smallest is None else amount(smallest, metric, signed=False)
        needs = f"; this {means} would find about {found}{alone}" if found else ""
        return f"{against}, so no difference is shown{needs}"
    if one.p_holm >= SIGNIFICANCE:
        return f"{against}, which does not survive the correction for {num_comparisons} comparisons"
    is_better = (low > 0) != (metric == "nll")
    return f"{against}, {'a gain' if is_better else 'a loss'} beyond chance over {basis}"


def _otherwise(one: Difference) -> str:
    """How the second arm was trained otherwise than a trained one that it is held against, in words."""
    more = sorted(_changes(one.after) - _changes(one.before))
    own = ", ".join(change for change in more if change.startswith(("generate.num_", "finetune.")))
    return f" (trained without {own})" if own and _kind(one.before) != "base" else ""


def amount(value: float, metric: str, *, signed: bool = True) -> str:
    """A difference in the metric's unit: percentage points, or nats a token."""
    sign = "+" if signed else ""
    if metric == "nll":
        return f"{value:{sign}.3f} nats"
    return f"{100 * value:{sign}.1f} points"
