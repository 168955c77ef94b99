"""The plan of an experiment, written down before it runs: how much is asked, to show what, and in how many hours.

A pilot's answers say where the chance comes from (`spd_dist/analysis/random_effects.py`). The report names the plan by
its hash, and each setting in which the experiment departed from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from rich import box
from rich.table import Table

from spd_dist.analysis.answer_summary import values_by_id
from spd_dist.analysis.comparison import amount, arm_pairs
from spd_dist.analysis.random_effects import (
    Design,
    DifferenceVariance,
    detectable,
    difference_variance,
    examples_needed,
)
from spd_dist.config import Experiment
from spd_dist.data.sources import load_rows
from spd_dist.data.tasks import find_task
from spd_dist.errors import ConfigError, DataError
from spd_dist.redaction import redacted_data
from spd_dist.runs.pilot import Pilot, read_pilot, settings_of_arms
from spd_dist.storage.artifacts import content_hash, sha256_of, write_text
from spd_dist.storage.records import read_record, write_record
from spd_dist.storage.settings import changed, is_of, settings_by_key
from spd_dist.tracking.console import TextConsole
from spd_dist.types import Json

PROTOCOL = "protocol.json"
METHOD = "spd"
FEW_DIFFERING = 10
"""Examples: with fewer, the variance of a difference is hardly known."""
SEEDS, SAMPLES = (2, 3, 5, 8), (1, 4, 8, 16)
"""What the table of a plan has, beside what the config says."""
SIZES = ("seed", "data.num_test", "evaluate.arms", "evaluate.num_samples")
"""How much is asked: a pilot's are its own."""
MANNER = ("data.task", "choices.scoring", "evaluate.temperature")
DRAWN_BY = ("evaluate.top_p", "evaluate.top_k", "evaluate.min_p")
"""What a pilot has in common with what is planned; the second where answers are drawn."""


@dataclass(frozen=True)
class Protocol:
    """`protocol.json` of an experiment: the plan."""

    written_at: str
    pilot: str
    metric: str
    before: str
    after: str
    difference: float
    """That is to be shown, in the metric's unit: of shares 0.02 is two points."""
    variance: DifferenceVariance
    design: Design
    """As the config says."""
    detectable: float
    """What this design finds in four of five cases."""
    hours: float
    """On the pilot's machine and ranks."""
    settings: Mapping[str, Json]
    """Those that the arms' results depend on, with the arms, the seeds and the rounds."""
    differs_from_pilot: list[str]
    """What else than numbers is not the pilot's, a sentence a key."""
    num_comparisons: int = 1
    """That the report corrects for."""
    test_rows: str = ""
    """A hash of what is asked, and of what is right."""
    guessed_hours: list[str] = field(default_factory=list)
    """Arms that the pilot has not: their hours are the mean of the others'."""


def write_protocol(
    experiment: Experiment, pilot_folder: Path, difference: float, between_seeds: float | None = None
) -> str:
    """Write the plan into the experiment's folder, before its first answer; gives the table that a person reads.

    Args:
        experiment: What is to be run; its first arm is compared with `spd`, or with its last arm.
        pilot_folder: A finished run or experiment with both arms.
        difference: That is to be shown, in points, or nats a token.
        between_seeds: The standard deviation of the difference between seeds, in the same unit: a pilot of one seed
            does not show it. None takes what the pilot's seeds show.

    Raises:
        ConfigError: the experiment has answers already, or another plan; the pilot is of another task, or answered in
            another manner.
        DataError: the pilot lacks an arm, its answers do not vary, or the test rows cannot be read.
    """
    pilot = read_pilot(pilot_folder)
    before, after = experiment.arms[0], METHOD if METHOD in experiment.arms else experiment.arms[-1]
    missing = [arm for arm in (before, after) if arm not in pilot.by_seed[0]]
    if missing:
        raise DataError(
            f"--pilot {pilot_folder}: {', '.join(missing)} did not answer in it; it has {', '.join(pilot.by_seed[0])}"
        )
    folder = Path(experiment.folder)
    begun = begun_folders(folder)
    if begun:
        raise ConfigError(
            f"--power: {begun[0]} holds answers already, and a plan is written before them; name another folder="
        )
    settings = settings_of(experiment)
    refuse_another_manner(pilot_folder, pilot.settings, settings)
    unit = 1 if pilot.metric == "nll" else 100
    assumed = None if between_seeds is None else (between_seeds / unit) ** 2
    variance = _variance(pilot, pilot_folder, before, after, assumed)
    asked = load_rows(find_task(experiment.run.data.task), "test", experiment.run.data)
    design = Design(len(experiment.seeds), len(asked), experiment.run.evaluate.num_samples)
    num_comparisons = len(arm_pairs(experiment.arms))
    protocol = Protocol(
        written_at=datetime.now(UTC).isoformat(timespec="seconds"),
        pilot=str(pilot_folder),
        metric=pilot.metric,
        before=before,
        after=after,
        difference=difference / unit,
        variance=variance,
        design=design,
        detectable=detectable(variance, design, num_comparisons),
        hours=pilot.cost.hours(design, experiment.arms),
        settings=settings,
        differs_from_pilot=[
            sentence for key, sentence in changed(pilot.settings, settings).items() if not is_of(key, SIZES)
        ],
        num_comparisons=num_comparisons,
        test_rows=content_hash(asked),
        guessed_hours=pilot.cost.unknown(experiment.arms),
    )
    _write_once(folder / PROTOCOL, protocol)
    return plan_text(protocol, pilot, experiment.arms, folder / PROTOCOL)


def _variance(pilot: Pilot, folder: Path, before: str, after: str, between_seeds: float | None) -> DifferenceVariance:
    """What the pilot's answers say, `between_seeds` in the place of what its seeds do."""
    found = difference_variance([(answers[before], answers[after]) for answers in pilot.by_seed], pilot.metric)
    if not any((found.examples, found.seeds, found.rest, found.samples)):
        raise DataError(
            f"--pilot {folder}: {after} differs from {before} by the same on each of its {pilot.design.examples} "
            "examples, which says nothing of chance; name a pilot with more examples, or one whose students learned "
            "more"
        )
    return found if between_seeds is None else dataclasses.replace(found, seeds=between_seeds)


def _num_differing(pilot: Pilot, before: str, after: str) -> int:
    """The examples that the two arms answered otherwise under any seed."""
    pairs = [
        (values_by_id(answers[before], pilot.metric), values_by_id(answers[after], pilot.metric))
        for answers in pilot.by_seed
    ]
    return len({key for old, new in pairs for key in old if old[key] != new[key]})


def refuse_another_manner(folder: Path, of_pilot: Mapping[str, Json], planned: Mapping[str, Json]) -> None:
    """See that the pilot's answers vary as those that are planned: of the same task, answered in the same manner.

    Raises:
        ConfigError: they do not.
    """
    for key in (*MANNER, *(DRAWN_BY if planned["evaluate.temperature"] else ())):
        there, now = of_pilot.get(key), planned[key]
        if there != now:
            raise ConfigError(
                f"{key}: {now!r} is not valid with --pilot {folder}, whose answers are of {there!r}: how these vary "
                f"says nothing of others; set {key}={there}, or name a pilot that was run with {key}={now}"
            )


def _write_once(file: Path, protocol: Protocol) -> None:
    if file.exists():
        before, now = (dataclasses.asdict(one) for one in (read_record(file, Protocol), protocol))
        other = [name for name in now if name != "written_at" and content_hash(before[name]) != content_hash(now[name])]
        if other:
            raise ConfigError(
                f"--power: {file} is another plan ({', '.join(other)} differ); name another folder=, or remove it"
            )
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    write_record(file, protocol)


def settings_of(experiment: Experiment) -> dict[str, Json]:
    """The settings that the arms' results depend on, and how much is asked; as JSON holds them, without secrets."""
    run = settings_of_arms(redacted_data(dataclasses.asdict(experiment.config_of(experiment.seeds[0]))))
    asked = {"seed": list(experiment.seeds), "evaluate.arms": list(experiment.arms), "rounds": experiment.run.rounds}
    return {**run, **asked}


def begun_folders(folder: Path) -> list[Path]:
    """The seeds of an experiment that hold answers: also unfinished ones, and those of jobs that published none yet."""
    return [run for run in sorted(folder.glob("seed_*")) if any(run.glob("**/evaluate/**/*.*"))]


def keep_protocol(folder: Path, run_folder: Path) -> None:
    """Put the plan, if there is one, beside a seed's run before its first answer: a later change shows."""
    if (folder / PROTOCOL).exists() and run_folder not in begun_folders(folder):
        write_text(run_folder / PROTOCOL, (folder / PROTOCOL).read_text(encoding="utf-8"))


def protocol_note(experiment: Experiment) -> str | None:
    """One sentence of the report: the plan, its hash, and how the experiment departed from it; None without a plan."""
    file = Path(experiment.folder) / PROTOCOL
    if not file.exists():
        return None
    plan = read_record(file, Protocol)
    changes = changed(settings_by_key(plan.settings), settings_of(experiment))
    apart = list(changes.values())
    for run in begun_folders(file.parent):
        kept = run / PROTOCOL
        if not kept.exists() or sha256_of(kept) != sha256_of(file):
            apart.append(f"{run.name} was begun {'under another plan' if kept.exists() else 'before the plan'}")
    asked = load_rows(find_task(experiment.run.data.task), "test", experiment.run.data)
    is_same_data = not any(is_of(key, ("data",)) for key in changes)
    if is_same_data and plan.test_rows and content_hash(asked) != plan.test_rows:
        apart.append("the test rows are others")
    return (
        f"Planned at {plan.written_at} (protocol.json, sha256 {sha256_of(file)[:16]}): {plan.after.upper()} against "
        f"{plan.before.upper()}, {amount(plan.difference, plan.metric, signed=False)} to be shown; "
        + (f"departed from the plan: {'; '.join(apart)}." if apart else "done as planned.")
    )


def plan_text(plan: Protocol, pilot: Pilot, arms: Sequence[str], file: Path) -> str:
    """The plan for a terminal: what shows the difference, what the config shows, and what neither can know."""
    console = TextConsole()
    shown, design = amount(plan.difference, plan.metric, signed=False), plan.design
    corrected = f", corrected for {plan.num_comparisons} comparisons" if plan.num_comparisons > 1 else ""
    against = f"{plan.after.upper()} against {plan.before.upper()}"
    console.print(f"To show {shown} of {against} in four of five cases{corrected}:", soft_wrap=True)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("seeds", "samples", "examples", "hours"):
        table.add_column(name, justify="right")
    can_sample = pilot.temperature > 0 and pilot.design.samples > 1
    for seeds in sorted({*SEEDS, design.seeds}):
        for samples in sorted({*SAMPLES, design.samples}) if can_sample else [design.samples]:
            enough = examples_needed(plan.variance, plan.difference, seeds, samples, plan.num_comparisons)
            hours = None if enough is None else pilot.cost.hours(Design(seeds, enough, samples), arms)
            cells = ["never", ""] if enough is None or hours is None else [f"{enough:,}", f"{hours:.1f}"]
            table.add_row(str(seeds), str(samples), *cells)
    console.print(table)
    console.print(
        f"This config: {design.seeds} seeds, {design.samples} samples of {design.examples} examples: "
        f"{amount(plan.detectable, plan.metric, signed=False)}, {plan.hours:.1f} hours."
    )
    num_differing = _num_differing(pilot, plan.before, plan.after)
    if num_differing < FEW_DIFFERING:
        console.print(
            f"Note: {against} differs on {num_differing} of the pilot's {pilot.design.examples} examples, too few to "
            "say how much answers vary: more may be needed, by far. Name a larger pilot, or one that learned more."
        )
    if plan.variance.seeds is None:
        console.print(
            "Note: the pilot has one seed; the chance between seeds is not in these numbers: give the standard "
            "deviation of the difference between seeds, in points, by --between-seeds."
        )
    if not can_sample:
        console.print("Note: the pilot has one answer an example, which cannot say what more samples would show.")
    if plan.differs_from_pilot:
        console.print(f"Note: the pilot was another config: {'; '.join(plan.differs_from_pilot)}.", markup=False)
    guessed = f"; {', '.join(plan.guessed_hours)}: the mean of its arms" if plan.guessed_hours else ""
    console.print(f"Hours are the pilot's machine's, seeds one after the other{guessed}.", markup=False)
    console.print(f"Written down: {file} (sha256 {sha256_of(file)[:16]})", soft_wrap=True)
    return console.text()
