"""Two runs against each other: the arms that both have, example by example, and the settings that differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spd_dist.analysis.comparison import corrected, paired
from spd_dist.analysis.report import Report, RunDifference, read_report
from spd_dist.errors import DataError
from spd_dist.reports.seeds import answers_of
from spd_dist.storage.run_folder import read_config
from spd_dist.storage.settings import settings_by_key
from spd_dist.types import Answer, Json


@dataclass(frozen=True)
class ArmDifference:
    """One arm in both runs."""

    arm: str
    there: float
    """The metric in the other run."""
    here: float
    paired: RunDifference
    """Here less there."""


@dataclass(frozen=True)
class RunsDifference:
    """What sets a run apart from another one."""

    other: str
    """Its name: the folder's, or its path if both folders have one name."""
    both: list[str]
    """The arms of the other run."""
    arms: list[ArmDifference]
    only_here: list[str]
    only_there: list[str]
    settings: list[tuple[str, Json, Json]]
    """Key, its value there and here, of all that differ but `run_dir`; and the code that judged, if it is another."""


def difference_of(run_folder: Path, report: Report, other: Path) -> RunsDifference:
    """Compare a finished run with another one.

    Raises:
        DataError: the other run has no report, or one of other answers; or they answered different examples, or in
            another manner.
    """
    theirs = read_report(other)
    for name in ("task", "metric", "examples", "num_samples", "temperature"):
        own, its = vars(report)[name], vars(theirs)[name]
        if own != its:
            remedy = "compare runs of one data.task, data.test, data.num_test, evaluate.num_samples and .temperature"
            raise DataError(f"{other}: its {name} is {its!r}, and that of {run_folder} is {own!r}; {remedy}")
    name = other.name if other.resolve().name != run_folder.resolve().name else str(other)
    shared = [arm for arm in report.arms if arm in theirs.arms]
    if not shared:
        arms = f"{', '.join(theirs.arms)}, and {run_folder} has {', '.join(report.arms)}"
        raise DataError(f"{other}: no arm is in both runs: it has {arms}; name a run of the same evaluate.arms")
    here, there = answers_of(run_folder, report), answers_of(other, theirs)
    found = corrected([_paired(there[arm], here[arm], report, arm) for arm in shared])
    return RunsDifference(
        other=name or str(other),
        both=list(theirs.arms),
        arms=[
            ArmDifference(arm, theirs.arms[arm].value, report.arms[arm].value, one)
            for arm, one in zip(shared, found, strict=True)
        ],
        only_here=[arm for arm in report.arms if arm not in theirs.arms],
        only_there=[arm for arm in theirs.arms if arm not in report.arms],
        settings=[*_settings(other, run_folder), *_judges(theirs, report)],
    )


def _paired(there: Sequence[Answer], here: Sequence[Answer], report: Report, arm: str) -> RunDifference:
    before, after = f"{arm} there", f"{arm} here"
    return paired(before, after, {before: there, after: here}, report.metric, report.seed)


def _settings(other: Path, run_folder: Path) -> list[tuple[str, Json, Json]]:
    there, here = (settings_by_key(read_config(run / "config.yaml")) for run in (other, run_folder))
    keys = sorted((there.keys() | here.keys()) - {"run_dir"})
    return [(key, there.get(key), here.get(key)) for key in keys if there.get(key) != here.get(key)]


def _judges(theirs: Report, ours: Report) -> list[tuple[str, Json, Json]]:
    return [] if theirs.judged_by == ours.judged_by else [("judged by", theirs.judged_by, ours.judged_by)]
