"""Which sequences make a step, and which rank runs which of them at once.

A global batch is fixed by seed and epoch alone. How it is cut into micro-batches changes no result: the loss is a sum
over supervised tokens, divided by their number in the whole global batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spd_dist.config import Finetune

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
