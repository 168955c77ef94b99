"""Random subspaces at the distortion of the method's own: a stage of each arm with `project.match_kl`.

match.json    the share of the random projection that is kept, and both divergences

A random subspace of the same rank moves the policy further than the gradients' does, and its student differs by that,
too. Here it is blended, z -> (1 - share) z + share P z, until KL(untouched || projected) on calibration rows is that of
the method's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from spd_dist import stage_inputs
from spd_dist.arms import Arm
from spd_dist.data.held_out import make_held_out
from spd_dist.data.tasks.protocol import Row
from spd_dist.distributed.collectives import together
from spd_dist.distributed.uneven_work import on_main
from spd_dist.errors import DataError
from spd_dist.run import Run
from spd_dist.stages.distortion import VERSION, MatchSummary, Measurement, Passes, Variant, match, num_matching_passes
from spd_dist.stages.project import projection
from spd_dist.storage.artifacts import content_hash
from spd_dist.storage.records import write_record
from spd_dist.storage.subspace_file import load_subspace

NUM_ROWS = 32
"""Calibration rows, the first, that divergences are taken on."""


def match_controls(run: Run, arms: Iterable[Arm]) -> None:
    """Do the stage of every arm that has it. A collective.

    Raises:
        UserError: what the user can put right.
    """
    for arm in arms:
        if stage_inputs.is_matched(run, arm):
            _match(run, arm)


def _match(run: Run, arm: Arm) -> None:
    with together("choosing the rows of the match"):
        rows = matched_rows(run)
    mechanism, own = run.config.mechanism, run.config.project
    inputs = {
        **stage_inputs.of_whole_projection(run, arm),
        "settings": run.settings("seed", "model", "data", "calibrate.num_examples"),
        "own": content_hash([own.mode, own.rho, mechanism.kl_positions]),
        "rows": content_hash(rows),
        "measured": VERSION,
    }

    def work(folder: Path) -> MatchSummary:
        found = run.memoize(content_hash(inputs), lambda: measured(run, arm, rows, folder))
        on_main("writing the match", lambda: write_record(folder / stage_inputs.MATCH_FILE, found))
        return found

    run.run_stage(arm.stage("match"), inputs, [stage_inputs.MATCH_FILE], work)


def matched_rows(run: Run) -> Sequence[Row]:
    """The calibration rows that have a reference answer to be read with.

    Raises:
        DataError: there is none.
    """
    rows = run.rows("calibration")[: min(run.config.calibrate.num_examples, NUM_ROWS)]
    found = [row for row in rows if run.task.answer(row).strip()]
    if not found:
        raise DataError(
            "project.match_kl: none of the calibration rows has a reference answer, along which divergences are taken; "
            "name other rows with data.calibration, or set project.match_kl=false"
        )
    return found


def measured(run: Run, arm: Arm, rows: Sequence[Row], folder: Path) -> MatchSummary:
    """The share at which an arm's random projection is as far from the untouched policy as the method's own."""
    config, policy = run.config_of(arm), run.policy()
    settings = dataclasses.replace(config.mechanism, num_rows=len(rows), num_explored_rows=len(rows))
    plain = dataclasses.replace(config.project, mode=run.config.project.mode, rho=run.config.project.rho)
    with together("rendering the rows of the match"):
        positions = settings.kl_positions
        examples = make_held_out(rows, run.task, policy.tokenizer, config.data, "task", kl_positions=positions)
        subspace = load_subspace(run.folder.folder(stage_inputs.subspace_stage(run, arm)) / "subspace.safetensors")
        own = Variant("task", "own", projection(subspace, plain, config.seed))
        random = Variant("task", "random", projection(subspace, config.project, config.seed))
    config = dataclasses.replace(config, mechanism=settings)
    with run.progress("match", None, "row passes", arm) as progress:
        context = run.context(folder, arm, progress)
        measurement = Measurement(policy, {"task": examples}, sorted(subspace.sites), config, context)
        batches = measurement.batches_of("task", len(rows))
        whole = [Passes(own, batches), Passes(random, batches)]
        measurement.expect(whole, num_matching_passes(1, len(rows)))
        measurement.take(whole)
        (pair,) = match(measurement, own, {"random": random}, batches)
    if pair.is_own_blended:  # the random one is the quieter: nothing makes it louder
        kl = measurement.mean_kl(own, batches)
        return MatchSummary(1.0, kl, pair.other_kl, is_matched=False, num_rows=len(rows))
    return MatchSummary(pair.share, pair.own_kl, pair.other_kl, pair.is_matched, len(rows))
