"""What a run has to do, in units that a rank does: for the time that it still takes."""

from __future__ import annotations

from collections.abc import Sequence

from spd_dist.arms import Arm
from spd_dist.config import STAGES, Config
from spd_dist.runtime.estimate import Part

TRAINED_OVER_CALIBRATED = 2.0
"""A training example takes a forward and a backward pass, a calibration example a forward and half a backward pass."""


def parts_of(config: Config, arms: Sequence[Arm], num_ranks: int, last: str = STAGES[-1]) -> list[Part]:
    """The stages of a run up to `last`, of all arms; until they have a pace of their own, arms answer as they generate.

    Arms with a subspace of their own calibrate again, which is not counted: it is short beside the rest.
    """
    writers, students = [arm for arm in arms if arm.writes], [arm for arm in arms if arm.trains]
    num_completions = config.data.num_train * config.generate.num_samples / num_ranks
    num_answers = config.data.num_test * config.evaluate.num_samples / num_ranks
    steps = -(-config.data.num_train // config.finetune.global_batch_size) * config.finetune.num_epochs
    calibrated = TRAINED_OVER_CALIBRATED * config.finetune.global_batch_size / num_ranks
    parts = [
        Part("project", "calibrate", config.calibrate.num_examples / num_ranks),
        *(Part(arm.stage("generate"), "generate", num_completions) for arm in writers),
        *(Part(arm.stage("finetune"), "finetune", steps, "calibrate", calibrated) for arm in students),
        *(Part(f"evaluate/{arm.name}", "evaluate", num_answers, "generate") for arm in arms),
    ]
    return [part for part in parts if STAGES.index(part.stage) <= STAGES.index(last)]
