"""The method on one page: calibrate -> sketch -> reduce -> project -> generate -> finetune -> evaluate.

The first four stream into one artifact. A stage is skipped if its folder is complete and made from the same inputs.
Arms differ in a few settings (`spd_dist.arms`); what two of them have in common is done once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from spd_dist import stage_inputs
from spd_dist.analysis.answer_summary import AnswersSummary
from spd_dist.arms import Arm, chosen, iterations_of
from spd_dist.config import STAGES, Config
from spd_dist.data.prompts import make_examples
from spd_dist.distributed.collectives import together
from spd_dist.distributed.uneven_work import on_main
from spd_dist.models.kv_sites import discover_sites
from spd_dist.reports.run_end import report
from spd_dist.run import Run
from spd_dist.side_stages.matched_control import match_controls
from spd_dist.side_stages.token_effects import write_token_effects
from spd_dist.stages.calibrate import calibrate, moments_to_rank
from spd_dist.stages.evaluate import evaluate_arm
from spd_dist.stages.finetune import StudentSummary, finetune
from spd_dist.stages.generate import CorpusSummary, generate
from spd_dist.stages.project import drift, site_summaries, subspace
from spd_dist.stages.reduce import reduce
from spd_dist.stages.sketch import ShardPlan, Unfinished, plan_sketches, sketch
from spd_dist.storage.records import write_record
from spd_dist.storage.subspace_file import SubspaceSummary, load_subspace, write_subspace
from spd_dist.student_corpus import corpus_of, filtered_files
from spd_dist.types import KVSite, SiteMoments, SupervisedExample


def run_stages(run: Run) -> str:
    """Run the stages and arms of `run.scope`, and give what a person wants to read at the end. A collective.

    Raises:
        UserError: what the user can put right, such as a stage before `first` that is not complete.
    """
    first, last, only = run.scope.first, run.scope.last, run.scope.only
    stages = STAGES[STAGES.index(first) : STAGES.index(last) + 1]
    arms = chosen(only or run.config.evaluate.arms)
    students = [each for arm in arms if arm.trains for each in iterations_of(arm, run.config_of(arm))]
    writers = [arm for arm in arms if arm.writes and not arm.is_on_policy]
    with run.opened():
        stage_inputs.check_students(run, students if last in STAGES[5:] else [])
        for arm in stage_inputs.with_subspaces(run, arms):
            find_subspace(run, arm, wanted=first in STAGES[:4])
        match_controls(run, arms if last in STAGES[4:] else [])
        stage_inputs.expect_engines(run, arms if last in STAGES[4:] else [])
        for arm in writers if last in STAGES[4:] else []:
            write_completions(run, arm, wanted="generate" in stages)
        for arm in students if last in STAGES[5:] else []:
            for do in (write_completions, train_student) if arm.is_on_policy else (train_student,):
                do(run, arm, wanted="finetune" in stages)
        if last == "evaluate" and not only and run.scope.scores_tokens:
            write_token_effects(run, arms)
        for arm in arms if last == "evaluate" else []:
            answer(run, arm)
        if last == "evaluate" and not only:
            return report(run, arms)
        return f"{run.folder.path}: {', '.join(only) or 'all arms'} complete up to {last}"


def find_subspace(run: Run, arm: Arm, *, wanted: bool) -> None:
    """Calibrate, sketch, reduce and project: stream gradients into one subspace."""
    config, stage, rows = run.config_of(arm), stage_inputs.subspace_stage(run, arm), run.rows("calibration")
    made = stage_inputs.of_subspace(run, arm)

    def work(folder: Path) -> None:
        policy, by = run.policy(), config.project.directions
        with together("finding the supervised tokens and the sites"):
            examples, audit = make_examples(rows, run.task, policy.tokenizer, config.data, config.calibrate)
            sites = discover_sites(policy.model, config.calibrate.layers, whole_keys=config.project.insertion == "rope")
            earlier = {number: load_subspace(path / "subspace.safetensors") for number, path in run.earlier(stage)}
        shards, planned_rank = config.calibrate.num_shards, config.project.planned_rank
        plans = plan_sketches(sites, config.sketch, planned_rank=planned_rank, num_shards=shards)
        key = (config.calibrate, config.reduce, config.sketch.non_finite, tuple(plans.items()))
        # Before the other pass, which a stop in this one would lose.
        other = moments_to_rank(by, policy, examples, sites, config.calibrate, run.context(folder))
        moments = run.memoize(key, lambda: sum_moments(run, config, examples, sites, folder))
        names = {"base_model": policy.name, "base_fingerprint": policy.fingerprint, "config_hash": made["settings"]}
        found = subspace(moments, sites, config.project, run.world, metadata=names, other=other)
        moved = drift(moments, found, earlier, config.project, run.world)
        found = found if config.refit or not earlier else earlier[min(earlier)]
        numbers = site_summaries(found, sketch_sizes={width: plan.size for width, plan in plans.items()})
        described = SubspaceSummary(dataclasses.asdict(audit), moved, found.metadata, numbers)
        on_main("writing the subspace", lambda: write_subspace(folder, found, described))

    run.run_stage(stage, made, ["subspace.safetensors", "summary.json"], work, wanted=wanted)


def sum_moments(
    run: Run, config: Config, examples: Sequence[SupervisedExample], sites: Sequence[KVSite], folder: Path
) -> Mapping[KVSite, SiteMoments]:
    """The second moments of all gradient rows, of the sites that this rank owns."""
    calibrating, shards = config.calibrate, config.calibrate.num_shards
    left = Unfinished(folder / "unfinished", shards, run.world)
    with run.progress("calibrate", len(examples), "examples") as progress, left:
        context = run.context(folder, progress=progress)
        gradients = calibrate(run.policy(), examples, sites, calibrating, context, taken=left.num_taken)
        plan = ShardPlan(shards, config.project.planned_rank, left.shards, left.keep)
        sketches = sketch(gradients, sites, config.sketch, run.world, plan)
    return reduce(sketches, sites, config.reduce, num_shards=shards, world=run.world)


def write_completions(run: Run, arm: Arm, *, wanted: bool) -> None:
    """Let the policy answer the training prompts, under the projection if the arm has one; or the arm's student."""
    config = run.config_of(arm)
    total = len(arm.part_of(run.rows("train"))) * config.generate.num_samples

    def work(folder: Path) -> CorpusSummary:
        policy, projected = stage_inputs.writer_of(run, arm)
        rendered = stage_inputs.prompts_for(run, arm, policy, folder)
        with rendered as prompts, run.progress("generate", total // run.world.size, "completions", arm) as progress:
            return generate(policy, prompts, projected, config.generate, run.context(folder, arm, progress))

    made_from, outputs = stage_inputs.of_completions(run, arm), [stage_inputs.corpus_of_arm(run, arm), "summary.json"]
    run.run_stage(arm.stage("generate"), made_from, outputs, work, wanted=wanted)


def train_student(run: Run, arm: Arm, *, wanted: bool) -> None:
    """Fine-tune the untouched policy, or the student of the iteration before, on what the arm learns from."""
    config = run.config_of(arm)

    def work(folder: Path) -> StudentSummary:
        run.engines.close()
        policy = run.policy()
        corpus, teacher, start = corpus_of(run, arm, policy, folder), *stage_inputs.taught(run, arm)
        outcome = finetune(policy, corpus, config.finetune, run.context(folder, arm), teacher, start=start)
        if config.finetune.mode == "full":
            run.release_policy()
        on_main("writing its summary", lambda: write_record(folder / "summary.json", outcome))
        return outcome

    outputs = ["adapter" if config.finetune.mode == "lora" else "model", "summary.json", *filtered_files(run, arm)]
    run.run_stage(arm.stage("finetune"), stage_inputs.of_student(run, arm), outputs, work, wanted=wanted)


def answer(run: Run, arm: Arm) -> None:
    """Let an arm answer the held-out examples, greedily: its student, or the untouched policy, projected or not."""
    others = run.config.evaluate.also

    def work(folder: Path) -> AnswersSummary:
        tests = [run.test_set(word) for word in (None, *others)]
        config, policy, summaries = run.config_of(arm).evaluate, None, []
        for test in tests:
            with run.progress("evaluate", None, "answers", arm) as progress:
                context = run.context(folder.parent, arm, progress)
                policy = policy or run.policy_of(arm, max(tests, key=lambda one: one.longest))
                held_to = None if arm.trains else stage_inputs.projection_of(run, arm)
                summaries.append(evaluate_arm(policy, test, config, context, arm=arm.name, projection=held_to))
        return summaries[0]

    answers = [f"{task.name}.jsonl" for task in (run.task, *(run.other_test(word)[0] for word in others))]
    run.run_stage(f"evaluate/{arm.name}", stage_inputs.of_answers(run, arm), answers, work)
