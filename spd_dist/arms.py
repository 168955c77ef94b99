"""The arms of a comparison, one a row: what each learns from, and the few settings that it has for its own."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from spd_dist.config import STAGES, Config, engine_of
from spd_dist.errors import ConfigError

Corpus = Literal["nothing", "itself", "itself, ended", "its student", "references"]
"""What an arm is fine-tuned on: its own completions, those cut to end in EOS, those of the student that it is becoming,
or the calibration set's answers."""

R = TypeVar("R")
MAY_VARY = ("calibrate", "sketch", "reduce", "project", "generate", "finetune", "evaluate")
RANK_RULES = {"rank": "fixed", "fraction": "fraction", "energy": "energy"}
"""A variant that names one of these keys means the rule, too."""


@dataclass(frozen=True)
class Arm:
    """How one arm's policy comes to be."""

    name: str
    learns_from: Corpus
    projects: bool
    """Whether the projected policy writes its completions (its answers, if it learns from nothing), or teaches it."""
    sentence: str
    settings: tuple[str, ...] = ()
    """Overrides of the run's config, for this arm alone."""
    iteration: tuple[int, int] = (1, 1)
    """Of an arm that learns from its student: which of its iterations this is, and of how many."""
    before: Arm | None = None
    """The iteration before it, whose student writes, and goes on learning."""
    whole: str = ""
    """Of an iteration: the name of the arm, under which the subspace lies that its iterations share."""

    @property
    def trains(self) -> bool:
        """Whether there is a student, and not the untouched model."""
        return self.learns_from != "nothing"

    @property
    def writes(self) -> bool:
        """Whether it needs completions of its own."""
        return self.learns_from.startswith("itself") or self.is_on_policy

    @property
    def is_on_policy(self) -> bool:
        """Whether its student writes the completions, in iterations, unprojected: the teacher alone is projected."""
        return self.learns_from == "its student"

    @property
    def is_last_iteration(self) -> bool:
        """Whether its student is the arm's: of one that learns in no iterations it is."""
        return self.iteration[0] == self.iteration[1]

    @property
    def writes_projected(self) -> bool:
        """Whether the policy is held to the projection while it writes, or answers."""
        return self.projects and not self.is_on_policy

    @property
    def made_as(self) -> str:
        """Its name without what it changes of `evaluate`: arms of one such name share all but their answers."""
        return _made_as(self.name)

    def part_of(self, rows: Sequence[R]) -> Sequence[R]:
        """The training rows that it writes to: all of them, or every n-th in each of n iterations."""
        number, count = self.iteration
        return rows if count == 1 else rows[number - 1 :: count]

    def distils(self, loss: str) -> bool:
        """Whether its student learns a teacher's distributions, in a run with this `finetune.loss`."""
        return self.trains and (self.own("finetune.loss") or loss) == "distil"

    def contrasts(self, beta: float) -> bool:
        """Whether its completions take two passes a token, in a run with this `generate.contrast`."""
        return self.trains and self.writes_projected and float(self.own("generate.contrast") or beta) != 1

    def begins_in_subspace(self, config: Config) -> bool:
        """Whether its adapters do, those of its first iteration, with its own `config`."""
        tuned = config.finetune
        return self.trains and self.before is None and (tuned.mode, tuned.lora_init) == ("lora", "spd")

    def own(self, key: str) -> str | None:
        """The value of a setting, as it is written, that this arm has for its own; None if it has the run's."""
        words = [word.partition("=") for word in self.settings]
        return next((value for name, _, value in reversed(words) if name == key), None)

    def stage(self, verb: str) -> str:
        """The folder of one of its stages: the method's own arm at the top of the run, the others beside each other."""
        made_as = _made_as(self.whole) if self.whole and verb in SHARED else self.made_as
        return verb if made_as == "spd" else f"arms/{made_as}/{verb}"


SHARED = ("project", "match")
"""Stages that the iterations of an arm have in common."""


def _made_as(name: str) -> str:
    base, *changes = name.split("@")
    return "@".join([base, *(change for change in changes if not change.startswith("evaluate."))])


SSD = (
    "generate.temperature=${generate.ssd_temperature}",
    "generate.top_p=${generate.ssd_top_p}",
    "generate.top_k=${generate.ssd_top_k}",
    "generate.min_p=0.0",
)

SSD_KEYS = ("generate.ssd_temperature", "generate.ssd_top_p", "generate.ssd_top_k")

RANDOM = "project.mode=random"
MATCHED = (RANDOM, "project.match_kl=true")
DISTIL = ("finetune.loss=distil",)
CONTRAST = ("generate.contrast=2",)
ON_POLICY = (*DISTIL, "finetune.divergence=reverse", "generate.num_tasks=1", "generate.task_index=0")
FILTERED = ("generate.num_samples=4", "finetune.filter=[ended,loops,agreed]")

ARMS = {
    arm.name: arm
    for arm in (
        Arm("base", "nothing", False, "the untouched model"),
        Arm("psr", "itself", False, "plain self-retraining: no projection"),
        Arm("ssd", "itself", False, "simple self-distillation: arXiv 2604.01193's sampling", SSD),
        Arm("spd", "itself", True, "self-policy distillation"),
        Arm("projected", "nothing", True, "the projected model itself, not fine-tuned"),
        Arm("random", "itself", True, "control: a random subspace of the same rank", (RANDOM,)),
        Arm("spd_distil", "itself", True, "as spd, towards the projected policy's distributions", DISTIL),
        Arm("random_distil", "itself", True, "control: as spd_distil, random at equal KL", (*MATCHED, *DISTIL)),
        Arm("spd_contrast", "itself", True, "as spd, from twice the projection's change of log p", CONTRAST),
        Arm("random_contrast", "itself", True, "control: the same, random at equal KL", (*MATCHED, *CONTRAST)),
        Arm("spd_onpolicy", "its student", True, "its student's samples, towards the projected policy", ON_POLICY),
        Arm("random_onpolicy", "its student", True, "control: the same, random at equal KL", (*MATCHED, *ON_POLICY)),
        Arm("filtered", "itself", True, "as spd, of 4 samples those that end, loop not and agree", FILTERED),
        Arm("identity", "itself", True, "control: projected to everything", ("project.mode=identity",)),
        Arm("full", "itself", True, "control: the gradient of the whole sequence", ("calibrate.mask=full",)),
        Arm("activation", "itself", True, "control: activation-PCA, no gradient", ("project.directions=activation",)),
        Arm("termination", "itself, ended", False, "control: as psr, every completion cut to end in EOS"),
        Arm("supervised", "references", False, "control: fine-tuned on the calibration set's answers"),
    )
}  # fmt: skip


def chosen(names: Iterable[str]) -> list[Arm]:
    """The arms of `evaluate.arms`, in their order.

    Raises:
        ConfigError: none, an unknown one, one twice, or a variant of what all arms share.
    """
    names = list(names)
    arms = [_arm(name) for name in names]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if not arms or repeated is not None:
        what = "an empty list" if repeated is None else f"{repeated} twice"
        raise ConfigError(f"evaluate.arms: {what} is not valid; name each arm once, as in [base,psr,spd]")
    return arms


def iterations_of(arm: Arm, config: Config) -> list[Arm]:
    """The iterations in which an arm learns, each an arm of its own: on its student several, else one.

    `config` is the arm's. The last iteration has the arm's name and place.
    """
    count = config.finetune.num_on_policy_iterations if arm.is_on_policy else 1
    iterations: list[Arm] = []
    for number in range(1, count + 1):
        name, at, changes = arm.name.partition("@")
        own = arm.name if number == count else f"{name}_iteration{number}{at}{changes}"
        before = iterations[-1] if iterations else None
        iterations.append(dataclasses.replace(arm, name=own, iteration=(number, count), before=before, whole=arm.name))
    return iterations


def check_on_policy(arm: Arm, config: Config) -> None:
    """See that an arm can learn from its student's samples, from iteration to iteration, with the arm's own `config`.

    Raises:
        ConfigError: it has no teacher, or no adapter to go on from, or an engine that cannot take each iteration's.
    """
    finetune, generate = config.finetune, config.generate
    engine = engine_of(generate.engine, generate.vllm_python, generate.command)
    in_vllm = "hf, since vLLM serves no such adapter"
    wrong = {
        "finetune.loss": finetune.loss != "distil" and "distil, since the projection is its teacher's alone",
        "finetune.mode": finetune.mode != "lora" and "lora, since each iteration goes on from the adapter before",
        "generate.engine": (
            engine == "server" and "hf, since no server has the adapter of an iteration that is to come"
        )
        or (engine == "vllm" and (finetune.lora_variant == "dora" or bool(finetune.lora_parameters)) and in_vllm),
        "generate.command": engine == "command"
        and "{adapter}" not in str(generate.command)
        and "a template with {adapter}, the folder of the iteration before",
    }
    for key, rule in wrong.items():
        if rule:
            raise ConfigError(f"{key}: the arm {arm.name}, which learns from its student's samples, needs {rule}")


def check_changes(arm: Arm, config: Config) -> None:
    """See that each setting that an arm's name changes has an effect on it, with the arm's own `config`.

    Raises:
        ConfigError: one has none, so that the arm would be trained and shown as a variant that it is not.
    """
    for change in arm.name.split("@")[1:]:
        key, _, value = _words(arm.name, change)[-1].partition("=")
        if why := _why_unread(arm, config, key):
            what = f"{arm.name!r} is not a variant: {key}={value} changes nothing in it"
            raise ConfigError(f"evaluate.arms: {what}, since {why}, or leave it out")


def _why_unread(arm: Arm, config: Config, key: str) -> str | None:
    """Why a setting has no effect on an arm, and what to write instead; None if it has one."""
    loss, mode = config.finetune.loss, config.project.mode
    unprojected = "it has no projection; vary an arm that has, as spd"
    is_of_references = arm.learns_from == "references" and key == "calibrate.num_examples"
    subspace = (arm.projects or arm.begins_in_subspace(config) or is_of_references, unprojected)
    keeps_share = arm.projects and mode in ("blend", "random", "isotropic")
    of_all = ("also", "arms", "temperatures", "num_coloured", "allow_code_execution")
    reads = {
        **dict.fromkeys(("calibrate", "sketch", "reduce", "project"), subspace),
        **dict.fromkeys(("project.kinds", "project.match_kl"), (arm.projects, unprojected)),
        "project.rho": (keeps_share, f"mode={mode} keeps none; add @mode=blend" if arm.projects else unprojected),
        "generate": (arm.writes, "it writes no completions; vary an arm that does, as spd"),
        "generate.contrast": (arm.writes_projected, "no projected policy writes its completions; vary spd"),
        **dict.fromkeys(SSD_KEYS, (arm.settings[: len(SSD)] == SSD, "ssd alone samples by it; write it without ssd_")),
        "finetune": (arm.trains, "it is not fine-tuned; vary an arm that is, as spd"),
        "finetune.filter": (arm.writes, "it writes no completions to leave out; vary an arm that does, as spd"),
        "finetune.divergence": (loss == "distil", f"its loss is {loss}; add @finetune.loss=distil, if it is projected"),
        "finetune.num_on_policy_iterations": (arm.is_on_policy, "it learns in none; vary spd_onpolicy"),
        **dict.fromkeys([f"evaluate.{name}" for name in of_all], (False, "all arms share it; set it for the run")),
    }
    found = (reads[name] for name in (key.partition(".")[0], key) if name in reads)
    return next((why for is_read, why in found if not is_read), None)


def swept(names: Sequence[str], temperatures: Sequence[float]) -> tuple[str, ...]:
    """The arms, and the untouched model and each student once more for every temperature, if they are not named yet."""
    found = list(names)
    for arm in chosen(names):
        if (arm.trains or arm.name == "base") and arm.made_as == arm.name:
            found += [f"{arm.name}@evaluate.temperature={value:g}" for value in temperatures]
    return tuple(dict.fromkeys(found))


def _arm(name: str) -> Arm:
    base, *changes = name.split("@")
    if base not in ARMS:
        (nearest,) = difflib.get_close_matches(base, ARMS, 1, 0)
        raise ConfigError(
            f"evaluate.arms: {name!r} is not an arm; the nearest is {nearest}, and there are {', '.join(ARMS)}"
        )
    words = [word for change in changes for word in _words(name, change)]
    if not words:
        return dataclasses.replace(ARMS[base], name=name)
    sentence = f"{ARMS[base].sentence}, with {', '.join(changes)}"
    return dataclasses.replace(ARMS[base], name=name, sentence=sentence, settings=(*ARMS[base].settings, *words))


def _words(name: str, change: str) -> list[str]:
    key, _, value = change.partition("=")
    section, _, field = key.rpartition(".")
    section = section or "project"
    if section not in MAY_VARY or not value or "/" in value:
        raise ConfigError(
            f"evaluate.arms: {name!r} is not a variant; write NAME@KEY=VALUE, with a key of {', '.join(MAY_VARY)}"
        )
    rule = RANK_RULES.get(field) if section == "project" else None
    return ([f"project.rank_rule={rule}"] if rule else []) + [f"{section}.{field}={value}"]


@dataclass(frozen=True)
class Scope:
    """The part of a run that a process does: from one stage to another, for all arms or some."""

    first: str = STAGES[0]
    last: str = STAGES[-1]
    """If it is `evaluate`, programs to score need permission and a sandbox."""
    only: tuple[str, ...] = ()
    """The arms to do; if none is given, all of `evaluate.arms`, and their comparison."""
    job: str = ""
    """As of `RunFolder`: what this process is called, if several share the folder."""
    others: tuple[Path, ...] = ()
    """As of `RunFolder`: runs whose finished stages are as good as one's own."""
    scores_tokens: bool = True
    """Whether completions are read token by token for the page, before all arms answer."""
