"""Logical shards and padded micro-batches of supervised examples.

Shapes: B examples, T positions. Nothing here depends on how many ranks there are but the share that a rank takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spd_dist.types import SupervisedExample

NONE_TAKEN: Mapping[int, int] = {}


@dataclass(frozen=True)
class MicroBatch:
    """Examples of one logical shard that are run together."""

    shard: int
    examples: tuple[SupervisedExample, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return sum(len(example.tokens) for example in self.examples)


@dataclass(frozen=True)
class Division:
    """How examples are divided among logical shards, batches and ranks, as one rank sees it."""

    num_shards: int
    batch_size: int
    rank: int = 0
    world_size: int = 1


@dataclass(frozen=True)
class PaddedBatch:
    """A micro-batch as tensors: right-padded, as causal attention then needs no care for pads."""

    tokens_BT: Tensor
    attention_BT: Tensor
    """1 at tokens and 0 at pads, by position: a pad id inside an example stays a token."""
    target_BT: Tensor
    """True where the token is supervised; the position before it predicts it."""


def owned_shards(num_shards: int, rank: int, world_size: int) -> range:
    """The shards whose examples this rank runs: example i is of shard i modulo their number, shard s of rank s."""
    return range(rank, num_shards, world_size)


def micro_batches(
    examples: Sequence[SupervisedExample],
    division: Division,
    *,
    taken: Mapping[int, int] = NONE_TAKEN,
) -> Iterator[MicroBatch]:
    """This rank's micro-batches, shard by shard; within a shard longest first, so that padding is little.

    The batches of a shard are the same at every world size, and no batch mixes shards. `taken` says how many examples
    of a shard an earlier attempt has used: they are left out.
    """
    for shard in owned_shards(division.num_shards, division.rank, division.world_size):
        members = sorted(examples[shard :: division.num_shards], key=lambda example: -len(example.tokens))
        for start in range(taken.get(shard, 0), len(members), division.batch_size):
            yield MicroBatch(shard, tuple(members[start : start + division.batch_size]))


def num_micro_batches(
    num_examples: int,
    division: Division,
    *,
    taken: Mapping[int, int] = NONE_TAKEN,
) -> int:
    """How many `micro_batches` yields: what ranks compare before they run in lock-step."""
    sizes = (
        len(range(shard, num_examples, division.num_shards)) - taken.get(shard, 0)
        for shard in owned_shards(division.num_shards, division.rank, division.world_size)
    )
    return sum(-(-size // division.batch_size) for size in sizes)


def pad(examples: Sequence[SupervisedExample], pad_token_id: int, device: torch.device | None = None) -> PaddedBatch:
    """The examples as one right-padded batch on `device`."""
    shape = (len(examples), max(len(example.tokens) for example in examples))
    tokens_BT = torch.full(shape, pad_token_id)
    attention_BT = torch.zeros(shape, dtype=torch.long)
    target_BT = torch.zeros(shape, dtype=torch.bool)
    for row, example in enumerate(examples):
        tokens_BT[row, : len(example.tokens)] = torch.tensor(example.tokens)
        attention_BT[row, : len(example.tokens)] = 1
        target_BT[row, list(example.targets)] = True
    return PaddedBatch(tokens_BT.to(device), attention_BT.to(device), target_BT.to(device))
