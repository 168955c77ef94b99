"""The comparison of an experiment: `report.json` with every number, and the page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spd_dist.runtime.artifacts import read_json, write_json
from spd_dist.runtime.page import write_experiment_page
from spd_dist.runtime.seeds import answers_of, over_seeds
from spd_dist.runtime.training_log import mean_losses


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
