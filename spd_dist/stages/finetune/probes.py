"""What must hold of a model for its loss to be exact, seen on a few tokens before the first step."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from spd_dist.config import Finetune
from spd_dist.distributed.collectives import all_ranks, together
from spd_dist.distributed.world import World
from spd_dist.errors import ConfigError
from spd_dist.models.next_token_loss import Student, check_tail_
from spd_dist.stages.finetune.batches import collate
from spd_dist.stages.finetune.sequences import TrainingSequence

LEAK = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}
"""More than rounding explains."""

log = logging.getLogger(__name__)


def check_student(
    student: Student, sequences: Sequence[TrainingSequence], config: Finetune, world: World, *, varlen: bool
) -> None:
    """See that the chunked loss is the model's own, and that packed sequences do not see each other. A collective.

    Raises:
        ConfigError: they do, and `finetune.packing` is on.
    """
    student.eval()
    tokens = max(sequences[:64], key=lambda sequence: len(sequence.tokens)).tokens[:64]
    if not all_ranks(check_tail_(student, torch.tensor([tokens], device=world.device))):
        student.tail = None
        log.info(
            "finetune: the model changes its logits in a way of its own, so they are held whole, which takes memory"
        )
    if config.packing:
        leak = _leak(student, sequences, world, varlen=varlen)
        with together("checking that packed sequences do not see each other"):
            if leak > LEAK[student.model.dtype]:
                raise ConfigError(
                    f"finetune.packing: True is not valid for this model: a token's loss changes by {leak:.2%} with "
                    "what is packed in front of it; set finetune.packing=false"
                )


@torch.no_grad()
def _leak(student: Student, sequences: Sequence[TrainingSequence], world: World, *, varlen: bool) -> float:
    """How much the loss of a token depends on a sequence in front of its own in the same row, relative to the mean."""
    second = max(range(min(len(sequences), 64)), key=lambda index: sequences[index].num_targets)
    first = (second + 1) % len(sequences)
    losses = []
    for row in ([second], [first, second]):
        batch = collate([row], sequences, lambda _: 0, pad_token_id=0, varlen=varlen).to(world.device)
        _, loss_N = student(batch.token_BT, batch.source_N, batch.label_N, **batch.context)
        losses.append(loss_N[batch.owner_N == second])
    return ((losses[1] - losses[0]).abs().max() / losses[0].mean()).item()
