"""What `report.json` holds: of a run, of an experiment over seeds, of rounds; every number that was compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spd_dist.analysis.answer_summary import AnswersSummary, Measured
from spd_dist.analysis.notebook import table_html
from spd_dist.analysis.side_comparisons import DecodeControl, OtherTask
from spd_dist.storage.records import read_record
from spd_dist.storage.subspace_file import SiteDrift
from spd_dist.types import ADDED_LATER, LeakReport

Curves = Mapping[str, Mapping[str, list[float]]]
"""By arm that was fine-tuned, `steps` and the `losses` at them."""
Angles = Mapping[str, Mapping[str, list[float]]]
"""Principal angles in degrees: of pairs of the run's own `sites`, and of other `arms` against the method."""


@dataclass(frozen=True)
class Shifts:
    """How two arms differ beside the metric; numbers of examples are means where they are over seeds."""

    identical_fraction: float
    """The share of same outputs, letter by letter."""
    num_gained: float | None
    """Examples that only the second has right; None, as what follows, where answers are more or else than right."""
    num_lost: float | None
    num_gained_by_ending: float | None
    """Where the first was cut at the limit, and the second ended."""
    num_gained_by_form: float | None
    """Where the first was right, if its answer is taken from anywhere."""


@dataclass(frozen=True)
class Difference(Shifts):
    """The paired difference of two arms, `after` minus `before`."""

    before: str
    after: str
    difference: float
    interval: list[float]
    """Of 95 %."""
    p_value: float
    detectable_difference: float | None
    """The smallest that would be found in four of five cases; None where none could be."""
    p_holm: float = field(default=1.0, kw_only=True)
    """The p value adjusted for all comparisons beside it."""


@dataclass(frozen=True)
class RunDifference(Difference):
    """Of one run."""

    num_examples: int
    samples: Mapping[str, Measured]
    """Differences of what several answers an example show."""
    test: str


@dataclass(frozen=True)
class SeedsDifference(Difference):
    """Of several runs that differ in their seed."""

    mean: float
    """The difference, once more."""
    values: list[float]
    """Each seed's own."""
    standard_deviation: float
    seed_interval: list[float]
    samples: Mapping[str, Measured] = field(default_factory=dict, metadata=ADDED_LATER)
    """Differences of what several answers an example show, for other seeds and other examples."""


@dataclass(frozen=True)
class ArmResult(AnswersSummary):
    """What an arm reached."""

    sentence: str
    """What it is."""
    samples: Mapping[str, Measured]
    """What several answers an example show beside the metric."""


@dataclass(frozen=True)
class StageTotal:
    """What a stage took, over all its attempts."""

    tokens: int | None
    """Read, written or trained on, as far as its summary says."""
    seconds: float
    world_size: int
    device_hours: float
    peak_memory_gib: float | None
    """Of the last attempt."""
    finished_at: str


@dataclass(frozen=True)
class RunsTotal:
    """What a stage took, over all runs of an experiment."""

    tokens: int
    seconds: float
    world_size: int
    """The largest."""
    device_hours: float


@dataclass(frozen=True)
class ArmInRound:
    """What an arm reached in one of several rounds."""

    value: float
    interval: list[float]


@dataclass(frozen=True)
class RoundResult:
    """A round among several."""

    round: int
    folder: str
    verdict: str
    arms: Mapping[str, ArmInRound]
    energy_fraction: Mapping[str, float]
    """By site."""
    drift: Mapping[str, Mapping[str, SiteDrift]]
    """By earlier round, and site."""


@dataclass(frozen=True)
class Report:
    """The comparison of a run's arms."""

    task: str
    metric: str
    judged_by: str
    seed: int
    temperature: float
    num_samples: int
    examples: str
    """A hash of their ids, and of what is right."""
    verdict: str
    decode_controls: list[DecodeControl]
    test_size: int | None
    """Rows of the task's published test split, if there is one."""
    notes: list[str]
    overlaps: list[LeakReport]
    arms: Mapping[str, ArmResult]
    comparisons: list[RunDifference]
    other_tasks: list[OtherTask]
    cost: Mapping[str, StageTotal]
    """By the stage's folder."""
    stages: Mapping[str, Mapping[str, Any]]
    """What the stages summed up, as they wrote it."""
    losses: Curves
    angles: Angles
    artifacts: Mapping[str, str]
    """What there is to open, and where."""
    rounds: list[RoundResult] | None = None
    """If the method was done several times, each on the student of the one before."""
    iterations: Mapping[str, list[str]] = field(default_factory=dict)
    """By arm that learns from its student: the names of its iterations, in their order; the last is its own."""
    progress: list[RunDifference] | None = None
    """The student of each round against the first model."""

    def _repr_html_(self) -> str:
        """What a notebook shows: the arms, the verdict and the notes."""
        columns = ("arm", self.metric, "low", "high", "n", "ended", "loops", "mean tokens")
        rows = [
            (name, arm.value, *arm.interval, arm.num_examples, arm.ended_fraction, arm.repetition_fraction,
             arm.mean_tokens)
            for name, arm in self.arms.items()
        ]  # fmt: skip
        return table_html(f"{self.task}, seed {self.seed}", columns, rows, [self.verdict, *self.notes])


def read_report(run_folder: Path) -> Report:
    """The report of a run.

    Raises:
        MissingError: it has none yet.
        DataError: it is of another version, or no report.
    """
    return read_record(run_folder / "report.json", Report)


@dataclass(frozen=True)
class SeedSpread:
    """A number over seeds and examples, and each seed's own."""

    mean: float
    interval: list[float]
    """For other seeds and other examples."""
    p_value: float
    detectable_difference: float | None
    values: list[float]
    """Each seed's mean."""
    standard_deviation: float
    """Between seeds."""
    seed_interval: list[float]


@dataclass(frozen=True)
class ArmOverSeeds(SeedSpread):
    """What an arm reached over the seeds, and the means of its diagnostics."""

    sentence: str
    strict_accuracy: float
    lenient_accuracy: float
    ended_fraction: float
    strict_extraction_fraction: float
    lenient_extraction_fraction: float
    repetition_fraction: float
    mean_tokens: float
    pass_at_k: Mapping[str, float]
    reasons: Mapping[str, int]
    samples: Mapping[str, Measured] = field(default_factory=dict, metadata=ADDED_LATER)
    """What several answers an example show beside the metric, for other seeds and other examples."""


@dataclass(frozen=True)
class SeedsReport:
    """The comparison of arms over runs that differ in their seed."""

    task: str
    metric: str
    examples: str
    temperature: float
    num_samples: int
    num_examples: int
    seeds: list[int]
    verdict: str
    notes: list[str]
    overlaps: list[LeakReport]
    arms: Mapping[str, ArmOverSeeds]
    comparisons: list[SeedsDifference]
    other_tasks: list[OtherTask]
    """Of each arm: what it kept of tasks of other domains."""
    decode_controls: list[DecodeControl] = field(default_factory=list, kw_only=True, metadata=ADDED_LATER)


@dataclass(frozen=True)
class SeedDetails:
    """What a run's own report says of it that is no comparison."""

    stages: Mapping[str, Mapping[str, Any]]
    losses: Curves
    angles: Angles
    rounds: list[RoundResult] | None


@dataclass(frozen=True)
class ExperimentReport(SeedsReport):
    """The comparison of an experiment."""

    experiment: str
    runs: Mapping[str, str]
    """By seed, its folder."""
    cost: Mapping[str, RunsTotal]
    losses: Curves
    by_seed: Mapping[str, SeedDetails]
    later_rounds: list[SeedsReport]
