"""The page of an experiment: all arms over all seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spd_dist.runtime.artifacts import write_text
from spd_dist.runtime.page import figures
from spd_dist.runtime.page.page import NUM_SHOWN, drawn_comparisons, drawn_subspaces, lengths_of, side_by_side
from spd_dist.runtime.page.render import drawn, render
from spd_dist.runtime.seeds import Answers


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
    text = render(
        "experiment.html.j2",
        report,
        runs[0],
        title=f"{folder.name}: {report['task']}, {len(runs)} seeds",
        figures=[one for one in found if one["svg"]],
        examples=side_by_side(by_seed, questions)[:NUM_SHOWN],
        num_examples=report["num_examples"],
        num_seeds=len(runs),
        pages=[
            (seed, f"{run.relative_to(folder)}/report.html") for seed, run in zip(report["seeds"], runs, strict=True)
        ],
    )
    write_text(folder / "report.html", text)
