"""The rounds of a run side by side, inside its report: what each arm reached, and how far the subspace moved."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from spd_dist.analysis.comparison import amount, comparisons
from spd_dist.analysis.report import ArmInRound, Report, RoundResult, read_report
from spd_dist.reports.page import Questions, write_page
from spd_dist.storage.answers import answers_path, read_answers
from spd_dist.storage.records import read_record, write_record
from spd_dist.storage.subspace_file import SiteDrift, SubspaceSummary
from spd_dist.tracking.console import TextConsole


def add_rounds(folders: Sequence[Path], questions: Questions) -> Report:
    """Put all rounds into the report of the first, as data and as a page; give that report. On one rank only.

    `folders` are those of the rounds in their order, each with its own report.

    Raises:
        DataError: a report or an answer is missing.
    """
    reports = [read_report(folder) for folder in folders]
    first = reports[0]
    start = next(iter(first.arms))
    answers = {start: read_answers(answers_path(folders[0] / "evaluate", start, first.task))}
    for number, folder in enumerate(folders, 1):
        answers[f"round {number}"] = read_answers(answers_path(folder / "evaluate", "spd", first.task))
    report = dataclasses.replace(
        first,
        rounds=[_described(number, *pair) for number, pair in enumerate(zip(folders, reports, strict=True), 1)],
        cost={
            (folder.relative_to(folders[0]) / stage).as_posix(): entry
            for folder, each in zip(folders, reports, strict=True)
            for stage, entry in each.cost.items()
        },
        progress=comparisons(answers, first.metric, first.seed),
    )
    write_record(folders[0] / "report.json", report)
    write_page(folders[0], report, questions)
    return report


def _described(number: int, folder: Path, report: Report) -> RoundResult:
    file = folder / "project" / "summary.json"
    project = read_record(file, SubspaceSummary) if file.exists() else None  # no arm may have one
    return RoundResult(
        round=number,
        folder=str(folder),
        verdict=report.verdict,
        arms={arm: ArmInRound(each.value, each.interval) for arm, each in report.arms.items()},
        energy_fraction={} if project is None else {name: one.energy_fraction for name, one in project.sites.items()},
        drift={} if project is None else project.drift,
    )


def rounds_text(report: Report, *, width: int = 100) -> str:
    """The rounds as tables for a terminal."""
    console = TextConsole(width)
    console.print(f"{report.task}: {len(report.rounds or [])} rounds, each on the student of the one before")
    console.print(_arms_table(report))
    for one in report.progress or []:
        low, high = (amount(bound, report.metric).split()[0] for bound in one.interval)
        difference = amount(one.difference, report.metric)
        console.print(f"spd of {one.after} - {one.before}: {difference} (95 % interval {low} to {high})")
    for one in report.rounds or []:
        for before, sites in one.drift.items():
            console.print(f"Subspace of round {one.round} against round {before}: {moved(sites)}")
    return console.text()


def moved(sites: Mapping[str, SiteDrift]) -> str:
    """How far all sites moved, in a clause."""
    angle = statistics.fmean(site.mean_angle_degrees for site in sites.values())
    held = statistics.fmean(site.energy_fraction_held for site in sites.values())
    own = statistics.fmean(site.energy_fraction for site in sites.values())
    return f"mean principal angle {angle:.1f} degrees; it holds {held:.1%} of the new energy, the new one {own:.1%}"


def _arms_table(report: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("arm", no_wrap=True)
    for one in report.rounds or []:
        table.add_column(f"round {one.round}", justify="right", no_wrap=True)
    for arm in report.arms:
        values = [one.arms[arm].value for one in report.rounds or []]
        table.add_row(arm, *(amount(value, report.metric, signed=False).split()[0] for value in values))
    return table
