"""The training data: token sequences, and which of their tokens are supervised (paper, Eq. 14)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spd_dist.config import Finetune
from spd_dist.errors import DataError
from spd_dist.types import Completion


@dataclass(frozen=True)
class TrainingSequence:
    """A prompt with the policy's own completion."""

    id: str
    tokens: tuple[int, ...]
    first_target: int
    """The supervised tokens are `tokens[first_target:]`; at least 1, since nothing predicts the first token."""
    num_attended: int
    """Tokens that are not padding: fewer than all of them only under `finetune.pads_in_loss`."""

    @property
    def num_targets(self) -> int:
        """Number of supervised tokens."""
        return max(0, len(self.tokens) - self.first_target)


def training_sequences(
    completions: Sequence[Completion], config: Finetune, *, pad_token_id: int
) -> list[TrainingSequence]:
    """One sequence a completion, cut to `config.max_tokens`.

    A completion's tokens hold the end-of-sequence token exactly if the policy ended by itself: so that is when it is
    supervised. Padding is known by position, never by its id, which may well be that of the end of a sequence.

    Raises:
        DataError: nothing is supervised.
    """
    sequences = []
    for completion in completions:
        tokens = (completion.prompt_tokens + completion.tokens)[: config.max_tokens]
        first = len(completion.prompt_tokens) if config.loss_on == "completion" else 0
        padding = (pad_token_id,) * (config.max_tokens - len(tokens) if config.pads_in_loss else 0)
        name = f"{completion.id}/{completion.sample}"
        sequences.append(TrainingSequence(name, tokens + padding, max(1, first), len(tokens)))
    usable = [sequence for sequence in sequences if sequence.tokens]
    if not sum(sequence.num_targets for sequence in usable):
        raise DataError(
            f"generate/completions: {len(completions)} completions hold no token to learn from with "
            f"finetune.loss_on={config.loss_on} and finetune.max_tokens={config.max_tokens}; raise finetune.max_tokens"
        )
    return usable


def held_out(
    sequences: Sequence[TrainingSequence], fraction: float, generator: torch.Generator
) -> tuple[list[TrainingSequence], list[TrainingSequence]]:
    """The sequences to train on, and `fraction` of them (at least one, if above 0) to validate on; order is kept."""
    count = min(len(sequences) - 1, max(1, round(fraction * len(sequences)))) if fraction > 0 else 0
    chosen = set(torch.randperm(len(sequences), generator=generator)[:count].tolist())
    parts: tuple[list[TrainingSequence], list[TrainingSequence]] = ([], [])
    for index, sequence in enumerate(sequences):
        parts[index in chosen].append(sequence)
    return parts
