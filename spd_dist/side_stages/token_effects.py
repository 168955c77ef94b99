"""Where the subspace acts: a stage beside the method, that `report.html` colours tokens by.

ARM.jsonl      the first completions that an arm wrote, every token under the untouched policy and the projected one
summary.json   their means, by arm

The untouched policy and the method's projection read the completions of all arms, so that a token's change says what
the projection does to it, whoever wrote it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from spd_dist import stage_inputs
from spd_dist.arms import Arm, iterations_of
from spd_dist.distributed.collectives import together
from spd_dist.distributed.uneven_work import on_main
from spd_dist.run import Run
from spd_dist.stages.score_tokens import EffectsSummary, score_tokens
from spd_dist.storage.answers import TOKEN_EFFECTS, effects_path
from spd_dist.storage.completions import open_corpus
from spd_dist.storage.records import write_record
from spd_dist.types import Completion


@dataclass(frozen=True)
class TokenEffectsSummary:
    """`token_effects/summary.json`."""

    projection: str
    """The arm whose projection the tokens were read under."""
    arms: Mapping[str, EffectsSummary]
    """By the arm that wrote the completions."""


def write_token_effects(run: Run, arms: Sequence[Arm]) -> None:
    """Do the stage, if an arm is projected and one writes. A collective; it goes on where it stopped.

    Raises:
        UserError: what the user can put right.
    """
    writers = {arm.made_as: iterations_of(arm, run.config_of(arm))[-1] for arm in arms if arm.writes}
    held, num = held_of(run, arms), run.config.evaluate.num_coloured
    if not (num and writers and held):
        return

    def work(folder: Path) -> TokenEffectsSummary:
        policy, projection = run.policy(), stage_inputs.projection_of(run, held)
        assert projection is not None  # `held` projects
        found = {}
        for name, arm in writers.items():
            with together("reading what is scored"):
                completions = first_completions(run, arm, num)
            context = dataclasses.replace(run.context(folder), arm=name)
            found[name] = score_tokens(policy, completions, projection, run.config.evaluate, context)
        summary = TokenEffectsSummary(held.made_as, found)
        on_main("writing the summary of the token effects", lambda: write_record(folder / "summary.json", summary))
        return summary

    outputs = ["summary.json", *(effects_path(Path(), name).name for name in writers)]
    run.run_stage(TOKEN_EFFECTS, inputs_of(run, held, writers, num), outputs, work)


CONTROLS = ("random", "isotropic", "identity")
"""Modes of a projection that is not to the gradients' directions; the last changes no token."""


def held_of(run: Run, arms: Sequence[Arm]) -> Arm | None:
    """The arm whose projection tokens are read under: `spd`, else its first variant, else another projected one.

    An arm whose projection is a control's is taken for want of any other; None if no arm is projected.
    """

    def distance(arm: Arm) -> tuple[bool, int, bool]:
        mode = run.config_of(arm).project.mode
        return arm.made_as != "spd", 1 + CONTROLS.index(mode) if mode in CONTROLS else 0, not arm.name.startswith("spd")

    return min((arm for arm in arms if arm.projects), key=distance, default=None)


def first_completions(run: Run, arm: Arm, num: int) -> list[Completion]:
    """The first completions of an arm's corpus.

    Raises:
        DataError: it is missing or corrupt.
    """
    corpus = open_corpus(run.folder.folder(arm.stage("generate")) / "completions")
    return list(corpus[:num])


def inputs_of(run: Run, held: Arm, writers: Mapping[str, Arm], num: int) -> dict[str, str]:
    """What the effects depend on: policy, projection, and what was written."""
    found = {"settings": run.settings("model"), "completions": str(num), **stage_inputs.of_projection(run, held)}
    for name, arm in writers.items():
        found[f"completions of {name}"] = stage_inputs.hash_of_corpus(run, arm)
    return found
