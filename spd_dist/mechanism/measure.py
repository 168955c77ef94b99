"""The test from end to end: every comparison's passes, the primary one's matching, and what is kept of it all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spd_dist.analysis.mechanism_verdict import Answered, Validity, rank_correlation
from spd_dist.config import Config
from spd_dist.data.held_out import HeldOutExample
from spd_dist.data.prompts import TestSet
from spd_dist.mechanism.comparisons import Lineup, lineup, planned
from spd_dist.mechanism.controls import SPD, Material
from spd_dist.mechanism.summing import Compared, MechanismOutcome, sum_up
from spd_dist.models.policy import Policy
from spd_dist.stages.context import StageContext
from spd_dist.stages.distortion import Measurement, Passes, Variant, at_share, match, num_matching_passes
from spd_dist.stages.evaluate import evaluate_arm

DRAWN = ("activation_pca", "complement", "random_000")
"""Beside the method's own: subspaces whose effect is drawn over the share of the projection."""
NUM_RANDOM_ANSWERING = 5
ANSWERS = "answers"
"""In the stage's folder: what was answered, as evaluate keeps it."""


@dataclass(frozen=True)
class HeldOut:
    """The rows."""

    forms: Mapping[str, Sequence[HeldOutExample]]
    """In each form of the prompt, the same rows in the same order."""
    test_set: TestSet | None = None
    """Those that are answered, too."""


def measure(
    policy: Policy, rows: HeldOut, material: Material, config: Config, context: StageContext
) -> MechanismOutcome:
    """Score the rows under every subspace of every comparison. A collective; the same at every world size.

    The policy is untouched, the rows held out from calibration; what is measured is kept in the context's folder, line
    by line.

    Raises:
        StopRequested: after a pass, on the ranks that were asked; what is written stays.
        UserError: what the user can put right.
    """
    settings = config.mechanism
    measurement = Measurement(policy, rows.forms, sorted(material.spd.sites), config, context)
    compared = [
        Compared(
            one,
            lineup(one, material, settings, context.seed),
            measurement.batches_of(one.prompt, settings.num_rows if number == 0 else settings.num_explored_rows),
        )
        for number, one in enumerate(planned(settings))
    ]
    first, batches = compared[0].lineup, compared[0].batches
    against = {**first.random, **first.others}
    drawn = [first.own, *(against[name] for name in DRAWN if name in against)]
    doses = [at_share(variant, dose) for variant in drawn for dose in settings.doses]
    whole = [Passes(variant, one.batches) for one in compared for variant in one.lineup.all()]
    dosed = [Passes(variant, batches) for variant in doses]
    num_primary = min(settings.num_rows, len(rows.forms[settings.prompts[0]]))
    measurement.expect([*whole, *dosed], num_matching_passes(len(against), num_primary))
    measurement.take(whole)
    pairs = dict(zip(against, match(measurement, first.own, against, batches), strict=True))
    measurement.take(dosed)
    outcome = sum_up(measurement, compared, pairs, doses)
    if rows.test_set is None:
        return outcome
    context = dataclasses.replace(context, folder=context.folder / ANSWERS, progress=None)
    answers = {"base": evaluate_arm(policy, rows.test_set, config.evaluate, context, arm="base").value}
    for variant in answering(first):
        answers[variant.name] = evaluate_arm(
            policy, rows.test_set, config.evaluate, context, arm=variant.name, projection=variant.projection
        ).value
    effects = {one.name: one.effect for one in outcome.result.controls} | {SPD: outcome.result.effect}
    sign = -1 if rows.test_set.task.metric == "nll" else 1
    validity = validity_of(answers, effects, len(rows.test_set.rows), sign)
    return dataclasses.replace(outcome, details=dataclasses.replace(outcome.details, validity=validity))


def answering(lineup: Lineup) -> list[Variant]:
    """The subspaces under which the rows are answered, too: the method's, two controls, and some random ones."""
    random = list(lineup.random.values())[:NUM_RANDOM_ANSWERING]
    return [lineup.own, *(lineup.others[name] for name in DRAWN if name in lineup.others), *random]


def validity_of(answers: Mapping[str, float], effects: Mapping[str, float], num_rows: int, sign: int = 1) -> Validity:
    """How the effects on likelihood go with the answers' metric, over subspaces.

    Args:
        answers: Metric by subspace, and of the `base`.
        effects: On the gold answers' NLL, by subspace.
        num_rows: That were answered.
        sign: -1 for a metric of which less is better.
    """
    found = [Answered(name, effects[name], value) for name, value in answers.items() if name in effects]
    correlation = rank_correlation([one.effect for one in found], [sign * one.value for one in found])
    return Validity(num_rows, answers["base"], found, correlation)
