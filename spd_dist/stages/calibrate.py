"""The gradient of the masked loss at the KV sites: where correctness is sensitive to keys and values (paper, Eq. 6).

Shapes: B examples, N token rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import torch

from spd_dist.config import Calibrate
from spd_dist.data.batches import NONE_TAKEN, MicroBatch, micro_batches, num_micro_batches, owned_shards, pad
from spd_dist.distributed.world import World
from spd_dist.errors import DataError
from spd_dist.models.gradient_capture import Capture, capture
from spd_dist.models.loss import example_losses
from spd_dist.models.policy import Policy
from spd_dist.types import GradientBatch, KVSite, SupervisedExample

logger = logging.getLogger(__name__)


class Advance(Protocol):
    """What shows how far a stage has come."""

    def begin(self, total: int, skipped: int) -> None:
        """Learn how much there is, and how much of it was done before."""

    def advance(self, units: int, tokens: int = 0) -> None:
        """Count `units` more as done."""


def calibrate(
    policy: Policy,
    examples: Sequence[SupervisedExample],
    sites: Sequence[KVSite],
    config: Calibrate,
    world: World,
    *,
    taken: Mapping[int, int] = NONE_TAKEN,
    progress: Advance | None = None,
    stop_if_asked: Callable[[], None] | None = None,
) -> Iterator[GradientBatch]:
    """The gradient rows of the examples whose logical shards this rank owns, micro-batch by micro-batch.

    Every rank is given all examples, in the same order. The loss of an example is the mean negative log-likelihood of
    its targets, and losses are summed: an example's rows do not depend on its batch, nor on the world size. A
    collective: ranks run the same number of rounds (a rank with fewer examples throws its last gradients away if the
    policy is sharded, else it waits), so all must exhaust the iterator.

    Args:
        policy: Whose gradients.
        examples: All of them, on every rank.
        sites: Where.
        config: Its section.
        world: This process among all.
        taken: How many examples of each logical shard an earlier attempt has used, on every rank the same.
        progress: Told of each micro-batch.
        stop_if_asked: A collective, called before each round; it raises on all ranks, or on none.

    Raises:
        DataError: an example without targets, or with one that nothing predicts.
        StopRequested: `stop_if_asked` said so.
    """
    for example in examples:
        _check(example)
    own = list(micro_batches(examples, **_division(config, world.rank, world), taken=taken))
    if progress is not None:
        skipped = sum(taken.get(shard, 0) for shard in owned_shards(config.num_shards, world.rank, world.size))
        progress.begin(sum(len(batch.examples) for batch in own) + skipped, skipped)
    with capture(policy.model, sites, checkpointing=config.checkpointing) as caught:
        for step in range(_num_rounds(len(examples), config, world, taken)):
            if stop_if_asked is not None:
                stop_if_asked()
            if step < len(own):
                gradients = _gradients(policy, own[step], caught, world.device)
                if progress is not None:
                    progress.advance(len(own[step].examples), own[step].num_tokens)
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


def _division(config: Calibrate, rank: int, world: World) -> dict[str, int]:
    """How the examples are divided, as a rank sees it."""
    division = {"num_shards": config.num_shards, "batch_size": config.batch_size}
    return division | {"rank": rank, "world_size": world.size}


def _num_rounds(num_examples: int, config: Calibrate, world: World, taken: Mapping[int, int]) -> int:
    """Micro-batches of the rank that has most: every rank knows all plans, so nothing need be said."""
    return max(
        num_micro_batches(num_examples, **_division(config, rank, world), taken=taken) for rank in range(world.size)
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
        num_examples=len(micro_batch.examples),
    )
