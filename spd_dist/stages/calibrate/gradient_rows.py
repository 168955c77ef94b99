"""The gradient of the masked loss at the KV sites: where correctness is sensitive to keys and values (paper, Eq. 6).

Shapes: B examples, N token rows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence

import torch

from spd_dist.config import Calibrate
from spd_dist.data.batches import NONE_TAKEN, Division, MicroBatch, micro_batches, num_micro_batches, owned_shards, pad
from spd_dist.distributed.world import World
from spd_dist.errors import DataError
from spd_dist.models.gradient_capture import Capture, capture
from spd_dist.models.loss import example_losses
from spd_dist.models.policy import Policy
from spd_dist.stages.context import StageContext
from spd_dist.types import GradientBatch, KVSite, SupervisedExample

log = logging.getLogger(__name__)


def calibrate(
    policy: Policy,
    examples: Sequence[SupervisedExample],
    sites: Sequence[KVSite],
    config: Calibrate,
    context: StageContext,
    *,
    taken: Mapping[int, int] = NONE_TAKEN,
) -> Iterator[GradientBatch]:
    """The gradient rows of the examples whose logical shards this rank owns, micro-batch by micro-batch.

    Every rank is given all examples, in the same order. The loss of an example is the mean negative log-likelihood of
    its targets, and losses are summed: an example's rows do not depend on its batch, nor on the world size. A
    collective: ranks run the same number of rounds (a rank with fewer examples throws its last gradients away if the
    policy is sharded, else it waits), so all must exhaust the iterator. `taken` is how many examples of each logical
    shard an earlier attempt has used, on every rank the same.

    Raises:
        DataError: an example without targets, or with one that nothing predicts.
        StopRequested: between two rounds, on all ranks.
    """
    world = context.world
    for example in examples:
        _check(example)
    own = list(
        micro_batches(examples, Division(config.num_shards, config.batch_size, world.rank, world.size), taken=taken)
    )
    skipped = sum(taken.get(shard, 0) for shard in owned_shards(config.num_shards, world.rank, world.size))
    context.begin(sum(len(batch.examples) for batch in own) + skipped, skipped)
    with capture(policy.model, sites, checkpointing=config.checkpointing) as caught:
        for step in range(_num_rounds(len(examples), config, world, taken)):
            context.stop_if_asked()
            if step < len(own):
                gradients = _gradients(policy, own[step], caught, world.device)
                context.advance(len(own[step].examples), own[step].num_tokens)
                yield gradients
            elif policy.engine is not None:
                _gradients(policy, _filler(examples), caught, world.device)


def _check(example: SupervisedExample) -> None:
    last = len(example.tokens) - 1
    if not example.targets or min(example.targets) < 1 or max(example.targets) > last:
        raise DataError(
            f"calibration example {example.id}: targets {list(example.targets)} must be one or more positions "
            f"from 1 to {last}, as the token before predicts each; check its prompt and its mask (calibrate.mask)"
        )


def _num_rounds(num_examples: int, config: Calibrate, world: World, taken: Mapping[int, int]) -> int:
    """Micro-batches of the rank that has most: every rank knows all plans, so nothing need be said."""
    divisions = [Division(config.num_shards, config.batch_size, rank, world.size) for rank in range(world.size)]
    return max(num_micro_batches(num_examples, division, taken=taken) for division in divisions)


def _filler(examples: Sequence[SupervisedExample]) -> MicroBatch:
    """The cheapest work that takes part in every gather of a sharded model, forward and backward."""
    shortest = min(examples, key=lambda example: len(example.tokens))
    return MicroBatch(0, (shortest,))


def _gradients(policy: Policy, micro_batch: MicroBatch, caught: Capture, device: torch.device) -> GradientBatch:
    batch = pad(micro_batch.examples, policy.pad_token_id, device)
    with torch.enable_grad():
        loss_B = example_losses(policy.model, batch.tokens_BT, batch.attention_BT, batch.target_BT)
        if not torch.isfinite(loss_B).all():
            losses = {example.id: loss for example, loss in zip(micro_batch.examples, loss_B.tolist(), strict=True)}
            log.error("calibrate: the loss is not finite, so these gradients are useless: %s", losses)
        grads = caught.gradients(loss_B.sum(), batch.attention_BT.bool())
    return GradientBatch(
        shard=micro_batch.shard,
        grad_ND=grads,
        num_zero_rows=sum(example.num_tokens_after for example in micro_batch.examples),
        num_tokens=micro_batch.num_tokens,
        num_examples=len(micro_batch.examples),
    )
