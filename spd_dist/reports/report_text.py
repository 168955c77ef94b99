"""The comparison of arms as a person reads it in a terminal."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from rich import box
from rich.table import Table

from spd_dist.analysis.answer_summary import AnswersSummary, manner
from spd_dist.analysis.comparison import amount, meaning
from spd_dist.analysis.report import ArmOverSeeds, ArmResult, Report, RunDifference
from spd_dist.config import STAGES
from spd_dist.tracking.console import TextConsole

LONG_NAME = 24
"""An arm's name of so many characters is folded, so that the numbers beside it are not cut."""


def report_text(report: Report, run_folder: str | Path, *, width: int = 100) -> str:
    """The report as a person reads it in a terminal: table, verdict, notes, seconds, where the page is.

    In the table, `ended` are the answers that the arm ended by itself, `strict` and `lenient` those that a result could
    be extracted from, and `loops` those that repeat themselves.
    """
    console = TextConsole(width)
    console.print(arms_table(report))
    if report.num_samples > 1:
        console.print(pass_table(report.arms))
    console.print(report.verdict)
    console.print(meaning(report.comparisons, report.metric))
    for note in report.notes:
        console.print(f"Note: {note}")
    smallest = {
        f"{one.after} - {one.before}": amount(one.detectable_difference, report.metric, signed=False)
        for one in report.comparisons
        if one.detectable_difference is not None
    }
    if smallest:
        unit = "nats a token" if report.metric == "nll" else "points"
        named = [f"{pair} {value.split()[0]}" for pair, value in smallest.items()]
        alone = ", each alone, before the correction" if len(report.comparisons) > 1 else ""
        console.print(f"Smallest difference found in 4 runs of 5{alone}, in {unit}: {', '.join(named)}")
    seconds = {}
    for stage, entry in report.cost.items():
        verb = next((part for part in stage.split("/")[::-1] if part in STAGES), stage)
        seconds[verb] = seconds.get(verb, 0.0) + entry.seconds
    parts = ", ".join(f"{verb} {each:.0f} s" for verb, each in seconds.items())
    console.print(f"Time: {sum(seconds.values()):.0f} s ({parts})" if parts else "Time: not recorded")
    console.print(f"Report: {Path(run_folder) / 'report.html'}", soft_wrap=True)
    return console.text()


def next_steps(run_folder: str | Path) -> str:
    """What one may want to do with a finished run, as commands to be copied; the last lines of a run."""
    folder = shlex.quote(str(run_folder))
    commands = [
        f"python launchers/corpus.py show {folder} --num 3",
        f"python launchers/spd.py --config {folder}/config.yaml --preview-masks 3",
        "deepspeed launchers/experiment.py --config configs/experiments/arithmetic_smollm2.yaml",
    ]
    activate = f"source {shlex.quote(os.path.relpath(sys.prefix))}/bin/activate"
    return "\n  ".join([f"Next, after `{activate}`:", *commands])


def arms_table(report: Report) -> Table:
    """One row an arm."""
    first = next(iter(report.arms))
    from_first = {one.after: one for one in report.comparisons if one.before == first}
    unit = "nll" if report.metric == "nll" else "right\n%"
    asked = manner(report.temperature, report.num_samples)
    title = f"{report.task}: {len(report.arms)} arms, {asked}, seed {report.seed}"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", collapse_padding=True, pad_edge=False)
    table.add_column("arm", overflow="fold", no_wrap=all(len(arm) < LONG_NAME for arm in report.arms))
    for name in (unit, "95 %\ninterval", "n", f"minus\n{first}", "95 %\npaired"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("ended\n%", "strict\n%", "lenient\n%", "mean\ntokens", "loops\n%"):
        table.add_column(name, justify="right", no_wrap=True)
    for arm, summary in report.arms.items():
        table.add_row(arm, *_cells(summary, from_first.get(arm), report.metric))
    return table


def pass_table(summaries: Mapping[str, AnswersSummary | ArmOverSeeds]) -> Table:
    """The chance that one of k samples is right, in percent: one row an arm or task, those that have it."""
    found = {name: summary.pass_at_k for name, summary in summaries.items() if summary.pass_at_k}
    table = Table(title="pass@k, %", box=box.SIMPLE_HEAD, title_justify="left", collapse_padding=True, pad_edge=False)
    table.add_column("")
    for size in next(iter(found.values()), {}):
        table.add_column(f"k {size}", justify="right")
    for name, shares in found.items():
        table.add_row(name, *(f"{100 * share:.1f}" for share in shares.values()))
    return table


def _cells(summary: ArmResult, compared: RunDifference | None, metric: str) -> list[str]:
    def number(value: float) -> str:
        return f"{value:.3f}" if metric == "nll" else f"{100 * value:.1f}"

    low, high = summary.interval
    strict, lenient = summary.strict_extraction_fraction, summary.lenient_extraction_fraction
    difference, bounds = "", ""
    if compared is not None:
        difference, *both = (amount(value, metric).split()[0] for value in (compared.difference, *compared.interval))
        bounds = " to ".join(both)
    return [
        number(summary.value),
        f"{number(low)} to {number(high)}",
        str(summary.num_examples),
        difference,
        bounds,
        f"{100 * summary.ended_fraction:.0f}",
        f"{100 * strict:.0f}",
        f"{100 * lenient:.0f}",
        f"{summary.mean_tokens:.0f}",
        f"{100 * summary.repetition_fraction:.0f}",
    ]
