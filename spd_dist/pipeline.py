"""The method on one page: calibrate -> sketch -> reduce -> project -> generate -> finetune -> evaluate.

The first four stream into one artifact. A stage is skipped if its folder is complete and made from the same inputs.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from spd_dist.arms import Arm, chosen
from spd_dist.config import STAGES, Config
from spd_dist.data.prompts import make_examples, make_prompts
from spd_dist.distributed.collectives import on_main, together
from spd_dist.distributed.world import World
from spd_dist.models.kv_sites import discover_sites
from spd_dist.run import Run
from spd_dist.runtime.artifacts import content_hash, write_json
from spd_dist.runtime.completions import read_completions
from spd_dist.runtime.subspace_file import load_subspace, save_subspace
from spd_dist.signals import StopSignals
from spd_dist.stages.calibrate import calibrate
from spd_dist.stages.evaluate import evaluate_arm, is_answered, summary_of
from spd_dist.stages.finetune import Job, finetune
from spd_dist.stages.generate import generate, settings_of
from spd_dist.stages.project import projection, subspace, summary
from spd_dist.stages.reduce import reduce
from spd_dist.stages.sketch import plan_sketches, sketch
from spd_dist.types import Projection


def run_stages(config: Config, world: World, signals: StopSignals, *, first: str, last: str) -> str:
    """Run the stages from `first` to `last`, and give what a person wants to read at the end. A collective.

    Raises:
        UserError: what the user can put right, such as a stage before `first` that is not complete.
    """
    stages = STAGES[STAGES.index(first) : STAGES.index(last) + 1]
    arms = chosen(config.evaluate.arms)
    students = [arm for arm in arms if arm.trains]
    run = Run(config, world, signals, first=first, last=last)
    with run.metrics:
        if any(arm.projects for arm in arms):
            find_subspace(run, wanted=first in STAGES[:4])
        for arm in students if last in STAGES[4:] else []:
            write_completions(run, arm, wanted="generate" in stages)
        for arm in students if last in STAGES[5:] else []:
            train_student(run, arm, wanted="finetune" in stages)
        if last == "evaluate":
            return evaluate_arms(run, arms)
        return f"{config.run_dir}: complete up to {last}"


def find_subspace(run: Run, *, wanted: bool) -> None:
    """Calibrate, sketch, reduce and project: stream gradients into one subspace."""
    config, world, rows = run.config, run.world, run.rows("calibration")

    def work(folder: Path) -> None:
        policy = run.policy()
        with together("finding the supervised tokens and the sites"):
            examples, audit = make_examples(rows, run.task, policy.tokenizer, config.data, config.calibrate)
            sites = discover_sites(policy.model, config.calibrate.layers, whole_keys=config.project.insertion == "rope")
        num_shards = config.calibrate.num_shards
        own = sum(index % num_shards % world.size == world.rank for index in range(len(examples)))
        with run.progress("calibrate", own, "examples") as progress:
            gradients = calibrate(policy, examples, sites, config.calibrate, world, progress=progress)
            shards = {"num_shards": num_shards, "planned_rank": config.project.planned_rank}
            sketches = sketch(gradients, sites, config.sketch, **shards, world=world)
        moments = reduce(sketches, sites, config.reduce, num_shards=num_shards, world=world)
        metadata = {"base_model": policy.name, "base_fingerprint": policy.fingerprint, "config_hash": run.settings()}
        found = subspace(moments, sites, config.project, world, metadata=metadata)
        sizes = {width: plan.size for width, plan in plan_sketches(sites, config.sketch, **shards).items()}
        described = summary(found, sketch_sizes=sizes) | {"masks": dataclasses.asdict(audit)}
        on_main("writing the subspace", lambda: save_subspace(folder / "subspace.safetensors", found))
        on_main("writing the subspace's summary", lambda: write_json(folder / "summary.json", described))

    run.do("project", run.subspace_inputs(), ["subspace.safetensors", "summary.json"], work, wanted=wanted)


def write_completions(run: Run, arm: Arm, *, wanted: bool) -> None:
    """Let the policy answer the training prompts, under the projection if the arm has one."""
    config, rows = run.config, run.rows("train")

    def work(folder: Path) -> dict[str, Any]:
        policy = run.policy()
        with together("rendering the training prompts"):
            prompts = make_prompts(rows, run.task, policy.tokenizer, config.data)
        total = len(prompts) * config.generate.num_samples
        with run.progress("generate", total // run.world.size, "completions", arm) as progress:
            return generate(
                policy, prompts, _projection(run, arm), settings_of(arm.name, config.generate),
                seed=config.seed, folder=folder, world=run.world, progress=progress,
            )  # fmt: skip

    inputs = {"settings": run.settings("model", "data", "project", "generate"), "train": content_hash(rows)}
    inputs |= {"subspace": run.folder.output_hash("project")} if arm.projects else {}
    run.do(arm.stage("generate"), inputs, ["completions", "summary.json"], work, wanted=wanted)


def train_student(run: Run, arm: Arm, *, wanted: bool) -> None:
    """Fine-tune the untouched policy on the arm's completions."""
    config = run.config

    def work(folder: Path) -> dict[str, Any]:
        policy = run.policy()
        with together("reading the completions"):
            completions = read_completions(run.folder.folder(arm.stage("generate")) / "completions")
        job = Job(
            folder, config.seed, run.world, config.distributed, run.should_stop, run.metrics_of(arm),
            config.metrics.progress_seconds, run.facts_of(arm),
        )  # fmt: skip
        outcome = finetune(policy, completions, config.finetune, job)
        if config.finetune.mode == "full":
            run.release_policy()
        on_main("writing the summary of the student", lambda: write_json(folder / "summary.json", outcome))
        return outcome

    inputs = {"settings": run.settings("model", "finetune")}
    inputs |= {"completions": run.folder.output_hash(arm.stage("generate"))}
    outputs = ["adapter" if config.finetune.mode == "lora" else "model", "summary.json"]
    run.do(arm.stage("finetune"), inputs, outputs, work, wanted=wanted)


def evaluate_arms(run: Run, arms: list[Arm]) -> str:
    """Let every arm answer the held-out examples, greedily, under one protocol."""
    config = run.config

    def work(folder: Path) -> None:
        test_set, summaries = run.test_set(), {}
        for arm in arms:
            if is_answered(folder, arm.name, test_set):
                summaries[arm.name] = {run.task.name: summary_of(folder, arm.name, test_set)}
                continue
            run.stop_if_asked()
            with run.progress("evaluate", None, "answers", arm) as progress:
                answered = evaluate_arm(
                    run.policy_of(arm, test_set), test_set, config.evaluate, arm=arm.name, folder=folder,
                    world=run.world, projection=None if arm.trains else _projection(run, arm), progress=progress,
                )  # fmt: skip
            summaries[arm.name] = {run.task.name: answered}
        on_main("writing the summary of the answers", lambda: write_json(folder / "summary.json", summaries))

    inputs = {"settings": run.settings("model", "data", "project", "evaluate"), "test": content_hash(run.rows("test"))}
    for arm in arms:
        stage = arm.stage("finetune") if arm.trains else "project" if arm.projects else None
        inputs |= {} if stage is None else {arm.name: run.folder.output_hash(stage)}
    run.do("evaluate", inputs, ["summary.json", *(arm.name for arm in arms)], work)
    run.release_policy()
    return run.report(arms)


def _projection(run: Run, arm: Arm) -> Projection | None:
    if not arm.projects:
        return None
    with together("reading the subspace"):
        found = load_subspace(run.folder.folder("project") / "subspace.safetensors")
        return projection(found, run.config.project, run.config.seed)
