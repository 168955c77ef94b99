"""One model, evaluated by itself on several tasks: each task is a run of its own, of the evaluate stage alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from spd_dist.analysis.answer_summary import AnswersSummary
from spd_dist.arms import Scope
from spd_dist.config import Config
from spd_dist.data.sources import published_size
from spd_dist.distributed.collectives import together
from spd_dist.distributed.uneven_work import on_main
from spd_dist.distributed.world import World
from spd_dist.errors import ConfigError
from spd_dist.inference.placement import load_to_answer
from spd_dist.models.policy import Policy, load_policy
from spd_dist.process.signals import StopSignals
from spd_dist.process.stopping import watch
from spd_dist.run import Run
from spd_dist.stage_inputs import of_protocol
from spd_dist.stages.evaluate import evaluate_arm
from spd_dist.storage.artifacts import content_hash, sha256_of
from spd_dist.storage.records import read_record, write_record
from spd_dist.types import record_of


@dataclass(frozen=True)
class TaskSummary(AnswersSummary):
    """What the model answered to one task."""

    test_size: int | None
    """Rows of the task's published test split, if there is one."""


@dataclass(frozen=True)
class StandaloneSummary:
    """`summary.json` of one model on several tasks."""

    model: str
    adapter: str | None
    seed: int
    temperature: float
    tasks: Mapping[str, TaskSummary]


ARM = "model"
"""What the answers are filed under: TASK/evaluate/model/TASK.jsonl in the folder."""


def evaluate_alone(
    config: Config,
    tasks: Mapping[str, str | None],
    *,
    adapter: Path | None = None,
    world: World,
    signals: StopSignals,
) -> StandaloneSummary:
    """Let the model answer the test set of every task; write `summary.json`, and give what it holds. A collective.

    Start it again to go on where it stopped: what is answered is not answered again. `config.run_dir` is the folder of
    all tasks, and `data.task` is overruled. `tasks` have where their test rows come from, if not from where `config` or
    the task says; `adapter`, a LoRA adapter's folder, is put beside the model's weights.

    Raises:
        UserError: what the user can put right, found for every task before the first is answered.
    """
    with together("looking at the adapter"):
        inputs = {} if adapter is None else {"adapter": fingerprint_of(adapter)}
    watch(signals, Path(config.run_dir))
    scope = Scope("evaluate", "evaluate")
    runs = [Run(of_task(config, task, source), world, signals, scope) for task, source in tasks.items()]
    for run in runs:
        run.rows("test")

    @functools.cache
    def policy() -> Policy:
        if adapter is None:
            return load_policy(config.model, config.distributed, world)
        longest = max(run.test_set().longest for run in runs)
        return load_to_answer(config, world, adapter=adapter, longest=longest)

    found = {run.task.name: _answered(run, policy, inputs) for run in runs}
    name = None if adapter is None else str(adapter)
    summary = StandaloneSummary(config.model.name, name, config.seed, config.evaluate.temperature, found)
    on_main("writing the summary", lambda: write_record(Path(config.run_dir) / "summary.json", summary))
    return summary


def of_task(config: Config, task: str, source: str | None) -> Config:
    """The config of the run of one task."""
    data = dataclasses.replace(config.data, task=task, test=source or config.data.test)
    return dataclasses.replace(config, run_dir=str(Path(config.run_dir) / Path(task).stem), data=data)


def fingerprint_of(adapter: Path) -> str:
    """A hash of an adapter's files.

    Raises:
        ConfigError: it is none.
    """
    if not (adapter / "adapter_config.json").is_file():
        raise ConfigError(f"--adapter: {adapter} holds no adapter_config.json; name a folder that peft has saved")
    return content_hash({file.name: sha256_of(file) for file in sorted(adapter.glob("adapter_*"))})


def _answered(run: Run, policy: Callable[[], Policy], inputs: dict[str, str]) -> TaskSummary:
    """The summary of one task."""
    config = run.config

    def work(folder: Path) -> None:
        test_set = run.test_set()
        with run.progress("evaluate", None, f"answers to {run.task.name}") as progress:
            context = run.context(folder, progress=progress)
            summary = evaluate_arm(policy(), test_set, config.evaluate, context, arm=ARM)
        on_main(
            "writing the summary of the answers",
            lambda: write_record(folder / "summary.json", summary),
        )

    with run.kept_status(), run.opened():
        run.run_stage("evaluate", of_protocol(run) | inputs, ["summary.json", ARM], work)
        file = run.folder.folder("evaluate") / "summary.json"
        summary = on_main("reading the summary of the answers", lambda: read_record(file, AnswersSummary))
        run.metrics.log("evaluate", {summary.metric: summary.value}, summary.num_examples)
    return record_of(TaskSummary, {**vars(summary), "test_size": published_size(run.task, config.data)})
