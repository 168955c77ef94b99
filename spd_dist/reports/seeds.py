"""The same experiment under several seeds: arms and differences with the chance in training beside that of examples."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from spd_dist.analysis.answer_summary import (
    Measured,
    answers_summary,
    manner,
    measures_by_id,
    values_by_id,
)
from spd_dist.analysis.comparison import (
    amount,
    arm_pairs,
    clause,
    corrected,
    shifts_of,
    wanted_of,
)
from spd_dist.analysis.intervals import between_seeds
from spd_dist.analysis.notes import blind_notes, judge_notes, notes, overlap_notes, shown_notes, size_notes
from spd_dist.analysis.random_effects import Crossed, crossed, crossed_share
from spd_dist.analysis.report import (
    ArmOverSeeds,
    Report,
    SeedsDifference,
    SeedSpread,
    SeedsReport,
    Shifts,
    read_report,
)
from spd_dist.analysis.side_comparisons import (
    OtherTask,
    corrected_tasks,
    decode_controls_over_seeds,
    forgetting_notes,
)
from spd_dist.errors import DataError
from spd_dist.reports.report_text import pass_table
from spd_dist.storage.answers import answers_path, read_answers
from spd_dist.tracking.console import TextConsole
from spd_dist.types import Answer, record_of

DIAGNOSTICS = (
    "strict_accuracy", "lenient_accuracy", "ended_fraction", "strict_extraction_fraction",
    "lenient_extraction_fraction", "repetition_fraction", "mean_tokens",
)  # fmt: skip
DENOMINATOR = ("task", "metric", "examples", "temperature")
"""What runs must have in common."""
OF_ANSWERS = ("num_correct", "num_examples", "num_samples", "num_tokens")
"""What a report and its answers have in common, beside the value."""
Answers = Mapping[str, Sequence[Answer]]
"""One seed's, by arm."""
Measures = Mapping[str, Mapping[str, Mapping[str, float]]]
"""One seed's, by arm, what is measured, and example."""


def over_seeds(run_folders: Sequence[Path]) -> SeedsReport:
    """Each arm's metric and each paired difference over the runs, for other seeds and other examples.

    Args:
        run_folders: Finished runs of one config and different seeds, at least two.

    Raises:
        DataError: a report is missing, or the runs differ in task, examples or arms: their numbers have no common
            denominator.
    """
    reports = [read_report(folder) for folder in run_folders]
    if len(reports) < 2:
        raise DataError(f"a spread between seeds needs at least 2 runs, not {len(reports)}; run more seeds")
    for folder, report in zip(run_folders, reports, strict=True):
        _refuse_another_denominator(run_folders[0], reports[0], folder, report)
    first = reports[0]
    by_seed = [answers_of(folder, report) for folder, report in zip(run_folders, reports, strict=True)]
    num_examples = next(iter(first.arms.values())).num_examples
    measures = [_measures(answers, first.metric) for answers in by_seed]
    arms = {arm: _arm(arm, by_seed, measures, reports) for arm in first.arms}
    found = _comparisons(by_seed, measures, first.metric)
    controls = decode_controls_over_seeds(by_seed, first.metric, [report.seed for report in reports])
    tasks = {one.task: one.metric for one in first.other_tasks}
    others = corrected_tasks(
        [one for task in tasks for one in _of_other_task(run_folders, list(first.arms), task, tasks[task])]
    )
    verdict = seeds_verdict(found, first.metric, len(reports), num_examples)
    return SeedsReport(
        task=first.task,
        metric=first.metric,
        examples=first.examples,
        temperature=first.temperature,
        num_samples=first.num_samples,
        num_examples=num_examples,
        seeds=[report.seed for report in reports],
        verdict=" ".join([*(one.sentence for one in controls), verdict]),
        decode_controls=controls,
        notes=[
            *shown_notes(found, first.metric),
            *notes(arms),
            *forgetting_notes(others),
            *blind_notes(found),
            *size_notes(num_examples, first.test_size),
            *judge_notes({arm: [one for answers in by_seed for one in answers[arm]] for arm in first.arms}),
            *overlap_notes(first.overlaps),
        ],
        overlaps=first.overlaps,
        arms=arms,
        comparisons=found,
        other_tasks=others,
    )


def _of_other_task(run_folders: Sequence[Path], arms: Sequence[str], task: str, metric: str) -> list[OtherTask]:
    """What each arm kept of a task of another domain, over seeds and examples."""
    found = []
    for arm in arms:
        files = [[answers_path(folder / "evaluate", one, task) for one in (arms[0], arm)] for folder in run_folders]
        first, values = zip(
            *([values_by_id(read_answers(file), metric) for file in pair] for pair in files), strict=True
        )
        spread = crossed(values) if metric == "nll" else crossed_share(values)
        own = OtherTask(task, arm, metric, spread.mean, list(spread.interval), len(values[0]), None, None)
        if arm != arms[0]:
            apart = crossed([_apart(*pair) for pair in zip(first, values, strict=True)])
            bounds = list(apart.interval)
            own = dataclasses.replace(own, difference=apart.mean, difference_interval=bounds, p_value=apart.p_value)
        found.append(own)
    return found


def _apart(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    return {key: after[key] - before[key] for key in before}


def _measures(answers: Answers, metric: str) -> Measures:
    return {arm: {} if metric == "nll" else measures_by_id(rows) for arm, rows in answers.items()}


def _measured(by_seed: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Measured]:
    """The mean over seeds and examples of what was measured under every seed, with its interval."""
    found = {}
    for name in [name for name in by_seed[0] if all(name in one for one in by_seed)]:
        spread = crossed([one[name] for one in by_seed])
        found[name] = Measured(spread.mean, list(spread.interval))
    return found


def answers_of(run_folder: Path, report: Report) -> Answers:
    """What every arm of a run answered.

    Raises:
        DataError: answers are missing, or are others than the report is of.
    """
    folder = run_folder / "evaluate"
    answers = {arm: read_answers(answers_path(folder, arm, report.task)) for arm in report.arms}
    for arm, rows in answers.items():
        own, told = answers_summary(rows, report.metric), report.arms[arm]
        is_same = all(vars(own)[name] == vars(told)[name] for name in OF_ANSWERS)
        if not (is_same and math.isclose(own.value, told.value, rel_tol=1e-9)):  # means may round otherwise elsewhere
            raise DataError(
                f"{run_folder / 'report.json'} is of other answers of {arm} than there are now; start the run's "
                "command again, which writes it anew"
            )
    return answers


def _arm(arm: str, by_seed: Sequence[Answers], measures: Sequence[Measures], reports: Sequence[Report]) -> ArmOverSeeds:
    """One arm's metric, and the means of its diagnostics."""
    each = [report.arms[arm] for report in reports]
    metric = reports[0].metric
    values = [values_by_id(answers[arm], metric) for answers in by_seed]
    spread = _spread(values, crossed(values) if metric == "nll" else crossed_share(values))
    more = {
        **{name: statistics.fmean(vars(one)[name] for one in each) for name in DIAGNOSTICS},
        "pass_at_k": {k: statistics.fmean(one.pass_at_k[k] for one in each) for k in each[0].pass_at_k},
        "reasons": dict(sum((Counter(one.reasons) for one in each), Counter()).most_common()),
        "samples": _measured([one[arm] for one in measures]),
    }
    return record_of(ArmOverSeeds, {**vars(spread), "sentence": each[0].sentence, **more})


def _comparisons(by_seed: Sequence[Answers], measures: Sequence[Measures], metric: str) -> list[SeedsDifference]:
    """Paired differences, and the means of their diagnostics."""
    found = []
    for before, after in arm_pairs(list(by_seed[0])):
        pairs = [(values_by_id(each[before], metric), values_by_id(each[after], metric)) for each in by_seed]
        differences = [_apart(*pair) for pair in pairs]
        spread = _spread(differences, crossed(differences))
        shifts = _mean_shifts([shifts_of(each[before], each[after], metric) for each in by_seed])
        one = {**vars(shifts), "before": before, "after": after, "difference": spread.mean, **vars(spread)}
        apart = [
            {name: _apart(values, each[after][name]) for name, values in each[before].items() if name in each[after]}
            for each in measures
        ]
        found.append(record_of(SeedsDifference, {**one, "samples": _measured(apart)}))
    return corrected(found)


def _mean_shifts(each: Sequence[Shifts]) -> Shifts:
    def mean(name: str) -> float | None:
        values = [vars(one)[name] for one in each]
        return None if None in values else statistics.fmean(values)

    return record_of(Shifts, {item.name: mean(item.name) for item in dataclasses.fields(Shifts)})


def _spread(by_seed: Sequence[Mapping[str, float]], both: Crossed) -> SeedSpread:
    """The mean over seeds and examples with its interval, and each seed's own mean with their spread."""
    values = [statistics.fmean(one.values()) for one in by_seed]
    seeds = between_seeds(values)
    return SeedSpread(
        mean=both.mean,
        interval=list(both.interval),
        p_value=both.p_value,
        detectable_difference=both.detectable,
        values=values,
        standard_deviation=seeds.standard_deviation,
        seed_interval=list(seeds.interval),
    )


def seeds_verdict(found: Sequence[SeedsDifference], metric: str, num_seeds: int, num_examples: int) -> str:
    """A sentence on each arm of the method against the first and plain self-retraining: no more than is shown."""
    if not found:
        return "One arm alone: there is nothing to compare."
    spoken = [
        f"{arm.upper()}, over {num_seeds} seeds and {num_examples} examples, "
        + "; ".join(clause(one, metric, len(found), basis="examples and seeds", means="experiment") for one in wanted)
        for arm, wanted in wanted_of(found).items()
    ]
    return ". ".join(spoken) + "."


def seeds_text(result: SeedsReport, *, width: int = 100) -> str:
    """Arms, differences, verdict and notes for a terminal; `sd` is the standard deviation between seeds."""
    console = TextConsole(width)
    metric, seeds = result.metric, result.seeds
    title = f"{result.task}: {len(seeds)} seeds ({', '.join(map(str, seeds))}), n {result.num_examples} each"
    if result.temperature > 0:
        title += f", {manner(result.temperature, result.num_samples)}"
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for name in ("", "mean", "95 % interval", "p Holm", "sd", "each seed"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    others: dict[str, dict[str, OtherTask]] = {one.task: {} for one in result.other_tasks}
    for one in result.other_tasks:
        others[one.task][one.arm] = one
    for task in others:
        table.add_column(task, justify="right", no_wrap=True)
    for arm, spread in result.arms.items():
        kept = [amount(by_arm[arm].value, by_arm[arm].metric, signed=False) for by_arm in others.values()]
        table.add_row(arm, *_cells(spread, metric, signed=False), *(cell.split()[0] for cell in kept))
    for one in result.comparisons:
        lost = [None if one.before != next(iter(by_arm)) else by_arm[one.after] for by_arm in others.values()]
        apart = [None if of is None or of.difference is None else amount(of.difference, of.metric) for of in lost]
        cells = ["" if said is None else said.split()[0] for said in apart]
        table.add_row(f"{one.after} - {one.before}", *_cells(one, metric, signed=True), *cells)
    console.print(title)  # not the table's own, which would be wrapped at the width of the table
    console.print(table)
    if result.num_samples > 1:
        console.print(pass_table(result.arms))
    console.print(result.verdict)
    for note in result.notes:
        console.print(f"Note: {note}")
    return console.text()


def _cells(spread: ArmOverSeeds | SeedsDifference, metric: str, *, signed: bool) -> list[str]:
    def number(value: float, *, signed: bool = signed) -> str:
        return amount(value, metric, signed=signed).split()[0]

    p_holm = f"{spread.p_holm:.3f}" if isinstance(spread, SeedsDifference) else ""
    deviation = number(spread.standard_deviation, signed=False)
    each = " ".join(number(value) for value in spread.values)
    return [number(spread.mean), " to ".join(map(number, spread.interval)), p_holm, deviation, each]


def _refuse_another_denominator(first_folder: Path, first: Report, folder: Path, report: Report) -> None:
    for name in DENOMINATOR:
        own, expected = vars(report)[name], vars(first)[name]
        if own != expected:
            raise DataError(
                f"{folder} and {first_folder} cannot be put together: their {name} differ ({own!r}, "
                f"{expected!r}); evaluate both on the same test set"
            )
    if list(report.arms) != list(first.arms):
        raise DataError(f"{folder} and {first_folder} cannot be put together: their arms differ; run the same arms")
