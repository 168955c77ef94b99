"""Arms under one protocol over seeds: a run for each seed, and a comparison that counts the chance in both.

As one process group, or as an array of jobs: there a job is one arm of one seed, that shares what is finished with all
others and waits for none. Whoever finds everything complete makes the comparison.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from spd_dist.analysis.report import ExperimentReport
from spd_dist.arms import Scope
from spd_dist.config import STAGES, Config, Experiment
from spd_dist.data.sources import load_rows
from spd_dist.data.tasks import find_task
from spd_dist.distributed.collectives import together
from spd_dist.distributed.heartbeat import Heartbeat
from spd_dist.distributed.uneven_work import on_main
from spd_dist.distributed.world import World
from spd_dist.errors import DataError
from spd_dist.process.signals import StopSignals, task_name
from spd_dist.process.stopping import watch
from spd_dist.reports.experiment_report import write_experiment
from spd_dist.reports.seeds import seeds_text
from spd_dist.runs.registered_plan import keep_protocol, protocol_note
from spd_dist.runs.rounds import folders, run_rounds
from spd_dist.storage.manifests import MANIFEST
from spd_dist.storage.restart import kept_status, status_path

log = logging.getLogger(__name__)


class ExperimentJob(NamedTuple):
    """What one task of an array does: some arms of one seed."""

    seed: int
    arms: tuple[str, ...]


def jobs(experiment: Experiment) -> list[ExperimentJob]:
    """One arm of one seed each; later rounds begin with the method's student, so with rounds all arms of a seed."""
    if experiment.run.rounds > 1:
        return [ExperimentJob(seed, experiment.arms) for seed in experiment.seeds]
    return [ExperimentJob(seed, (arm,)) for seed in experiment.seeds for arm in experiment.arms]


def run_experiment(
    experiment: Experiment, world: World, signals: StopSignals, *, task: int = 0, num_tasks: int = 1
) -> str:
    """Do this task's share of the jobs; if all are complete then, compare. Gives what a person wants to read.

    A collective. Whatever was finished, by whichever task, is skipped. Each task has a status and a stop file of its
    own in the experiment's folder.

    Raises:
        UserError: what the user can put right.
    """
    top = Path(experiment.folder)
    watch(signals, top, None if num_tasks == 1 else task)
    part = "" if num_tasks == 1 else task_name(task)
    with kept_status(status_path(top, part), Heartbeat(top / "heartbeat" / part, world), STAGES[-1]):
        if num_tasks == 1:
            return compare(experiment, world, signals, scores_tokens=True)
        for job in jobs(experiment)[task::num_tasks]:
            log.info("seed %d: %s", job.seed, ", ".join(job.arms))
            only = job.arms if experiment.run.rounds == 1 else ()
            run_seed(experiment, job.seed, world, signals, only=only)
        left = on_main("looking for unfinished jobs", lambda: unfinished(experiment))
        if left:
            return f"{top}: task {task} of {num_tasks} is done; unfinished: {_named(left)}"
        return compare(experiment, world, signals)


def run_seed(
    experiment: Experiment,
    seed: int,
    world: World,
    signals: StopSignals,
    *,
    only: Sequence[str] = (),
    scores_tokens: bool = False,
) -> str:
    """The run of one seed, or some arms of it as a job of their own; what other seeds have finished is taken over."""
    on_main("keeping the plan", lambda: keep_protocol(Path(experiment.folder), folders(experiment.config_of(seed))[0]))
    others = tuple(folders(experiment.config_of(other))[0] for other in experiment.seeds if other != seed)
    scope = Scope(only=tuple(only), job="_".join(only), others=others, scores_tokens=scores_tokens)
    return run_rounds(experiment.config_of(seed), world, signals, scope)


def unfinished(experiment: Experiment) -> list[ExperimentJob]:
    """The jobs whose answers are not all there, in any round."""
    return [
        job
        for job in jobs(experiment)
        for places in [folders(experiment.config_of(job.seed))]
        if not all((place / "evaluate" / arm / MANIFEST).exists() for place in places for arm in job.arms)
    ]


def report(experiment: Experiment, world: World, signals: StopSignals) -> str:
    """The comparison of jobs that are all complete.

    Raises:
        DataError: some are not.
    """
    with together("looking for unfinished jobs"):
        left = unfinished(experiment)
        if left:
            raise DataError(f"{experiment.folder}: unfinished: {_named(left)}; start the experiment without --report")
    return compare(experiment, world, signals)


def compare(experiment: Experiment, world: World, signals: StopSignals, *, scores_tokens: bool = False) -> str:
    """Finish every seed's run with its own report, then write the experiment's; without a model if all is answered."""
    for seed in experiment.seeds:
        log.info("seed %d", seed)
        run_seed(experiment, seed, world, signals, scores_tokens=scores_tokens)
    places = {seed: folders(experiment.config_of(seed)) for seed in experiment.seeds}
    questions = _questions(experiment.config_of(experiment.seeds[0]))

    def write() -> ExperimentReport:
        for run, *_ in places.values():
            shutil.rmtree(run / "jobs", ignore_errors=True)  # everything in there was published
        return write_experiment(Path(experiment.folder), places, questions, protocol_note(experiment))

    found = on_main("comparing the seeds", write)
    return f"{seeds_text(found)}\nFiles: {experiment.folder}/report.html, report.json; a run folder for each seed"


def _questions(config: Config) -> dict[str, str]:
    """What the arms are asked, by example id."""
    with together("reading the test rows"):
        task = find_task(config.data.task)
        return {row["id"]: task.prompt(row) for row in load_rows(task, "test", config.data)}


def _named(left: Sequence[ExperimentJob]) -> str:
    shown = [f"{', '.join(job.arms)} of seed {job.seed}" for job in left[:4]]
    return "; ".join(shown) + (f"; and {len(left) - 4} more" if len(left) > 4 else "")
