"""Sweeps, a run a point: `python launchers/sweep.py plan|status|collect|words FILE`.

plan SWEEP.yaml     check every point, write FOLDER/plan.json, and say how to submit it as a SLURM array
status PLAN.json    how far each point is
collect PLAN.json   FOLDER/results.csv with every finished point, and a table over the seeds of each setting
words PLAN.json N   the words of spd.py for point N, one a line: what the array's tasks read

A sweep file has `folder`, `config` (YAML files), `overrides` and `grid`: dotted keys with the values that they take.
Exit codes: 0 done, 2 the sweep is wrong, 3 a report is wrong, 1 anything else.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table
from yaml import YAMLError

from spd_dist.errors import ConfigError, DataError
from spd_dist.launch import at_least, launcher
from spd_dist.overrides import load_config, split_words
from spd_dist.yaml_files import load_yaml

KEYS = {"folder", "config", "overrides", "grid"}
SILENT_SECONDS = 600
"""A run that says it is running, and was not seen for so long, may be dead."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    index: int
    run_dir: Path
    values: Mapping[str, Any]
    words: tuple[str, ...]

    @property
    def setting(self) -> str:
        """Its values without the seed, as people read them."""
        return ", ".join(f"{key}={written(value)}" for key, value in self.values.items() if key != "seed") or "-"


@launcher
def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and act."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("plan", "status", "collect", "words"))
    parser.add_argument("file", type=Path, help="the sweep for plan, else the plan")
    parser.add_argument("index", type=at_least(0), nargs="?", help="for words: the point")
    chosen = parser.parse_args(arguments)
    if chosen.action == "plan":
        plan(chosen.file)
    elif chosen.action == "status":
        Console(width=160).print(status_table(read_plan(chosen.file)))
    elif chosen.action == "collect":
        collect(chosen.file)
    else:
        print("\n".join(point_of(chosen.file, chosen.index).words))
    return 0


def plan(path: Path) -> None:
    """Write the plan of a sweep; no point that does not load as a config gets into it."""
    folder, found = points(path)
    for point in found:
        load_config(*split_words(point.words))
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "plan.json"
    if target.exists() and read_plan(target, remedy=f"delete {target} and start the same command again") != found:
        raise ConfigError(
            f"{target} is the plan of another sweep, and its runs would be taken for this one's; "
            "give this sweep a folder of its own"
        )
    described = [
        {"index": one.index, "run_dir": str(one.run_dir), "values": dict(one.values), "words": list(one.words)}
        for one in found
    ]
    target.write_text(json.dumps({"sweep": str(path), "points": described}, indent=2) + "\n")
    print(f"{target}: {len(found)} points")
    print(f"python launchers/submit.py sweep {target} --array=0-{len(found) - 1}%4")


def points(path: Path) -> tuple[Path, list[Point]]:
    """The folder of a sweep, and its points: every combination of its grid, the last axis fastest.

    Raises:
        ConfigError: the file can't be read, or has other keys.
    """
    try:
        sweep = OmegaConf.to_container(load_yaml(path))
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(sweep, dict) or not {"folder", "grid"} <= sweep.keys() <= KEYS:
        found = ", ".join(map(str, sweep)) if isinstance(sweep, dict) else type(sweep).__name__
        raise ConfigError(f"{path}: a sweep has folder, config, overrides and grid, not {found}")
    grid, folder = sweep["grid"], Path(sweep["folder"])
    wrong = next((key for key, values in grid.items() if not isinstance(values, list) or not values), None)
    if wrong is not None:
        raise ConfigError(f"{path}, grid.{wrong}: {grid[wrong]!r} is not a list of values; write [{grid[wrong]}]")
    fixed = [f"{key}={written(value)}" for key, value in sweep.get("overrides", {}).items()]
    configs = [word for name in sweep.get("config", []) for word in ("--config", name)]
    found = []
    for index, values in enumerate(itertools.product(*grid.values())):
        point = dict(zip(grid, values, strict=True))
        name = "-".join(f"{key.rpartition('.')[2]}{written(value)}" for key, value in point.items())
        run_dir = folder / f"{index:03d}-{re.sub('[^A-Za-z0-9._]+', '-', name).strip('-')}"
        varied = [f"{key}={written(value)}" for key, value in point.items()]
        found.append(Point(index, run_dir, point, (*configs, *fixed, *varied, f"run_dir={run_dir}")))
    return folder, found


def written(value: Any) -> str:
    """A value as `section.key=value` takes it."""
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    return {True: "true", False: "false", None: "null"}[value] if isinstance(value, bool | None) else str(value)


def read_plan(path: Path, remedy: str = "write one with launchers/sweep.py plan SWEEP.yaml") -> list[Point]:
    """The points of a plan.

    Raises:
        ConfigError: it can't be read.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["points"]
        points = [
            Point(int(one["index"]), Path(one["run_dir"]), dict(one["values"]), tuple(one["words"])) for one in found
        ]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} is no plan ({error!r}); {remedy}") from error
    return points


def point_of(path: Path, index: int | None) -> Point:
    """One point of a plan.

    Raises:
        ConfigError: there is no such point.
    """
    found = read_plan(path)
    if index is None or not 0 <= index < len(found):
        raise ConfigError(f"{path} has the points 0 to {len(found) - 1}, and no {index}; correct --array")
    return found[index]


def status_table(found: Sequence[Point]) -> Table:
    """Every point: its state, what of it is complete, and where it was last seen."""
    from spd_dist.storage.restart import read_status

    table = Table("point", "setting", "seed", "state", "complete", "last seen", title=f"{len(found)} points")
    for point in found:
        status = read_status(point.run_dir)
        stages = sorted(file.parent.name for file in point.run_dir.glob("*/manifest.json"))
        beats = filter(None, map(_read, point.run_dir.glob("heartbeat/rank_*.json")))
        newest = max(beats, key=lambda beat: beat["time"], default=None)
        seen = "" if newest is None else f"{newest['place']}, {time.time() - newest['time']:.0f} s ago"
        state = "absent" if status is None else status.state
        if state == "running" and (newest is None or time.time() - newest["time"] > SILENT_SECONDS):
            state = "running? silent"
        reason = f" ({status.reason})" if status is not None and state == "failed" else ""
        seed = str(point.values.get("seed", ""))
        table.add_row(str(point.index), point.setting, seed, state + reason, " ".join(stages), seen)
    return table


def collect(path: Path) -> None:
    """Write the numbers of all finished points side by side, and show the spread between seeds.

    Raises:
        DataError: no point is finished.
    """
    from spd_dist.reports.seeds import over_seeds, seeds_text

    finished = [point for point in read_plan(path) if (point.run_dir / "report.json").exists()]
    if not finished:
        raise DataError(f"{path}: no point is finished yet; see launchers/sweep.py status {path}")
    target = path.parent / "results.csv"
    rows = [row for point in finished for row in _rows(point)]
    with target.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    by_setting: dict[str, list[Path]] = {}
    for point in finished:
        by_setting.setdefault(point.setting, []).append(point.run_dir)
    for setting, run_dirs in by_setting.items():
        print(f"\n{setting}")
        try:
            print(seeds_text(over_seeds(run_dirs)))
        except DataError as error:  # one seed only, or each seed has a test set of its own
            print(f"  {error}")
    print(f"\n{target}: {len(finished)} of {len(read_plan(path))} points, a line an arm")


def _rows(point: Point) -> list[dict[str, Any]]:
    from spd_dist.analysis.report import read_report

    report = read_report(point.run_dir)
    rows = []
    for arm, result in report.arms.items():
        low, high = result.interval
        row = {"index": point.index, **{key: written(value) for key, value in point.values.items()}, "arm": arm}
        row |= {"task": report.task, "metric": report.metric, "num_examples": result.num_examples}
        rows.append(row | {"value": result.value, "low": low, "high": high, "run_dir": str(point.run_dir)})
    return rows


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # not there yet
