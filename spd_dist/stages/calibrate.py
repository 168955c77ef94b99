"""The gradient of the masked loss at the KV sites: where correctness is sensitive to keys and values (paper, Eq. 6).

Shapes: B examples, N token rows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from spd_dist.config import Calibrate
from spd_dist.data.batches import MicroBatch, micro_batches, num_micro_batches, pad
from spd_dist.distributed.world import World
from spd_dist.errors import DataError
from spd_dist.models.capture import Capture, capture
from spd_dist.models.likelihood import example_losses
from spd_dist.models.policy import Policy
from spd_dist.types import GradientBatch, KVSite, SupervisedExample

logger = logging.getLogger(__name__)


class Advance(Protocol):
    """What shows how far a stage has come."""

    def advance(self, units: int, tokens: int = 0) -> None:
        """Count `units` more as done."""


def calibrate(
    policy: Policy,
    examples: Sequence[SupervisedExample],
    sites: Sequence[KVSite],
    config: Calibrate,
    world: World,
    *,
    progress: Advance | None = None,
) -> Iterator[GradientBatch]:
    """The gradient rows of the examples whose logical shards this rank owns, micro-batch by micro-batch.

    Every rank is given all examples, in the same order. The loss of an example is the mean negative log-likelihood of
    its targets, and losses are summed: an example's rows do not depend on its batch, nor on the world size. If the
    policy is sharded this is a collective: ranks run the same number of micro-batches (a rank with fewer examples
    throws its last ones away), so all must exhaust the iterator.

    Raises:
        DataError: an example without targets, or with one that nothing predicts.
    """
    for example in examples:
        _check(example)
    own = list(_planned(examples, config, rank=world.rank, world_size=world.size))
    steps = range(_num_steps(len(examples), config, world) if policy.engine is not None else len(own))
    with capture(policy.model, sites, checkpointing=config.checkpointing) as caught:
        for step in steps:
            batch = own[step] if step < len(own) else _filler(examples)
            gradients = _gradients(policy, batch, caught, world.device)
            if step < len(own):
                if progress is not None:
                    progress.advance(len(batch.examples), batch.num_tokens)
                yield gradients


def _check(example: SupervisedExample) -> None:
    last = len(example.tokens) - 1
    if not example.targets or min(example.targets) < 1 or max(example.targets) > last:
        raise DataError(
            f"calibration example {example.id}: targets {list(example.targets)} must be one or more positions "
            f"from 1 to {last}, as the token before predicts each; check its prompt and its mask (calibrate.mask)"
        )


def _planned(
    examples: Sequence[SupervisedExample], config: Calibrate, *, rank: int, world_size: int
) -> Iterator[MicroBatch]:
    return micro_batches(
        examples, num_shards=config.num_shards, batch_size=config.batch_size, rank=rank, world_size=world_size
    )


def _num_steps(num_examples: int, config: Calibrate, world: World) -> int:
    """Micro-batches of the rank that has most: every rank knows all plans, so nothing need be said."""
    return max(
        num_micro_batches(
            num_examples, num_shards=config.num_shards, batch_size=config.batch_size, rank=rank, world_size=world.size
        )
        for rank in range(world.size)
    )


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
            logger.error("calibrate: the loss is not finite, so these gradients are useless: %s", losses)
        grads = caught.gradients(loss_B.sum(), batch.attention_BT.bool())
    return GradientBatch(
        shard=micro_batch.shard,
        grad_ND=grads,
        num_zero_rows=sum(example.num_tokens_after for example in micro_batch.examples),
        num_tokens=micro_batch.num_tokens,
    )
