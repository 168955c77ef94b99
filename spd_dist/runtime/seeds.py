"""The same experiment under several seeds: what one run's intervals leave out, the chance in training itself."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from spd_dist.errors import DataError
from spd_dist.runtime.artifacts import read_json
from spd_dist.runtime.comparison import amount
from spd_dist.runtime.statistics import Spread, between_seeds


def over_seeds(run_folders: Sequence[Path]) -> dict[str, Any]:
    """Each arm's metric and each paired difference over the runs, with the spread between them.

    Args:
        run_folders: Finished runs of one config and different seeds, at least two.

    Raises:
        DataError: a report is missing, or the runs differ in task, examples or arms: their numbers have no common
            denominator.
    """
    reports = [read_json(folder / "report.json") for folder in run_folders]
    if len(reports) < 2:
        raise DataError(f"a spread between seeds needs at least 2 runs, not {len(reports)}; run more seeds")
    for folder, report in zip(run_folders, reports, strict=True):
        _refuse_another_denominator(run_folders[0], reports[0], folder, report)
    first = reports[0]
    return {
        **{name: first[name] for name in ("task", "metric", "examples")},
        "num_examples": next(iter(first["arms"].values()))["num_examples"],
        "seeds": [report["seed"] for report in reports],
        "arms": {arm: _spread([report["arms"][arm]["value"] for report in reports]) for arm in first["arms"]},
        "comparisons": [
            {"before": one["before"], "after": one["after"]}
            | _spread([report["comparisons"][index]["difference"] for report in reports])
            for index, one in enumerate(first["comparisons"])
        ],
    }


def seeds_text(result: Mapping[str, Any], *, width: int = 100) -> str:
    """The spread as a table for a terminal."""
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False)
    metric, seeds = result["metric"], result["seeds"]
    title = f"{result['task']}: {len(seeds)} seeds ({', '.join(map(str, seeds))}), n {result['num_examples']} each"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", collapse_padding=True, pad_edge=False)
    for name in ("", "mean", "between seeds", "95 % of the mean", "each seed"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for arm, spread in result["arms"].items():
        table.add_row(arm, *_cells(spread, metric, signed=False))
    for one in result["comparisons"]:
        table.add_row(f"{one['after']} - {one['before']}", *_cells(one, metric, signed=True))
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _spread(values: Sequence[float]) -> dict[str, Any]:
    spread: Spread = between_seeds(values)
    return {
        "mean": spread.mean,
        "standard_deviation": spread.standard_deviation,
        "interval": list(spread.interval),
        "values": list(values),
    }


def _cells(spread: Mapping[str, Any], metric: str, *, signed: bool) -> list[str]:
    def number(value: float, *, signed: bool = signed) -> str:
        return amount(value, metric, signed=signed).split()[0]

    deviation = number(spread["standard_deviation"], signed=False)
    each = " ".join(number(value) for value in spread["values"])
    return [number(spread["mean"]), f"sd {deviation}", " to ".join(map(number, spread["interval"])), each]


def _refuse_another_denominator(
    first_folder: Path, first: Mapping[str, Any], folder: Path, report: Mapping[str, Any]
) -> None:
    for name in ("task", "metric", "examples"):
        if report[name] != first[name]:
            raise DataError(
                f"{folder} and {first_folder} cannot be put together: their {name} differ ({report[name]!r}, "
                f"{first[name]!r}); evaluate both on the same test set"
            )
    if list(report["arms"]) != list(first["arms"]):
        raise DataError(f"{folder} and {first_folder} cannot be put together: their arms differ; run the same arms")
