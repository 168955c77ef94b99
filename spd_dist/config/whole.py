"""A run, and an experiment of a run a seed, whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from spd_dist.config.sections import (
    Calibrate,
    Choices,
    Data,
    Distributed,
    Evaluate,
    Finetune,
    Generate,
    Mechanism,
    Metrics,
    Model,
    Project,
    Reduce,
    Sketch,
    setting,
)


@dataclass(frozen=True)
class Config:
    """A run."""

    run_dir: str = setting("runs/spd", "the run's folder: artifacts, metrics, report")
    seed: int = setting(42, "of every generator", at_least=0)
    rounds: int = setting(1, "times the method is done, each on the student of the one before", at_least=1)
    refit: bool = setting(True, "rounds: estimate the subspace anew in each, instead of once")
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    calibrate: Calibrate = field(default_factory=Calibrate)
    sketch: Sketch = field(default_factory=Sketch)
    reduce: Reduce = field(default_factory=Reduce)
    project: Project = field(default_factory=Project)
    generate: Generate = field(default_factory=Generate)
    finetune: Finetune = field(default_factory=Finetune)
    choices: Choices = field(default_factory=Choices)
    evaluate: Evaluate = field(default_factory=Evaluate)
    mechanism: Mechanism = field(default_factory=Mechanism)
    distributed: Distributed = field(default_factory=Distributed)
    metrics: Metrics = field(default_factory=Metrics)

    def section(self, name: str) -> Mapping[str, Any]:
        """One section as plain data, for hashes and manifests."""
        return dataclasses.asdict(getattr(self, name))


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
