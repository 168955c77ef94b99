"""Finished runs that an experiment is planned by: how their answers vary, and what they took on their machine."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from spd_dist.analysis.random_effects import Design
from spd_dist.analysis.report import ExperimentReport, Report, read_report
from spd_dist.arms import chosen
from spd_dist.reports.experiment_report import read_experiment
from spd_dist.reports.seeds import Answers, answers_of
from spd_dist.storage.artifacts import missing
from spd_dist.storage.records import read_fields
from spd_dist.storage.run_folder import read_config
from spd_dist.storage.settings import BESIDE_THE_METHOD, is_of, result_settings
from spd_dist.types import Json


@dataclass(frozen=True)
class PilotCost:
    """What a pilot took, on its machine, in all of its rounds."""

    shared: float
    """Seconds a seed of what no arm has for itself."""
    training: Mapping[str, float]
    """Seconds a seed of what an arm has: its completions and its student. By the name that it is made under."""
    answering: Mapping[str, float]
    """Seconds of one sample of one example, by arm."""

    def hours(self, design: Design, arms: Sequence[str]) -> float:
        """What a design of these arms takes there: seeds one after the other, nothing shared between them."""
        of_students = sum(_known_or_mean(self.training, name) for name in _trained(arms))
        of_answers = sum(_known_or_mean(self.answering, arm) for arm in arms)
        seconds = self.shared + of_students + design.examples * design.samples * of_answers
        return design.seeds * seconds / 3600

    def unknown(self, arms: Sequence[str]) -> list[str]:
        """The arms whose students or answers the pilot has not: they are counted as the mean of those that it has."""
        students = [name for name in _trained(arms) if name not in self.training]
        return list(dict.fromkeys([*students, *(arm for arm in arms if arm not in self.answering)]))


def _trained(arms: Sequence[str]) -> list[str]:
    """What is trained: arms that differ in their answers alone have one student."""
    return list(dict.fromkeys(arm.made_as for arm in chosen(arms) if arm.trains))


def _known_or_mean(seconds: Mapping[str, float], name: str) -> float:
    return seconds.get(name, fmean(seconds.values()) if seconds else 0.0)


def pilot_cost(seconds: Mapping[str, float], pilot: Design) -> PilotCost:
    """Split the seconds of stages, summed over the pilot's seeds, among what they are of."""
    shared, training, answering = 0.0, defaultdict[str, float](float), defaultdict[str, float](float)
    for stage, each in seconds.items():
        place, *names = re.sub(r"^rounds/\d+/", "", stage).split("/")
        if place == "evaluate" and names:
            answering["/".join(names)] += each / (pilot.seeds * pilot.examples * pilot.samples)
        elif place in ("generate", "finetune"):
            training["spd"] += each / pilot.seeds
        elif place == "arms":
            training[re.sub(r"_iteration\d+", "", "/".join(names[:-1]))] += each / pilot.seeds
        else:
            shared += each / pilot.seeds
    return PilotCost(shared, dict(training), dict(answering))


@dataclass(frozen=True)
class Pilot:
    """Finished runs whose answers a plan is made from."""

    metric: str
    temperature: float
    design: Design
    by_seed: Sequence[Answers]
    cost: PilotCost
    settings: Mapping[str, Json]
    """Of its first run, as a plan has them."""


def read_pilot(folder: Path) -> Pilot:
    """A finished run, or experiment.

    Raises:
        MissingError: it has no report yet, or no config.
        DataError: it is of another version.
    """
    file = folder / "report.json"
    if "experiment" in read_fields(file):
        whole: Report | ExperimentReport = read_experiment(folder)
        runs = [folder / run for run in whole.runs.values()]
    else:
        whole, runs = read_report(folder), [folder]
    reports = [read_report(run) for run in runs]
    num_examples = next(iter(reports[0].arms.values())).num_examples
    design = Design(len(runs), num_examples, whole.num_samples)
    by_seed = [answers_of(run, report) for run, report in zip(runs, reports, strict=True)]
    cost = pilot_cost({stage: entry.seconds for stage, entry in whole.cost.items()}, design)
    config = runs[0] / "config.yaml"
    if not config.exists():
        raise missing(config)
    of_run = read_config(config)
    settings = {**settings_of_arms(of_run), "rounds": of_run.get("rounds", 1)}
    return Pilot(whole.metric, whole.temperature, design, by_seed, cost, settings)


def settings_of_arms(config: Mapping[str, Json]) -> dict[str, Json]:
    """The settings that the arms' results depend on, by key."""
    return {key: value for key, value in result_settings(config).items() if not is_of(key, BESIDE_THE_METHOD)}
