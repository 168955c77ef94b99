"""The method again and again, each round on the student of the one before, and how the subspace moves meanwhile.

Round 1 is the run folder itself; round N is `rounds/N` in it, a run folder like any other. So every round is resumed as
a run is, and more rounds can be asked for later.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch

from spd_dist.arms import Arm, Scope, chosen, iterations_of
from spd_dist.config import STAGES, Config
from spd_dist.distributed.collectives import together
from spd_dist.distributed.uneven_work import on_main
from spd_dist.distributed.world import World
from spd_dist.errors import ConfigError
from spd_dist.models.lora import load_adapter, merged_tensors, remove_adapters
from spd_dist.models.policy import Policy, load_policy, resolve_dtype
from spd_dist.models.save_weights import save_model
from spd_dist.pipeline import run_stages
from spd_dist.process.signals import StopSignals
from spd_dist.process.stopping import watch
from spd_dist.reports.page import Questions
from spd_dist.reports.rounds_report import add_rounds, rounds_text
from spd_dist.reports.run_end import questions_of
from spd_dist.run import Run
from spd_dist.tracking.progress import RunPart

log = logging.getLogger(__name__)

STUDENT = "finetune/model"


def run_rounds(config: Config, world: World, signals: StopSignals, scope: Scope) -> str:
    """Run all rounds of `config`, and give what a person wants to read at the end. A collective.

    The report in the run folder then holds each round's arms, and how far its subspace and energy moved.

    Raises:
        UserError: what the user can put right.
    """
    if config.rounds > 1:
        _check(config, scope.first, scope.last)
        _check_dtype(config, world)
    texts, places = [], folders(config)
    questions = Questions({})
    watch(signals, places[0])
    with ExitStack() as whole:
        for number in range(1, config.rounds + 1):
            if number > 1:
                _merge_student(config_of_round(config, number - 1), world)
                log.info("round %d of %d in %s", number, config.rounds, places[number - 1])
            before = places[: number - 1]
            run = Run(config_of_round(config, number), world, signals, scope, rounds_before=before)
            if number == 1:
                whole.enter_context(run.kept_status())
            arms = chosen(scope.only or run.config.evaluate.arms)
            parts = {each: run.config_of(each) for arm in arms for each in iterations_of(arm, run.config_of(arm))}
            run.estimate.expect(parts_of(run.config, parts, world.size, scope.last))
            texts.append(run_stages(run))
            questions = questions_of(run, arms) if number == config.rounds > 1 else questions
        if config.rounds == 1:
            return texts[0]
        found = on_main("writing the report of the rounds", lambda: add_rounds(places, questions))
    return "\n\n".join([*(f"Round {number}\n{text}" for number, text in enumerate(texts, 1)), rounds_text(found)])


def _check(config: Config, first: str, last: str) -> None:
    if (first, last) != (STAGES[0], STAGES[-1]):
        raise ConfigError(
            f"rounds: {config.rounds} is not valid with --from {first} --until {last}; leave them out, or set rounds=1 "
            "and give the run_dir of one round"
        )
    if "spd" not in config.evaluate.arms:
        raise ConfigError(f"rounds: {config.rounds} needs the arm that goes on; add spd to evaluate.arms")


def _check_dtype(config: Config, world: World) -> None:
    dtype = resolve_dtype(config.model.dtype, world.device)
    if dtype != torch.float32 and config.finetune.mode == "lora":
        raise ConfigError(
            f"rounds: {config.rounds} is not valid with model.dtype={config.model.dtype}, here {dtype}: the next round "
            "starts from the student's merged weights, and rounding would take most of its update away; set "
            "model.dtype=float32, or finetune.mode=full"
        )


def _merge_student(config: Config, world: World) -> None:
    """Write a finished round's student as a model, unless it is there: its adapter merged into its base model."""
    student = Path(config.run_dir) / STUDENT
    if not on_main("looking for the student of the round before", student.is_dir):
        policy = load_policy(config.model, config.distributed, world)
        write_merged(policy, student.with_name("adapter"), student, world)


def config_of_round(config: Config, number: int) -> Config:
    """The config of one round: its own folder, and from the second on the student before it as the model."""
    if number == 1:
        return config
    *_, before, own = folders(config)[:number]
    model = dataclasses.replace(config.model, name=str(before / STUDENT), revision=None)
    metrics = dataclasses.replace(config.metrics, experiment=config.metrics.experiment or Path(config.run_dir).name)
    return dataclasses.replace(config, run_dir=str(own), model=model, metrics=metrics)


def folders(config: Config) -> list[Path]:
    """The folders of all rounds."""
    top = Path(config.run_dir)
    return [top, *(top / "rounds" / str(number) for number in range(2, config.rounds + 1))]


TRAINED_OVER_CALIBRATED = 2.0
"""A training example takes a forward and a backward pass, a calibration example a forward and half a backward pass."""


def parts_of(config: Config, arms: Mapping[Arm, Config], num_ranks: int, last: str = STAGES[-1]) -> list[RunPart]:
    """The stages of a run up to `last`, of all arms and their iterations, each with the config that is its own.

    Until they have a pace of their own, arms answer as they generate.
    Arms with a subspace of their own calibrate again, which is not counted: it is short beside the rest.
    """
    is_training = STAGES.index(last) >= STAGES.index("finetune")
    num_test = config.data.num_test  # None is all that there are, not read yet
    parts = [RunPart("project", "calibrate", config.calibrate.num_examples / num_ranks)]
    for arm, own in arms.items():
        num, batch = _num_learned(arm, own), own.finetune.global_batch_size
        if arm.writes and (is_training or not arm.is_on_policy):
            parts.append(RunPart(arm.stage("generate"), "generate", None if num is None else num / num_ranks))
        if arm.trains:
            steps = None if num is None else -(-num // batch) * own.finetune.num_epochs
            calibrated = TRAINED_OVER_CALIBRATED * batch / num_ranks
            parts.append(RunPart(arm.stage("finetune"), "finetune", steps, "calibrate", calibrated))
        if arm.is_last_iteration:
            num_answers = None if num_test is None else num_test * own.evaluate.num_samples / num_ranks
            parts.append(RunPart(f"evaluate/{arm.name}", "evaluate", num_answers, "generate"))
    once = {part.folder: part for part in parts}.values()  # arms that differ in `evaluate` alone share their student
    of_stages = sorted(once, key=lambda part: STAGES.index(part.stage))
    return [part for part in of_stages if STAGES.index(part.stage) <= STAGES.index(last)]


def _num_learned(arm: Arm, config: Config) -> int | None:
    """Completions or references that a student learns from, if nothing is filtered; None while nobody counted rows."""
    if arm.learns_from == "references":
        return config.calibrate.num_examples
    num_train = config.data.num_train
    return None if num_train is None else len(arm.part_of(range(num_train))) * config.generate.num_samples


def write_merged(policy: Policy, adapter: Path, folder: Path, world: World) -> None:
    """Write `policy` with `adapter` merged in, as transformers reads it; `policy` is as it was, but released.

    Weights are gathered and written one at a time, so that no rank holds the whole model. A collective.

    Raises:
        DataError: the disk is full.
    """
    policy.release()
    partial = folder.with_name(f"{folder.name}.partial")
    with together("loading the adapter"):
        adapted = load_adapter(policy.model, adapter)
    on_main("making room for the merged student", lambda: shutil.rmtree(partial, ignore_errors=True))
    save_model(policy.model, merged_tensors(adapted), partial, world=world)
    remove_adapters(adapted)

    def publish() -> None:
        policy.tokenizer.save_pretrained(partial)
        partial.rename(folder)

    on_main(f"saving {folder}", publish)
