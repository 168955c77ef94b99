"""What each stage's result depends on, as hashes: a stage is done once for all arms and runs that these agree for.

And what else they are given: an arm's projection, its writer, its teacher and what it begins as.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from spd_dist.arms import ARMS, Arm
from spd_dist.data.prompts import make_prompts
from spd_dist.data.tasks import Row, Task, said_by_file
from spd_dist.distributed.collectives import together
from spd_dist.errors import ConfigError
from spd_dist.inference.external.vllm_engine import site_settings
from spd_dist.inference.open_engine import choose_engine
from spd_dist.models.gguf import is_gguf
from spd_dist.models.lora import check_targets
from spd_dist.models.model_stats import meta_model
from spd_dist.models.policy import Policy, load_adapted, load_replica, load_settings, prepare_model
from spd_dist.run import Run
from spd_dist.stages.distortion import MatchSummary, blended
from spd_dist.stages.generate import prompts_folder, rendered_together
from spd_dist.stages.project import projection, with_random_directions
from spd_dist.storage.artifacts import content_hash
from spd_dist.storage.completions import corpus_name
from spd_dist.storage.records import read_record
from spd_dist.storage.settings import READ_BY
from spd_dist.storage.subspace_file import load_subspace
from spd_dist.types import Projection, Prompt, Subspace

MATCH_FILE = "match.json"


def of_subspace(run: Run, arm: Arm) -> dict[str, str]:
    """Calibration, and how the subspace is cut; in later rounds of `refit=false`, the round that it is kept from."""
    settings = run.settings(*READ_BY["project"], arm=arm)
    found = {"settings": settings, "calibration": content_hash(run.rows("calibration"))}
    return found | ({} if run.config.refit or not run.rounds_before else {"kept": str(len(run.rounds_before))})


def with_subspaces(run: Run, arms: Iterable[Arm]) -> list[Arm]:
    """One arm for each subspace that something is projected to, or that adapters begin in."""
    needing = (arm for arm in arms if arm.projects or arm.begins_in_subspace(run.config_of(arm)))
    return list({subspace_stage(run, arm): arm for arm in needing}.values())


def subspace_stage(run: Run, arm: Arm) -> str:
    """Where an arm's subspace is: at the top of the run, unless its settings make another one."""
    shared = of_subspace(run, arm) == of_subspace(run, ARMS["spd"])
    return "project" if shared else arm.stage("project")


def of_projection(run: Run, arm: Arm) -> dict[str, str]:
    """The subspace, and what is made of it; nothing for an arm that is not projected."""
    if not arm.projects:
        return {}
    found = of_whole_projection(run, arm)
    return found | ({"match": run.folder.output_hash(arm.stage("match"))} if is_matched(run, arm) else {})


def is_matched(run: Run, arm: Arm) -> bool:
    """Whether an arm's random projection is blended to the distortion of the method's own."""
    return arm.projects and run.config_of(arm).project.match_kl


def of_whole_projection(run: Run, arm: Arm) -> dict[str, str]:
    """The same, before anything is blended to equal distortion."""
    is_drawn = run.config_of(arm).project.mode == "random"
    settings = run.settings("project", *(["seed"] if is_drawn else []), arm=arm)
    return {"projection": settings, "subspace": run.folder.output_hash(subspace_stage(run, arm))}


def of_completions(run: Run, arm: Arm) -> dict[str, str]:
    """Policy, prompts, sampling and projection."""
    settings = run.settings("seed", "model", "data", "generate", arm=arm)  # `project` counts where the arm is projected
    held_to = {} if arm.is_on_policy else of_projection(run, arm)
    rows = content_hash(arm.part_of(run.rows("train")))
    return {"settings": settings, "train": rows, **held_to, **of_student_before(run, arm)}


def of_student_before(run: Run, arm: Arm) -> dict[str, str]:
    """The student that an arm goes on from; nothing in the first iteration, or the only one."""
    return {} if arm.before is None else {"student": run.folder.output_hash(arm.before.stage("finetune"))}


def of_student(run: Run, arm: Arm) -> dict[str, str]:
    """Policy, training, and what the student learns from, be it a teacher; and the arm, that its card names."""
    found = {"settings": run.settings(*READ_BY["finetune"], arm=arm), "arm": f"{arm.made_as}: {arm.learns_from}"}
    tuned = run.config_of(arm).finetune
    found |= of_projection(run, arm) | {"divergence": tuned.divergence} if tuned.loss == "distil" else {}
    if arm.begins_in_subspace(run.config_of(arm)):
        found["begins in"] = content_hash(of_whole_projection(run, arm))
    if arm.writes:
        return found | {"completions": hash_of_corpus(run, arm), **of_student_before(run, arm)}
    references = [run.settings("data", "calibrate.num_examples", arm=arm), run.rows("calibration")]
    return found | {"references": content_hash(references)}


def corpus_of_arm(run: Run, arm: Arm) -> str:
    """The file of an arm's completions, in the folder of its stage."""
    return corpus_name(len(arm.part_of(run.rows("train"))) * run.config_of(arm).generate.num_samples)


def hash_of_corpus(run: Run, arm: Arm) -> str:
    """What an arm's completions are told from others by."""
    return run.folder.output_hash(arm.stage("generate"), corpus_of_arm(run, arm))


def of_protocol(run: Run, arm: Arm | None = None) -> dict[str, str]:
    """Test set, and how it is answered, by an arm."""
    config = run.config if arm is None else run.config_of(arm)
    is_sampled = config.evaluate.temperature > 0
    settings = run.settings("model", "data", "choices", "evaluate", *(["seed"] if is_sampled else []), arm=arm)
    others = {f"test of {word}": _hash_of_test(*run.other_test(word)) for word in config.evaluate.also}
    return {"settings": settings, "test": content_hash(run.rows("test")), **others}


def _hash_of_test(task: Task, rows: Sequence[Row]) -> str:
    said = said_by_file(task)
    return content_hash([rows, said] if said else rows)


def of_answers(run: Run, arm: Arm) -> dict[str, str]:
    """Test set, protocol, and the policy that answers."""
    found = of_protocol(run, arm)
    if arm.trains:
        return found | {"student": run.folder.output_hash(arm.stage("finetune"))}
    return found | of_projection(run, arm)


def projection_of(run: Run, arm: Arm) -> Projection | None:
    """What an arm's policy is held to while it generates, or answers; a collective."""
    if not arm.projects:
        return None
    path = run.folder.folder(subspace_stage(run, arm)) / "subspace.safetensors"
    with together("reading the subspace"):
        found = projection(load_subspace(path), run.config_of(arm).project, run.config.seed)
        if not is_matched(run, arm):
            return found
        return blended(found, read_record(run.folder.folder(arm.stage("match")) / MATCH_FILE, MatchSummary).share)


def prompts_for(run: Run, arm: Arm, policy: Policy, folder: Path) -> AbstractContextManager[Sequence[Prompt]]:
    """What an arm's policy is asked, rendered by all ranks together."""
    config = run.config_of(arm)
    render = functools.partial(make_prompts, task=run.task, tokenizer=policy.tokenizer, config=config.data)
    return rendered_together(arm.part_of(run.rows("train")), render, prompts_folder(folder, config.generate), run.world)


def writer_of(run: Run, arm: Arm) -> tuple[Policy, Projection | None]:
    """The policy that writes an arm's completions, and what it is held to; a collective.

    It is the untouched one or, from the second iteration on its student, that one, held to nothing.
    """
    if not arm.is_on_policy:
        return run.policy(), projection_of(run, arm)
    start = start_of(run, arm)
    if start is None:
        return run.policy(), None
    config = run.config
    load = load_adapted if config.distributed.zero_stage == 3 else load_replica
    return run.hold_student(lambda: load(config.model, config.distributed, run.world, adapter=start)), None


def taught(run: Run, arm: Arm) -> tuple[Projection | None, Path | Subspace | None]:
    """The projection whose distributions an arm's student learns, if it does, and what it begins as; a collective."""
    teacher = projection_of(run, arm) if run.config_of(arm).finetune.loss == "distil" else None
    return teacher, subspace_to_begin_in(run, arm) or start_of(run, arm)


def subspace_to_begin_in(run: Run, arm: Arm) -> Subspace | None:
    """Of adapters that do; with `project.mode=random`, which is their control, as many random directions."""
    config = run.config_of(arm)
    if not arm.begins_in_subspace(config):
        return None
    with together("reading the subspace to begin in"):
        found = load_subspace(run.folder.folder(subspace_stage(run, arm)) / "subspace.safetensors")
        return with_random_directions(found, config.seed) if config.project.mode == "random" else found


def start_of(run: Run, arm: Arm) -> Path | None:
    """The adapter that an arm's student begins as; None for new ones."""
    return None if arm.before is None else run.folder.folder(arm.before.stage("finetune")) / "adapter"


def check_students(run: Run, arms: Iterable[Arm]) -> None:
    """See, before a model is loaded, that the adapters of every student have a place in it, and iterations prompts.

    A collective.

    A GGUF file, which is converted first, is looked at when it is loaded.

    Raises:
        UserError: no such model, or one without the targets of `finetune`.
    """
    arms = list(arms)
    most = max((arm.iteration[1] for arm in arms), default=1)
    num_prompts = len(run.rows("train")) if most > 1 else most
    if num_prompts < most:
        with together("dividing the prompts among iterations"):
            raise ConfigError(
                f"finetune.num_on_policy_iterations: {most} is not valid with {num_prompts} training prompts, "
                "of which each iteration has a part; lower it, or raise data.num_train"
            )
    tuned = [one for arm in arms if (one := run.config_of(arm).finetune).mode == "lora"]
    if not tuned or is_gguf(run.config.model.name):
        return
    prepare_model(run.config.model)
    with together("looking for the modules that get adapters"):
        model = meta_model(load_settings(run.config.model), torch.float32)
        for finetune in tuned:
            check_targets(model, finetune)


def expect_engines(run: Run, arms: Iterable[Arm]) -> None:
    """Let a vLLM engine that one arm starts serve the others, too: with every arm's sites and adapters."""
    config, arms = run.config, list(arms)
    if "vllm" not in (choose_engine(config.generate).name, config.evaluate.decoding(config.generate).engine):
        return
    tuned = [run.config_of(arm).finetune for arm in arms if arm.trains]
    found = [one for arm in arms if (one := projection_of(run, arm)) is not None]
    sites = {site_settings(site, one.insertion) for one in found for site in one.operators}
    run.engines.sites = tuple(sorted(sites))
    run.engines.lora_rank = max((one.adapter_rank for one in tuned if one.mode == "lora"), default=0)
