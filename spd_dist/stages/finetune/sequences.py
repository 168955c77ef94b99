"""Completions as training sequences, made when they are asked for: a corpus may be larger than memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from spd_dist.config import Finetune
from spd_dist.errors import DataError
from spd_dist.storage.tables import num_tokens_of
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


class TrainingSequences(Sequence[TrainingSequence]):
    """One sequence a completion, cut to `config.max_tokens`; each is made when it is asked for.

    A completion's tokens hold the end-of-sequence token exactly if the policy ended by itself: so that is when it is
    supervised. Padding is known by position, never by its id, which may well be that of the end of a sequence.
    """

    def __init__(self, completions: Sequence[Completion], config: Finetune, pad_token_id: int, place_N: Tensor) -> None:
        """`place_N` are the places of the completions that are in it."""
        self.completions, self.config, self.pad_token_id, self.place_N = completions, config, pad_token_id, place_N

    def __len__(self) -> int:
        return len(self.place_N)

    @overload
    def __getitem__(self, index: int) -> TrainingSequence: ...
    @overload
    def __getitem__(self, index: slice) -> list[TrainingSequence]: ...
    def __getitem__(self, index: int | slice) -> TrainingSequence | list[TrainingSequence]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        completion, config = self.completions[int(self.place_N[index])], self.config
        tokens = (completion.prompt_tokens + completion.tokens)[: config.max_tokens]
        first = 0 if config.loss_on == "prompt_and_completion" else len(completion.prompt_tokens)
        padding = (self.pad_token_id,) * (config.max_tokens - len(tokens) if config.pads_in_loss else 0)
        name = f"{completion.id}/{completion.sample}"
        return TrainingSequence(name, tokens + padding, max(1, first), len(tokens))

    def subset(self, places: Sequence[int]) -> TrainingSequences:
        """Some of them, by their places in here."""
        return TrainingSequences(self.completions, self.config, self.pad_token_id, self.place_N[list(places)])

    def _counted(self, column: str) -> Tensor:
        return torch.from_numpy(num_tokens_of(self.completions, column))[self.place_N]

    @property
    def num_before_cut_N(self) -> Tensor:
        """Tokens of prompt and completion."""
        return self._counted("prompt_tokens") + self._counted("tokens")

    @property
    def length_N(self) -> Tensor:
        """Tokens of each sequence, padding included."""
        if self.config.pads_in_loss:
            return torch.full((len(self),), self.config.max_tokens)
        return self.num_before_cut_N.clamp(max=self.config.max_tokens)

    @property
    def num_targets_N(self) -> Tensor:
        """Supervised tokens of each sequence."""
        first_N = self._counted("prompt_tokens")
        if self.config.loss_on == "prompt_and_completion":
            first_N = torch.zeros_like(first_N)
        return (self.length_N - first_N.clamp(min=1)).clamp(min=0)


def training_sequences(completions: Sequence[Completion], config: Finetune, *, pad_token_id: int) -> TrainingSequences:
    """The sequences of all completions but those that are cut before their first target.

    Raises:
        DataError: nothing is supervised.
    """
    every = TrainingSequences(completions, config, pad_token_id, torch.arange(len(completions)))
    usable = every.subset(every.num_targets_N.nonzero().flatten().tolist())
    if not len(usable):
        raise DataError(
            f"generate/completions: {len(completions)} completions hold no token to learn from with "
            f"finetune.loss_on={config.loss_on} and finetune.max_tokens={config.max_tokens}; raise finetune.max_tokens"
        )
    return usable


def lengths_of(sequences: Sequence[TrainingSequence]) -> list[int]:
    """Tokens of each sequence."""
    if isinstance(sequences, TrainingSequences):
        return sequences.length_N.tolist()
    return [len(sequence.tokens) for sequence in sequences]


def held_out(
    sequences: TrainingSequences, fraction: float, generator: torch.Generator
) -> tuple[TrainingSequences, TrainingSequences]:
    """The sequences to train on, and `fraction` of them (at least one, if above 0) to validate on; order is kept."""
    count = min(len(sequences) - 1, max(1, round(fraction * len(sequences)))) if fraction > 0 else 0
    chosen = set(torch.randperm(len(sequences), generator=generator)[:count].tolist())
    parts: tuple[list[int], list[int]] = ([], [])
    for index in range(len(sequences)):
        parts[index in chosen].append(index)
    return sequences.subset(parts[0]), sequences.subset(parts[1])
