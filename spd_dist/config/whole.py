"""A run, and an experiment of a run a seed, whole; and what ties their fields together."""

from __future__ import annotations

import dataclasses
import datetime
from dataclasses import dataclass, field

from spd_dist.config import sections, side_sections
from spd_dist.config.combinations import check_combinations
from spd_dist.config.setting import setting
from spd_dist.errors import ConfigError


@dataclass(frozen=True)
class Config:
    """A run."""

    run_dir: str = setting("runs/spd", "the run's folder: artifacts, metrics, report")
    seed: int = setting(42, "of every generator", at_least=0)
    rounds: int = setting(1, "times the method is done, each on the student of the one before", at_least=1)
    refit: bool = setting(True, "rounds: estimate the subspace anew in each, instead of once")
    model: sections.Model = field(default_factory=sections.Model)
    data: sections.Data = field(default_factory=sections.Data)
    calibrate: sections.Calibrate = field(default_factory=sections.Calibrate)
    sketch: sections.Sketch = field(default_factory=sections.Sketch)
    reduce: sections.Reduce = field(default_factory=sections.Reduce)
    project: sections.Project = field(default_factory=sections.Project)
    generate: sections.Generate = field(default_factory=sections.Generate)
    finetune: sections.Finetune = field(default_factory=sections.Finetune)
    choices: sections.Choices = field(default_factory=sections.Choices)
    evaluate: sections.Evaluate = field(default_factory=sections.Evaluate)
    mechanism: side_sections.Mechanism = field(default_factory=side_sections.Mechanism)
    distributed: side_sections.Distributed = field(default_factory=side_sections.Distributed)
    metrics: side_sections.Metrics = field(default_factory=side_sections.Metrics)


@dataclass(frozen=True)
class Experiment:
    """Arms under one protocol, over seeds: a run for each seed, and one comparison of all."""

    folder: str = setting("runs/experiment", "of a run folder for each seed, and of the comparison")
    seeds: tuple[int, ...] = setting((1, 2, 3), "of the runs, at least two; all answer the same test problems")
    arms: tuple[str, ...] = setting(("base", "psr", "ssd", "spd", "random", "identity"), "as evaluate.arms")
    run: Config = field(default_factory=Config)

    def config_of(self, seed: int) -> Config:
        """The config of one run."""
        run_dir, evaluate = f"{self.folder}/seed_{seed}", dataclasses.replace(self.run.evaluate, arms=self.arms)
        name = self.run.metrics.experiment or self.folder.rstrip("/").rpartition("/")[2]
        metrics = dataclasses.replace(self.run.metrics, experiment=name)
        return dataclasses.replace(self.run, run_dir=run_dir, seed=seed, evaluate=evaluate, metrics=metrics)


def check_across_fields(config: Config) -> None:
    """Refuse what does not go together: pairs of values, which `combinations.py` has, and what is more than a pair.

    Raises:
        ConfigError: two fields that are each valid, and not together.
    """
    check_combinations(config)
    if (config.finetune.keep_every or 0) % config.finetune.checkpoint_every:
        raise ConfigError(
            f"finetune.keep_every: {config.finetune.keep_every} is not valid; it must be a multiple of "
            f"finetune.checkpoint_every={config.finetune.checkpoint_every}"
        )
    tasks = [config.data.task, *(word.partition("=")[0] for word in config.evaluate.also)]
    twice = next((task for task in tasks if tasks.count(task) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"evaluate.also: {list(config.evaluate.also)} is not valid; {twice!r} is answered already, name each once"
        )
    if len(config.data.thinking_marks) not in (0, 2) or "" in config.data.thinking_marks:
        raise ConfigError(
            f"data.thinking_marks: {list(config.data.thinking_marks)} is not valid; give the two marks of a thought, "
            "as in ['<think>','</think>']"
        )
    if not _is_date(config.data.date):
        raise ConfigError(f"data.date: {config.data.date!r} is not valid; write a day as YYYY-MM-DD")
    if not config.calibrate.layers:
        raise ConfigError("calibrate.layers: an empty list is not valid; name at least one layer, as in [middle,last]")
    if config.generate.task_index >= config.generate.num_tasks:
        raise ConfigError(
            f"generate.task_index: {config.generate.task_index} is out of bounds; "
            f"it must be below generate.num_tasks={config.generate.num_tasks}"
        )


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
