"""What else there is to say of a comparison, a line each: what could explain a gain, and what a test could not find."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from spd_dist.analysis.answer_summary import AnswersSummary
from spd_dist.analysis.comparison import Compared, amount, is_shown, wanted_of
from spd_dist.analysis.report import ArmOverSeeds, Difference
from spd_dist.types import Answer, LeakReport

NOTEWORTHY = 0.1
"""A shift of a diagnostic by so much could explain a gain, and is put in words."""
DIAGNOSTICS = {
    "ended_fraction": ("Answers that end by themselves", " A gain may be of that."),
    "strict_extraction_fraction": ("Answers in the form that was asked for", " A gain may be of form."),
    "lenient_extraction_fraction": ("Answers that a result can be taken from", ""),
    "repetition_fraction": ("Answers that repeat themselves", ""),
}


def notes(summaries: Mapping[str, AnswersSummary | ArmOverSeeds]) -> list[str]:
    """What else changed between the first arm and others, that could be taken for a gain in skill: one line a kind."""
    first, *others = summaries
    found = []
    for name, (what, warning) in DIAGNOSTICS.items():
        share = {arm: vars(summary)[name] for arm, summary in summaries.items()}
        shifted = [arm for arm in others if abs(share[arm] - share[first]) >= NOTEWORTHY]
        if shifted:
            named = ", ".join(f"{arm.upper()} {share[arm]:.0%}" for arm in (first, *shifted))
            found.append(f"{what}: {named}.{warning}")
    return found


def never_right_notes(summaries: Mapping[str, AnswersSummary | ArmOverSeeds], metric: str) -> list[str]:
    """That no arm is right even once, in words: more often a fault of the task than of the model."""
    if metric == "nll" or any(summary.lenient_accuracy or summary.strict_accuracy for summary in summaries.values()):
        return []
    return [
        "No arm has a single right answer: the task may be too hard, or its extraction or gold may not be what answers "
        "look like; look at some in evaluate/, and at --preview-scoring."
    ]


def shown_notes(found: Sequence[Compared], metric: str) -> list[str]:
    """What is shown beside what the verdict speaks of, in words: differences of controls, as a rule."""
    spoken = [one for wanted in wanted_of(found).values() for one in wanted] if found else []
    others = [one for one in found if is_shown(one) and one not in spoken]
    told = [f"{one.after} - {one.before} {amount(one.difference, metric)} (Holm p {one.p_holm:.2g})" for one in others]
    return [f"Shown, too, after the correction: {', '.join(told)}."] if told else []


def blind_notes(found: Sequence[Difference]) -> list[str]:
    """Comparisons that could not have found any difference, in words."""
    named = [f"{one.after} - {one.before}" for one in found if one.detectable_difference is None]
    if not named:
        return []
    which = f"all {len(found)} comparisons" if len(named) == len(found) > 1 else ", ".join(named)
    return [f"Too few examples to find any difference in 4 runs of 5, since so few answers differ: {which}."]


def size_notes(num_examples: int, test_size: int | None) -> list[str]:
    """Whether all that was published was answered, in words: other numbers have another denominator."""
    if test_size is None or num_examples == test_size:
        return []
    return [f"{num_examples} examples; the published test split has {test_size}: not to be put beside numbers of it."]


def overlap_notes(overlaps: Sequence[LeakReport]) -> list[str]:
    """Test problems that stand in another split, in words: an arm may have seen them."""
    return [
        f"{one.num_exact} exact and {one.num_near} near copies of test problems are among the {one.num_rows} "
        f"{one.split} rows; data.leaks=remove drops them."
        for one in overlaps
        if one.other == "test" and one.num_exact + one.num_near > 0
    ]


def judges_of(answers: Mapping[str, Sequence[Answer]]) -> dict[str, list[str]]:
    """By the code that judged, the arms of which it judged answers."""
    found: dict[str, list[str]] = {}
    for arm, rows in answers.items():
        for judge in sorted({one.judged_by or "a version before it was written down" for one in rows}):
            found.setdefault(judge, []).append(arm)
    return found


def judge_notes(answers: Mapping[str, Sequence[Answer]]) -> list[str]:
    """Which arms' answers other code judged, in words."""
    judges = judges_of(answers)
    if len(judges) == 1:
        return []
    told = "; ".join(f"{judge} (answers of {', '.join(arms)})" for judge, arms in judges.items())
    return [f"Not all were judged by the same code: {told}. spd.py --restart-from evaluate, in each run, judges anew."]
