"""Which sequences make a step, and micro-batches as tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spd_dist.config import Finetune
from spd_dist.stages.finetune.sequences import TrainingSequence

Row = list[int]
"""Indices of the sequences that stand in one row, one after the other."""
MicroBatch = list[Row]

GROUPING_WINDOW = 32
"""Global batches that are sorted by length together."""


def global_batches(lengths: Sequence[int], config: Finetune, generator: torch.Generator) -> list[list[int]]:
    """One epoch: every sequence once, `config.global_batch_size` at a time; what is left over makes a smaller batch.

    With `config.length_grouping`, sequences of similar length share a batch: shuffled, sorted within large windows, and
    the batches shuffled again.
    """
    size = config.global_batch_size
    order = torch.randperm(len(lengths), generator=generator).tolist()
    if not config.length_grouping:
        return _cut(order, size)
    batches = []
    for window in _cut(order, size * GROUPING_WINDOW):
        batches += _cut(sorted(window, key=lambda index: -lengths[index]), size)
    return [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]


def micro_batches(
    batch: Sequence[int], lengths: Sequence[int], config: Finetune, num_ranks: int
) -> list[list[MicroBatch]]:
    """`batch` as rounds of one micro-batch a rank; it may be empty, since all ranks take part in every round.

    Rows are sorted by length before they are dealt out: those that run together, on all ranks, are about as long.
    """
    rows = _packed(batch, lengths, config, num_ranks) if config.packing else [[index] for index in batch]
    rows.sort(key=lambda row: -sum(lengths[index] for index in row))
    num_rounds = -(-len(rows) // (num_ranks * config.micro_batch_size))
    slots = _split_evenly(rows, num_rounds * num_ranks)
    return [slots[start : start + num_ranks] for start in range(0, len(slots), num_ranks)]


def _packed(batch: Sequence[int], lengths: Sequence[int], config: Finetune, num_ranks: int) -> list[Row]:
    """Rows of at most `config.max_tokens` tokens and about the same length, as few as the ranks can share evenly."""
    total = sum(lengths[index] for index in batch)
    num_rows = -(-total // (num_ranks * config.max_tokens)) * num_ranks
    longest_first = sorted(batch, key=lambda index: -lengths[index])
    while True:
        rows: list[Row] = [[] for _ in range(num_rows)]
        filled = [0] * num_rows
        for index in longest_first:
            shortest = min(range(num_rows), key=filled.__getitem__)
            rows[shortest].append(index)
            filled[shortest] += lengths[index]
        if max(filled) <= config.max_tokens or num_rows >= len(batch):
            return [row for row in rows if row]
        num_rows += num_ranks


def _cut(items: list[int], size: int) -> list[list[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _split_evenly(rows: list[Row], num_slots: int) -> list[MicroBatch]:
    """Consecutive slots whose sizes differ by one at most, larger ones last: there the rows are shorter."""
    small, num_larger = divmod(len(rows), num_slots)
    slots, start = [], 0
    for slot in range(num_slots):
        stop = start + small + (slot >= num_slots - num_larger)
        slots.append(rows[start:stop])
        start = stop
    return slots


@dataclass(frozen=True)
class Batch:
    """What one forward pass takes."""

    token_BT: Tensor
    """Padded on the right, so that causal attention needs no mask: no real token sees a pad."""
    context: dict[str, Tensor | int]
    """What attention must know: `position_ids` where rows hold several sequences (of them transformers makes the
    block-diagonal mask), the sequences' ends for flash-attention, an `attention_mask` where pads are supervised."""
    source_N: Tensor
    """Flat index of the position that predicts each supervised token."""
    label_N: Tensor
    owner_N: Tensor
    """Index of the sequence that each supervised token belongs to."""
    position_BT: Tensor
    """Each token's position in its sequence."""
    seed_BT: Tensor
    """Each token's sequence seed of this step, for dropout."""
    num_tokens: int
    """Tokens of the sequences, without padding."""

    def to(self, device: torch.device) -> Batch:
        """The same on `device`."""
        context = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.context.items()
        }
        return Batch(
            token_BT=self.token_BT.to(device),
            context=context,
            source_N=self.source_N.to(device),
            label_N=self.label_N.to(device),
            owner_N=self.owner_N.to(device),
            position_BT=self.position_BT.to(device),
            seed_BT=self.seed_BT.to(device),
            num_tokens=self.num_tokens,
        )


def collate(
    micro_batch: MicroBatch,
    sequences: Sequence[TrainingSequence],
    seed_of: Callable[[int], int],
    *,
    pad_token_id: int,
    varlen: bool = False,
) -> Batch:
    """The tensors of `micro_batch`.

    Args:
        micro_batch: Rows of indices of `sequences`.
        sequences: The corpus.
        seed_of: Gives a sequence's dropout seed by its index.
        pad_token_id: Any token: what is padding is known by position.
        varlen: Put all rows into one, without padding: flash-attention keeps sequences apart in one row only.
    """
    if varlen:
        micro_batch = [[index for row in micro_batch for index in row]]
    num_rows = len(micro_batch)
    width = max(sum(len(sequences[index].tokens) for index in row) for row in micro_batch)
    token_BT = torch.full((num_rows, width), pad_token_id)
    position_BT = torch.arange(width).repeat(num_rows, 1)
    seed_BT = torch.zeros(num_rows, width, dtype=torch.int64)
    attended_BT = torch.zeros(num_rows, width, dtype=torch.int64)
    sources, owners = [], []
    for row_number, row in enumerate(micro_batch):
        start = 0
        for index in row:
            sequence = sequences[index]
            stop = start + len(sequence.tokens)
            token_BT[row_number, start:stop] = torch.tensor(sequence.tokens)
            position_BT[row_number, start:] = torch.arange(width - start)  # the row's padding goes on counting
            seed_BT[row_number, start:stop] = seed_of(index)
            attended_BT[row_number, start : start + sequence.num_attended] = 1
            first = row_number * width + start
            sources.append(torch.arange(first + sequence.first_target - 1, first + len(sequence.tokens) - 1))
            owners.append(torch.full((sequence.num_targets,), index))
            start = stop
    source_N = torch.cat(sources)
    return Batch(
        token_BT=token_BT,
        context=_context(micro_batch, sequences, position_BT, attended_BT, varlen=varlen),
        source_N=source_N,
        label_N=token_BT.flatten()[source_N + 1],
        owner_N=torch.cat(owners),
        position_BT=position_BT,
        seed_BT=seed_BT,
        num_tokens=sum(len(sequences[index].tokens) for row in micro_batch for index in row),
    )


def _context(
    micro_batch: MicroBatch,
    sequences: Sequence[TrainingSequence],
    position_BT: Tensor,
    attended_BT: Tensor,
    *,
    varlen: bool,
) -> dict[str, Tensor | int]:
    if varlen:
        length_S = torch.tensor([len(sequences[index].tokens) for index in micro_batch[0]])
        ends_S1 = torch.cat([torch.zeros(1, dtype=torch.int64), length_S.cumsum(0)]).to(torch.int32)
        longest = int(length_S.max())
        return {
            "position_ids": position_BT,
            "cu_seq_lens_q": ends_S1,
            "cu_seq_lens_k": ends_S1,
            "max_length_q": longest,
            "max_length_k": longest,
        }
    if any(len(row) > 1 for row in micro_batch):
        return {"position_ids": position_BT}
    if attended_BT.sum() < sum(len(sequences[index].tokens) for row in micro_batch for index in row):
        return {"attention_mask": attended_BT}
    return {}
