"""Micro-batches as tensors.

Shapes: B rows, T positions, N supervised tokens, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spd_dist.stages.finetune.plan import MicroBatch
from spd_dist.stages.finetune.sequences import TrainingSequence


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
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        context = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.context.items()
        }
        return Batch(**{**vars(self), **moved, "context": context})


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
