"""The method again and again, each round on the student of the one before, and how the subspace moves meanwhile.

Round 1 is the run folder itself; round N is `rounds/N` in it, a run folder like any other. So every round is resumed as
a run is, and more rounds can be asked for later.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

from spd_dist.config import STAGES, Config
from spd_dist.distributed.collectives import on_main
from spd_dist.distributed.world import World
from spd_dist.errors import ConfigError
from spd_dist.models.policy import load_replica
from spd_dist.pipeline import run_stages
from spd_dist.run import Run
from spd_dist.runtime.artifacts import read_json, write_json, writing
from spd_dist.runtime.subspace_file import load_subspace
from spd_dist.runtime.subspaces import overlap, principal_angles
from spd_dist.signals import StopSignals
from spd_dist.types import Subspace

SUBSPACE = "project/subspace.safetensors"
STUDENT = "finetune/model"

log = logging.getLogger(__name__)


def run_rounds(config: Config, world: World, signals: StopSignals, *, first: str, last: str) -> str:
    """Run all rounds of `config`, and give what a person wants to read at the end. A collective.

    With several rounds, `rounds.json` in the run folder holds each round's accuracies, and how far its subspace and
    energy are from those of the round before.

    Raises:
        UserError: what the user can put right.
    """
    if config.rounds == 1:
        return run_stages(config, world, signals, first=first, last=last)
    if (first, last) != (STAGES[0], STAGES[-1]):
        raise ConfigError(
            f"rounds: {config.rounds} is not valid with --from {first} --until {last}; leave them out, or set rounds=1 "
            "and give the run_dir of one round"
        )
    if "spd" not in config.evaluate.arms:
        raise ConfigError(f"rounds: {config.rounds} needs the arm that goes on; add spd to evaluate.arms")
    top, texts = Path(config.run_dir), []
    signals.also_in = top
    for number in range(1, config.rounds + 1):
        settings = config_of_round(config, number)
        if number > 1:
            _merge_student(config_of_round(config, number - 1), world)
            if not config.refit:
                _adopt_subspace(settings, top / SUBSPACE, world, signals)
        log.info("round %d of %d in %s", number, config.rounds, settings.run_dir)
        texts.append(f"Round {number}\n{run_stages(settings, world, signals, first=first, last=last)}")
    on_main("writing the report of the rounds", lambda: write_json(top / "rounds.json", describe_rounds(config)))
    return "\n\n".join([*texts, f"All rounds side by side: {top / 'rounds.json'}"])


def config_of_round(config: Config, number: int) -> Config:
    """The config of one round: its own folder, and from the second on the student before it as the model."""
    if number == 1:
        return config
    student = _folder(config, number - 1) / STUDENT
    model = dataclasses.replace(config.model, name=str(student), revision=None)
    metrics = dataclasses.replace(config.metrics, experiment=config.metrics.experiment or Path(config.run_dir).name)
    return dataclasses.replace(config, run_dir=str(_folder(config, number)), model=model, metrics=metrics)


def _folder(config: Config, number: int) -> Path:
    return Path(config.run_dir) if number == 1 else Path(config.run_dir) / "rounds" / str(number)


def _merge_student(config: Config, world: World) -> None:
    """Write a finished round's student as a model, unless it is there: its adapter merged into its base model."""
    student = Path(config.run_dir) / STUDENT
    if on_main("looking for the student of the round before", student.is_dir):
        return
    policy = load_replica(config.model, config.distributed, world, adapter=student.with_name("adapter"))
    partial = student.with_name("model.partial")

    def save() -> None:
        with writing(partial):
            shutil.rmtree(partial, ignore_errors=True)
            policy.model.save_pretrained(partial)
            policy.tokenizer.save_pretrained(partial)
            partial.rename(student)

    on_main("writing the student of the round before", save)


def _adopt_subspace(config: Config, source: Path, world: World, signals: StopSignals) -> None:
    """Give the round the subspace of the first one, as if it had estimated it."""

    def copy(folder: Path) -> None:
        for name in ("subspace.safetensors", "summary.json"):
            on_main("copying the subspace", lambda name=name: shutil.copyfile(source.parent / name, folder / name))

    run = Run(config, world, signals)
    with run.metrics:
        run.do("project", run.subspace_inputs(), ["subspace.safetensors", "summary.json"], copy)


def describe_rounds(config: Config) -> dict[str, Any]:
    """What `rounds.json` holds: each round's folder, model and accuracies, and the drift from the round before."""
    rounds: list[dict[str, Any]] = []
    before: Subspace | None = None
    for number in range(1, config.rounds + 1):
        settings, folder = config_of_round(config, number), _folder(config, number)
        path = folder / SUBSPACE
        found = load_subspace(path) if path.exists() else None  # arms without a projection estimate none
        described = {"round": number, "folder": str(folder), "model": settings.model.name}
        described["arms"] = read_json(folder / "evaluate" / "summary.json")
        if found is not None and before is not None:
            described["drift"] = drift(before, found)
        rounds.append(described)
        before = found
    return {"refit": config.refit, "rounds": rounds}


def drift(before: Subspace, after: Subspace) -> dict[str, dict[str, float]]:
    """How far each site's subspace moved: principal angles in radians, and the gradients' energy."""
    moved = {}
    for site, old in before.sites.items():
        new = after.sites[site]
        angle_R = principal_angles(old, new)
        moved[str(site)] = {
            "mean_angle_radians": angle_R.mean().item(),
            "largest_angle_radians": angle_R.max().item(),
            "overlap_fraction": overlap(old, new),
            "energy_ratio": new.certificate.energy / old.certificate.energy,
            "energy_fraction_change": new.energy_fraction - old.energy_fraction,
        }
    return moved
