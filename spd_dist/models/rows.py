"""A completion in the making: what was asked, what was drawn, and when it ends.

Shapes: N rows, V vocabulary, T tokens of a completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from spd_dist.models.sampling import Sampling, choose, uniforms


@dataclass(frozen=True)
class Request:
    """One completion to make."""

    id: str
    sample: int
    tokens: tuple[int, ...]
    seed: int
    """Of its random numbers: nothing else makes its sample."""


@dataclass(frozen=True)
class Decoded:
    """A completion as tokens."""

    request: Request
    tokens: tuple[int, ...]
    """With the end-of-sequence token if there was one."""
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class Stopping:
    """How completions are drawn, and which tokens end one."""

    sampling: Sampling
    eos_token_ids: frozenset[int]
    pad_token_id: int


@dataclass
class Row:
    """A request being answered."""

    request: Request
    uniform_T: Tensor
    tokens: list[int] = field(default_factory=list)
    seen_V: Tensor | None = None

    @property
    def num_cached(self) -> int:
        """Tokens whose keys and values the model has made: all but the newest."""
        return len(self.request.tokens) + len(self.tokens) - 1

    def finished(self, stopping: Stopping) -> Decoded | None:
        """The completion, if its newest token was its last."""
        if self.tokens[-1] in stopping.eos_token_ids:
            return Decoded(self.request, tuple(self.tokens), "stop")
        if len(self.tokens) == stopping.sampling.max_new_tokens:
            return Decoded(self.request, tuple(self.tokens), "length")
        return None


def new_row(request: Request, sampling: Sampling, *, vocabulary_size: int, device: torch.device) -> Row:
    """A row that has drawn nothing yet."""
    row = Row(request, uniforms(request.seed, sampling.max_new_tokens))
    if sampling.repetition_penalty != 1:
        row.seen_V = torch.zeros(vocabulary_size, dtype=torch.bool, device=device)
        row.seen_V[list(request.tokens)] = True
    return row


def draw(rows: Sequence[Row], logits_NV: Tensor, sampling: Sampling) -> None:
    """Append a token to every row."""
    uniform_N = torch.stack([row.uniform_T[len(row.tokens)] for row in rows])
    seen_NV = None if rows[0].seen_V is None else torch.stack([row.seen_V for row in rows])
    for row, token in zip(rows, choose(logits_NV, uniform_N, sampling, seen_NV).tolist(), strict=True):
        row.tokens.append(token)
        if row.seen_V is not None:
            row.seen_V[token] = True
