"""The comparison of arms: `report.json` with every number, and a table for the terminal."""

from __future__ import annotations

import dataclasses
import io
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from spd_dist.analysis.answer_summary import answers_summary, manner
from spd_dist.analysis.comparison import (
    amount,
    blind_notes,
    comparisons,
    meaning,
    notes,
    overlap_notes,
    size_notes,
    verdict,
)
from spd_dist.analysis.decode_control import decode_controls
from spd_dist.analysis.sample_measures import sample_measures
from spd_dist.analysis.subspace_algebra import angles
from spd_dist.config import STAGES
from spd_dist.storage.answers import answers_path, read_answers
from spd_dist.storage.artifacts import content_hash, read_json, write_json
from spd_dist.storage.manifests import MANIFEST, finished_stages
from spd_dist.tracking.metrics import MetricLogger, training_losses
from spd_dist.types import Answer

NUM_SAMPLES = 32
"""Answers of each arm in the table that W&B shows."""
LEFT_OUT = ("interval", "sentence", "metric", "pass_at_k", "reasons", "samples")
"""What that of the arms, a column a number, does not show."""


@dataclass(frozen=True)
class Asked:
    """What the arms of a run were asked."""

    task: str
    metric: str
    """The task's."""
    seed: int
    """The run's, for the bootstrap."""
    temperature: float = 0.0
    """That arms answered at."""
    test_size: int | None = None
    """Rows of the task's published test split, if there is one."""


def write_report(
    run_folder: Path,
    arms: Mapping[str, str],
    asked: Asked,
    overlaps: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Compare the arms of a finished evaluation, write `report.json`, and give what it holds. On one rank only.

    Args:
        run_folder: The run's.
        arms: Name and sentence of each, in their order; differences are taken from the first.
        asked: What they were asked.
        overlaps: Pairs of splits, with the counts of problems that stand in both, word for word and nearly.

    Raises:
        DataError: answers are missing, arms answered different examples, or a subspace is corrupt.
    """
    task, metric, seed = asked.task, asked.metric, asked.seed
    answers = {arm: read_answers(answers_path(run_folder / "evaluate", arm, task)) for arm in arms}
    summaries = {arm: dataclasses.asdict(answers_summary(answers[arm], metric)) for arm in arms}
    found, stages = comparisons(answers, metric, seed), _summaries(run_folder)
    controls = decode_controls(answers, metric, seed)
    report = {
        "task": task,
        "metric": metric,
        "seed": seed,
        "temperature": asked.temperature,
        "num_samples": next(iter(summaries.values()))["num_samples"],
        "examples": content_hash(sorted(answer.id for answer in next(iter(answers.values())))),
        "verdict": " ".join([*(one.sentence for one in controls), verdict(found, metric)]),
        "decode_controls": [dataclasses.asdict(one) for one in controls],
        "test_size": asked.test_size,
        "notes": [
            *notes(summaries),
            *blind_notes(found),
            *size_notes(next(iter(summaries.values()))["num_examples"], asked.test_size),
            *overlap_notes(overlaps),
        ],
        "overlaps": [dict(one) for one in overlaps],
        "arms": {
            arm: {"sentence": sentence, **summaries[arm], "samples": _measured(answers[arm], metric)}
            for arm, sentence in arms.items()
        },
        "comparisons": found,
        "cost": cost(run_folder, _tokens(stages, summaries)),
        "stages": stages,
        "losses": training_losses(run_folder),
        "angles": angles(run_folder, arms),
        "artifacts": _artifacts(run_folder),
    }
    write_json(run_folder / "report.json", report)
    return report


def _measured(answers: Sequence[Answer], metric: str) -> dict[str, dict[str, Any]]:
    found = {} if metric == "nll" else sample_measures(answers)
    return {name: dataclasses.asdict(one) for name, one in found.items()}


def cost(run_folder: Path, tokens: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Tokens, seconds, ranks, device hours and peak memory of every finished stage, by its folder.

    Of all its attempts; world size and peak memory are of the last. What was taken over from another arm or run took
    none. Later rounds are added with their reports (`add_rounds`).
    """
    found = {}
    folders = finished_stages(run_folder, rounds=[""])
    for folder in sorted(folders, key=lambda folder: (folder / MANIFEST).stat().st_mtime_ns):
        manifest, stage = read_json(folder / MANIFEST), folder.relative_to(run_folder).as_posix()
        if stage.endswith("evaluate"):
            continue  # the sum of what its arms did
        found[stage] = {
            "tokens": 0 if "taken_from" in manifest else tokens.get(stage),
            "seconds": manifest["seconds"],
            "world_size": manifest["world_size"],
            "device_hours": manifest["device_seconds"] / 3600,
            "peak_memory_gib": manifest.get("extra", {}).get("peak_memory_gib"),
            "finished_at": manifest["finished_at"],
        }
    return found


def _tokens(stages: Mapping[str, Mapping[str, Any]], arms: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """What each stage read, wrote or was trained on, as far as summaries say."""
    found = {f"evaluate/{arm}": summary["num_tokens"] for arm, summary in arms.items()}
    for stage, summary in stages.items():
        if stage.endswith("project") and "masks" in summary:
            found[stage] = summary["masks"]["num_tokens"]
        elif stage.endswith("generate"):
            found[stage] = summary["num_tokens"]
        elif stage.endswith("finetune"):
            found[stage] = summary["num_targets"] * len(summary["epochs"])
    return found


def log_report(metrics: MetricLogger, run_folder: Path, report: Mapping[str, Any]) -> None:
    """The arms as metrics, and as tables of the mirror: numbers, and answers side by side."""
    task, metric = report["task"], report["metric"]
    values = {f"{arm}_{metric}": summary["value"] for arm, summary in report["arms"].items()}
    values |= {f"{one['before']}_to_{one['after']}_difference": one["difference"] for one in report["comparisons"]}
    metrics.log("evaluate", values, next(iter(report["arms"].values()))["num_examples"])
    columns = [name for name in next(iter(report["arms"].values())) if name not in LEFT_OUT]
    rows = [[arm, *(summary[name] for name in columns)] for arm, summary in report["arms"].items()]
    metrics.table("evaluate", "arms", ["arm", *columns], rows)
    answers = [read_answers(answers_path(run_folder / "evaluate", arm, task)) for arm in report["arms"]]
    for arm, given in zip(report["arms"], answers, strict=True):
        metrics.histogram("evaluate", f"{arm}_length_tokens", [one.num_tokens for one in given])
    samples = [[row[0].id, row[0].gold, *(one.output for one in row)] for row in zip(*answers, strict=True)]
    metrics.table("evaluate", "answers", ["id", "gold", *report["arms"]], samples[:NUM_SAMPLES])


def report_text(report: Mapping[str, Any], run_folder: str | Path, *, width: int = 100) -> str:
    """The report as a person reads it in a terminal: table, verdict, notes, seconds, where everything is.

    In the table, `ended` are the answers that the arm ended by itself, `strict` and `lenient` those that a result could
    be extracted from, and `loops` those that repeat themselves.
    """
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    console.print(arms_table(report))
    if report["num_samples"] > 1:
        console.print(pass_table(report["arms"]))
    console.print(report["verdict"])
    console.print(meaning(report["comparisons"], report["metric"]))
    for note in report["notes"]:
        console.print(f"Note: {note}")
    smallest = {
        f"{one['after']} - {one['before']}": amount(one["detectable_difference"], report["metric"], signed=False)
        for one in report["comparisons"]
        if one["detectable_difference"] is not None
    }
    if smallest:
        unit = "nats a token" if report["metric"] == "nll" else "points"
        named = [f"{pair} {value.split()[0]}" for pair, value in smallest.items()]
        console.print(f"Smallest difference found in 4 runs of 5, in {unit}: {', '.join(named)}")
    seconds = {}
    for stage, entry in report["cost"].items():
        verb = next((part for part in stage.split("/")[::-1] if part in STAGES), stage)
        seconds[verb] = seconds.get(verb, 0.0) + entry["seconds"]
    parts = ", ".join(f"{verb} {each:.0f} s" for verb, each in seconds.items())
    console.print(f"Time: {sum(seconds.values()):.0f} s ({parts})" if parts else "Time: not recorded")
    console.print(f"Report: {Path(run_folder) / 'report.html'}", soft_wrap=True)
    console.print(f"Next, after `source {shlex.quote(os.path.relpath(sys.prefix))}/bin/activate`:", soft_wrap=True)
    for command in next_commands(run_folder):
        console.print(f"  {command}", soft_wrap=True)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def next_commands(run_folder: str | Path) -> list[str]:
    """What one may want to do with a finished run, as commands."""
    folder = shlex.quote(str(run_folder))
    return [
        f"python launchers/corpus.py show {folder} --num 3",
        f"python launchers/spd.py --config {folder}/config.yaml --preview-masks 3",
        "deepspeed launchers/experiment.py --config configs/experiments/arithmetic_smollm2.yaml",
    ]


def arms_table(report: Mapping[str, Any]) -> Table:
    """One row an arm."""
    first = next(iter(report["arms"]))
    from_first = {one["after"]: one for one in report["comparisons"] if one["before"] == first}
    unit = "nll" if report["metric"] == "nll" else "right\n%"
    asked = manner(report["temperature"], report["num_samples"])
    title = f"{report['task']}: {len(report['arms'])} arms, {asked}, seed {report['seed']}"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", collapse_padding=True, pad_edge=False)
    table.add_column("arm", no_wrap=True)
    for name in (unit, "95 %\ninterval", "n", f"minus\n{first}", "95 %\npaired"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("ended\n%", "strict\n%", "lenient\n%", "mean\ntokens", "loops\n%"):
        table.add_column(name, justify="right", no_wrap=True)
    for arm, summary in report["arms"].items():
        table.add_row(arm, *_cells(summary, from_first.get(arm), report["metric"]))
    return table


def pass_table(summaries: Mapping[str, Mapping[str, Any]]) -> Table:
    """The chance that one of k samples is right, in percent: one row an arm or task, those that have it."""
    found = {name: summary["pass_at_k"] for name, summary in summaries.items() if summary["pass_at_k"]}
    table = Table(title="pass@k, %", box=box.SIMPLE_HEAD, title_justify="left", collapse_padding=True, pad_edge=False)
    table.add_column("")
    for size in next(iter(found.values()), {}):
        table.add_column(f"k {size}", justify="right")
    for name, shares in found.items():
        table.add_row(name, *(f"{100 * share:.1f}" for share in shares.values()))
    return table


def _cells(summary: Mapping[str, Any], compared: Mapping[str, Any] | None, metric: str) -> list[str]:
    def number(value: float) -> str:
        return f"{value:.3f}" if metric == "nll" else f"{100 * value:.1f}"

    low, high = summary["interval"]
    strict, lenient = summary["strict_extraction_fraction"], summary["lenient_extraction_fraction"]
    difference, bounds = "", ""
    if compared is not None:
        difference, *both = (
            amount(value, metric).split()[0] for value in (compared["difference"], *compared["interval"])
        )
        bounds = " to ".join(both)
    return [
        number(summary["value"]),
        f"{number(low)} to {number(high)}",
        str(summary["num_examples"]),
        difference,
        bounds,
        f"{100 * summary['ended_fraction']:.0f}",
        f"{100 * strict:.0f}",
        f"{100 * lenient:.0f}",
        f"{summary['mean_tokens']:.0f}",
        f"{100 * summary['repetition_fraction']:.0f}",
    ]


def _summaries(run_folder: Path) -> dict[str, Any]:
    """What the stages before summed up, by their folder: the report holds every number."""
    files = (file for place in ("*", "arms/*/*") for file in run_folder.glob(f"{place}/summary.json"))
    return {
        file.parent.relative_to(run_folder).as_posix(): read_json(file)
        for file in sorted(files)
        if file.parent.name in ("project", "generate", "finetune")
    }


def _artifacts(run_folder: Path) -> dict[str, str]:
    """What there is to open, by what it is."""
    known = {
        "the capability subspace": "project/subspace.safetensors",
        "what the projected policy wrote": "generate/completions/completions.jsonl",
        "the adapter": "finetune/adapter",
        "the fine-tuned model": "finetune/model",
        "every answer of every arm": "evaluate",
        "this comparison, every number": "report.json",
        "the same to read in a browser": "report.html",
        "all metrics": "metrics",
    }
    written_after = ("report.json", "report.html")
    return {what: path for what, path in known.items() if path in written_after or (run_folder / path).exists()}
