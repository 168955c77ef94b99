"""The comparison of an experiment: `report.json` with every number, and the page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spd_dist.reports import figures
from spd_dist.reports.page import NUM_SHOWN, drawn, drawn_comparisons, drawn_subspaces, lengths_of, render, side_by_side
from spd_dist.reports.seeds import Answers, answers_of, over_seeds
from spd_dist.storage.artifacts import read_json, write_json, write_text
from spd_dist.tracking.metrics import mean_losses


def write_experiment_page(
    folder: Path,
    report: Mapping[str, Any],
    runs: Sequence[Path],
    by_seed: Sequence[Answers],
    questions: Mapping[str, str],
) -> None:
    """Write `report.html` of an experiment, that needs no network; it links to those of its runs beside it.

    Args:
        folder: The experiment's.
        report: As `report.json` holds it.
        runs: The run folders, in the order of the seeds.
        by_seed: What each run's arms answered.
        questions: What they were asked, by example id.
    """
    lengths = {arm: [lengths_of(answers[arm]) for answers in by_seed] for arm in by_seed[0]}
    found = [
        *drawn_comparisons(report, lengths),
        drawn(
            "Training", "Loss of each student on its own corpus, mean over the seeds.", figures.curves(report["losses"])
        ),
        *drawn_subspaces(next(iter(report["by_seed"].values()))),
    ]
    pages = {seed: f"{run.relative_to(folder)}/report.html" for seed, run in zip(report["seeds"], runs, strict=True)}
    shown = {
        "title": f"{folder.name}: {report['task']}, {len(runs)} seeds",
        "figures": [one for one in found if one["svg"]],
        "examples": side_by_side(by_seed, questions)[:NUM_SHOWN],
        "num_examples": report["num_examples"],
        "num_seeds": len(runs),
        "pages": list(pages.items()),
    }
    write_text(folder / "report.html", render("experiment.html.j2", report, runs[0], shown))


def write_experiment(
    folder: Path, places: Mapping[int, Sequence[Path]], questions: Mapping[str, str]
) -> dict[str, Any]:
    """Compare the arms over the seeds, write `report.json` and `report.html`, and give what the first holds.

    On one rank only.

    Args:
        folder: The experiment's.
        places: By seed, the folders of its rounds: the run itself first.
        questions: What the arms were asked, by example id.

    Raises:
        DataError: a run is not complete, or runs have no common denominator.
    """
    runs = [rounds[0] for rounds in places.values()]
    reports = [read_json(run / "report.json") for run in runs]
    found = over_seeds(runs)
    report = {
        "experiment": folder.name,
        **found,
        "runs": {str(seed): str(rounds[0].relative_to(folder)) for seed, rounds in places.items()},
        "cost": total_cost(reports),
        "losses": mean_losses([each["losses"] for each in reports]),
        "by_seed": {str(seed): _of_one_seed(each) for seed, each in zip(places, reports, strict=True)},
        "later_rounds": [over_seeds(each) for each in list(zip(*places.values(), strict=True))[1:]],
    }
    write_json(folder / "report.json", report)
    by_seed = [answers_of(run, each) for run, each in zip(runs, reports, strict=True)]
    write_experiment_page(folder, report, runs, by_seed, questions)
    return report


def _of_one_seed(report: Mapping[str, Any]) -> dict[str, Any]:
    """What a run's own report says of it that is no comparison: stages, training losses, angles, rounds if any."""
    return {name: report[name] for name in ("stages", "losses", "angles", "rounds") if name in report}


def total_cost(reports: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Tokens, seconds and device hours of every stage, summed over the runs."""
    total: dict[str, dict[str, Any]] = defaultdict(
        lambda: {"tokens": 0, "seconds": 0.0, "world_size": 0, "device_hours": 0.0}
    )
    for report in reports:
        for stage, entry in report["cost"].items():
            for name in ("tokens", "seconds", "device_hours"):
                total[stage][name] += entry[name] or 0
            total[stage]["world_size"] = max(total[stage]["world_size"], entry["world_size"])
    return dict(total)
