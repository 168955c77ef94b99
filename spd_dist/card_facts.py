"""What cards say of how a student came to be, by its arm and the arm's own config: who wrote, what was learnt, and how.

The words are of the settings and not of the arm's name, so that a variant's card is as true.
"""

from __future__ import annotations

from spd_dist.arms import Arm
from spd_dist.config import Config

DIVERGENCES = {
    "forward": "KL(teacher || student)",
    "reverse": "KL(student || teacher)",
    "js": "the Jensen-Shannon divergence",
}
KEPT = {
    "ended": "ended by themselves",
    "loops": "did not go in circles",
    "agreed": "gave the answer of most samples of their prompt",
}
"""By a word of `finetune.filter`, what the completions did that it leaves."""
KINDS = {"both": "keys and values", "key": "keys", "value": "values"}
HELD = ("hard", "blend", "soft")
"""Modes of `project` that hold to the subspace that was found; the others take its rank at most."""


def student_facts(arm: Arm, config: Config) -> dict[str, str]:
    """What a student's card says of its arm and its training, by row; nothing of an arm without a student.

    `arm` is an iteration, if it learns in several; `config` is the arm's own.
    """
    if not arm.trains:
        return {}
    facts = {"arm": f"{arm.name}: {arm.sentence}"}
    if arm.before is not None:
        facts["iteration"] = f"{arm.iteration[0]}, after {arm.before.name}"
    facts |= {"learnt from": learnt_from(arm, config), "loss": _loss(arm, config)}
    if arm.distils(config.finetune.loss):
        facts["teacher"] = f"the base model with its {_projected(config)}"
    if _begins_in_subspace(config):
        facts["adapters begin in"] = "a random subspace" if config.project.mode == "random" else _own(config)
    return facts | {"reference answers": _use_of_references(arm, config)}


def learnt_from(arm: Arm, config: Config) -> str:
    """The corpus of an arm's student: who wrote it, and what of it the student is given."""
    if arm.learns_from == "references":
        return "the reference answers of the calibration set, unfiltered"
    kept = [KEPT[word] for word in config.finetune.filter]
    filtered = f"filtered to those that {' and '.join(kept)}" if kept else "unfiltered"
    ended = ", those cut at the limit shortened to end in EOS" if arm.learns_from == "itself, ended" else ""
    unthinking = ", without their thoughts" if config.data.thinking == "drop" else ""
    return f"completions {written(arm, config)}, {filtered}{ended}{unthinking}"


def written(arm: Arm, config: Config) -> str:
    """What follows the word `completions` where an arm's are named: `of` whom, or what they were `drawn from`."""
    if arm.before is not None:
        return "of the student of the iteration before"
    if not arm.writes_projected:
        return "of the base model"
    beta, projected = config.generate.contrast, f"the base model with its {_projected(config)}"
    if arm.contrasts(beta):
        return f"drawn from log p + {beta:g} (log q - log p), p the base model and q {projected}"
    return f"of {projected}"


def _own(config: Config) -> str:
    if config.project.directions == "activation":
        return "the subspace of its activations' strongest directions"
    return (
        "the subspace of whole sequences' gradients" if config.calibrate.mask == "full" else "its capability subspace"
    )


def _begins_in_subspace(config: Config) -> bool:
    return (config.finetune.mode, config.finetune.lora_init) == ("lora", "spd")


def _projected(config: Config) -> str:
    """What a projection does, by `project.mode`."""
    project = config.project
    rest = f", {project.rho:g} of the rest kept" if project.rho else ""
    matched = ", blended to move it as far as the method's own does, by KL" if project.match_kl else ""
    by_mode = {
        "hard": f"held to {_own(config)}",
        "blend": f"held to {_own(config)}{rest}",
        "soft": f"weighted by the energy of each direction of {_own(config)}",
        "random": f"held to a random subspace of the same rank{rest}{matched}",
        "isotropic": "shrunk alike in every direction",
        "identity": "projected to everything, which changes nothing",
    }
    return f"{KINDS[project.kinds]} {by_mode[project.mode]}"


def _loss(arm: Arm, config: Config) -> str:
    finetune, learnt = config.finetune, "answers" if arm.learns_from == "references" else "completions"
    over = {
        "prompt_and_completion": f"prompts and {learnt}",
        "completion": f"the {learnt}",
        "thought": f"the thoughts of the {learnt}",
        "after_thought": f"what follows the thoughts of the {learnt}",
    }[finetune.loss_on]
    if arm.distils(finetune.loss):
        return f"towards the teacher's next-token distributions, by {DIVERGENCES[finetune.divergence]}, over {over}"
    return f"of the next token, over {over}"


def _use_of_references(arm: Arm, config: Config) -> str:
    if arm.learns_from == "references":
        return "what it learnt from"
    project, has_found_rank = config.project, config.project.rank_rule == "energy"
    if _begins_in_subspace(config) and (project.mode != "random" or has_found_rank):
        return "used for the subspace alone"
    is_measured = project.mode != "identity" and (has_found_rank or project.match_kl)
    is_used = arm.projects and (project.mode in HELD or is_measured)
    return "used for the projection alone" if is_used else "not used"
