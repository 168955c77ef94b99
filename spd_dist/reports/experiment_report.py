"""The comparison of an experiment: `report.json` with every number, and the page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from spd_dist.analysis.report import ExperimentReport, Report, RunsTotal, SeedDetails, StageTotal, read_report
from spd_dist.reports import figures
from spd_dist.reports.page import NUM_SHOWN, drawn, drawn_comparisons, drawn_subspaces, lengths_of, render, side_by_side
from spd_dist.reports.seeds import Answers, answers_of, over_seeds
from spd_dist.storage.artifacts import write_text
from spd_dist.storage.records import read_record, write_record
from spd_dist.tracking.metrics import mean_losses
from spd_dist.types import record_of


def write_experiment_page(
    folder: Path,
    report: ExperimentReport,
    runs: Sequence[Path],
    by_seed: Sequence[Answers],
    questions: Mapping[str, str],
) -> None:
    """Write `report.html` of an experiment, that needs no network; it links to those of its runs beside it.

    `runs` and what their arms answered are in the order of the seeds; `questions` by example id.
    """
    lengths = {arm: [lengths_of(answers[arm]) for answers in by_seed] for arm in by_seed[0]}
    found = [
        *drawn_comparisons(report, lengths),
        drawn(
            "Training", "Loss of each student on its own corpus, mean over the seeds.", figures.curves(report.losses)
        ),
        *drawn_subspaces(next(iter(report.by_seed.values()))),
    ]
    pages = {seed: f"{run.relative_to(folder)}/report.html" for seed, run in zip(report.seeds, runs, strict=True)}
    shown = {
        "title": f"{folder.name}: {report.task}, {len(runs)} seeds",
        "figures": [one for one in found if one.svg],
        "examples": side_by_side(by_seed, questions)[:NUM_SHOWN],
        "num_examples": report.num_examples,
        "num_seeds": len(runs),
        "pages": list(pages.items()),
    }
    write_text(folder / "report.html", render("experiment.html.j2", report, runs[0], shown))


def write_experiment(
    folder: Path, places: Mapping[int, Sequence[Path]], questions: Mapping[str, str], protocol: str | None = None
) -> ExperimentReport:
    """Compare the arms over the seeds, write `report.json` and `report.html`, and give what the first holds.

    On one rank only. `places` are the folders of each seed's rounds, the run itself first; `protocol` is a sentence on
    the plan that was written before, the first of the notes.

    Raises:
        DataError: a run is not complete, or runs have no common denominator.
    """
    runs = [rounds[0] for rounds in places.values()]
    reports = [read_report(run) for run in runs]
    own = {
        "experiment": folder.name,
        "runs": {str(seed): str(rounds[0].relative_to(folder)) for seed, rounds in places.items()},
        "cost": total_cost(reports),
        "losses": mean_losses([each.losses for each in reports]),
        "by_seed": {str(seed): _of_one_seed(each) for seed, each in zip(places, reports, strict=True)},
        "later_rounds": [over_seeds(each) for each in list(zip(*places.values(), strict=True))[1:]],
    }
    compared = over_seeds(runs)
    said = [protocol] if protocol else []
    report = record_of(ExperimentReport, {**vars(compared), **own, "notes": [*said, *compared.notes]})
    write_record(folder / "report.json", report)
    by_seed = [answers_of(run, each) for run, each in zip(runs, reports, strict=True)]
    write_experiment_page(folder, report, runs, by_seed, questions)
    return report


def read_experiment(folder: Path) -> ExperimentReport:
    """The report of an experiment.

    Raises:
        MissingError: it has none yet.
        DataError: it is of another version, or no report.
    """
    return read_record(folder / "report.json", ExperimentReport)


def _of_one_seed(report: Report) -> SeedDetails:
    """What a run's own report says of it that is no comparison: stages, training losses, angles, rounds if any."""
    return SeedDetails(report.stages, report.losses, report.angles, report.rounds)


def total_cost(reports: Sequence[Report]) -> dict[str, RunsTotal]:
    """Tokens, seconds and device hours of every stage, summed over the runs."""
    by_stage: dict[str, list[StageTotal]] = defaultdict(list)
    for report in reports:
        for stage, entry in report.cost.items():
            by_stage[stage].append(entry)
    return {
        stage: RunsTotal(
            tokens=sum(one.tokens or 0 for one in each),
            seconds=sum(one.seconds for one in each),
            world_size=max(one.world_size for one in each),
            device_hours=sum(one.device_hours for one in each),
        )
        for stage, each in by_stage.items()
    }
