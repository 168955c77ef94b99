"""Decode many prompts: a finished row leaves the batch at once and the next prompt takes its place.

Shapes: N rows in the batch, L length of the longest, S length of a prompt, V vocabulary, T tokens of a completion.
"""

from __future__ import annotations

import inspect
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spd_dist.errors import DataError
from spd_dist.models.sampling import Sampling, choose, uniforms
from spd_dist.models.slots import SlotCache, num_slot_layers, prefill_cache

log = logging.getLogger(__name__)


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


@dataclass
class _Row:
    request: Request
    uniform_T: Tensor
    tokens: list[int] = field(default_factory=list)
    seen_V: Tensor | None = None

    @property
    def num_columns(self) -> int:
        """Tokens whose keys and values the model has made: all but the newest."""
        return len(self.request.tokens) + len(self.tokens) - 1


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    requests: Iterable[Request],
    sampling: Sampling,
    *,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    batch_size: int = 32,
    batch_invariant: bool = False,
    halve: bool = True,
) -> Iterator[Decoded]:
    """Completions in the order in which they finish, of at most `batch_size` rows at a time.

    The longest prompts go first: what does not fit in memory fails early. Out of memory, the rows at hand start again
    in a batch of half the size; their samples stay the same.

    Raises:
        DataError: a prompt that with `max_new_tokens` exceeds the model's context; logits that are NaN; not even one
            row fits in memory.
    """
    ordered = sorted(requests, key=lambda request: (-len(request.tokens), request.id, request.sample))
    _check_lengths(model, ordered, sampling)
    while ordered:
        loop = _Loop(model, sampling, frozenset(eos_token_ids), pad_token_id, batch_size)
        try:
            yield from loop.run(ordered)
            return
        except RuntimeError as error:
            if not halve or not is_out_of_memory(error):
                raise
            if batch_size == 1:
                raise DataError(
                    "out of memory with generate.batch_size=1; lower generate.max_new_tokens or "
                    "data.max_prompt_tokens, or set generate.placement=layerwise"
                ) from error
        ordered, batch_size = loop.unfinished(), batch_size // 2
        del loop
        torch.cuda.empty_cache()
        log.warning("generate: out of memory; going on with generate.batch_size=%d", batch_size)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed, on an accelerator or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _check_lengths(model: PreTrainedModel, requests: Sequence[Request], sampling: Sampling) -> None:
    settings = model.config.get_text_config().to_dict()
    context = settings.get("max_position_embeddings") or settings.get("n_positions")
    for request in requests[:1]:  # the longest
        needed = len(request.tokens) + sampling.max_new_tokens
        if context is not None and needed > context:
            raise DataError(
                f"prompt {request.id!r} has {len(request.tokens)} tokens; with generate.max_new_tokens="
                f"{sampling.max_new_tokens} that is {needed}, and the model's context is {context}; lower one of them"
            )


class _Loop:
    """A batch in motion."""

    def __init__(
        self, model: PreTrainedModel, sampling: Sampling, eos: frozenset[int], pad: int, batch_size: int
    ) -> None:
        self.model, self.sampling, self.eos, self.pad, self.batch_size = model, sampling, eos, pad, batch_size
        self.takes = inspect.signature(model.forward).parameters
        self.device = next(model.parameters()).device
        self.rows: list[_Row] = []
        self.waiting: deque[Request] = deque()

    def run(self, requests: Sequence[Request]) -> Iterator[Decoded]:
        """Decode all of them."""
        self.waiting.extend(requests)
        max_length = max(len(request.tokens) for request in requests) + self.sampling.max_new_tokens
        self.num_layers = num_slot_layers(self.model.config, max_length)
        self.cache = SlotCache(self.num_layers, min(self.batch_size, len(requests)))
        while self.waiting or self.rows:
            while self.waiting and len(self.rows) < self.batch_size:
                self._admit(self.waiting[0])
                self.waiting.popleft()
                yield from self._leave()
            if self.rows:
                self._step()
                yield from self._leave()

    def unfinished(self) -> list[Request]:
        """What is still to be done, longest first, from its beginning."""
        return [row.request for row in self.rows] + list(self.waiting)

    def _admit(self, request: Request) -> None:
        """Run a prompt through the model, and draw its first token."""
        input_NS = torch.tensor([request.tokens], device=self.device)
        cache = prefill_cache(self.num_layers)
        position_NS = torch.arange(input_NS.shape[1], device=self.device)[None]
        logits_NV = self._forward(input_NS, torch.ones_like(input_NS), position_NS, cache)
        row = _Row(request, uniforms(request.seed, self.sampling.max_new_tokens))
        if self.sampling.repetition_penalty != 1:
            row.seen_V = torch.zeros(logits_NV.shape[-1], dtype=torch.bool, device=self.device)
            row.seen_V[input_NS[0]] = True
        self.cache.admit(cache, row=0, slot=len(self.rows), num_columns=len(request.tokens))
        self.rows.append(row)
        self._draw([row], logits_NV)

    def _step(self) -> None:
        """One token for every row."""
        column_N = torch.tensor([row.num_columns for row in self.rows], device=self.device)
        num_columns = max(row.num_columns for row in self.rows) + 1
        self.cache.open(column_N, num_columns)
        input_N1 = torch.tensor([[row.tokens[-1]] for row in self.rows], device=self.device)
        mask_NL = torch.arange(num_columns, device=self.device) <= column_N[:, None]
        self._draw(self.rows, self._forward(input_N1, mask_NL.long(), column_N[:, None], self.cache))

    def _forward(self, input_NS: Tensor, mask_NL: Tensor, position_NS: Tensor, cache: Any) -> Tensor:
        """logits_NV at the last position."""
        optional = {"position_ids": position_NS, "logits_to_keep": 1}
        inputs = {name: value for name, value in optional.items() if name in self.takes}
        inputs |= {"input_ids": input_NS, "attention_mask": mask_NL, "past_key_values": cache, "use_cache": True}
        return self.model(**inputs).logits[:, -1]

    def _draw(self, rows: Sequence[_Row], logits_NV: Tensor) -> None:
        uniform_N = torch.stack([row.uniform_T[len(row.tokens)] for row in rows])
        seen_NV = None if rows[0].seen_V is None else torch.stack([row.seen_V for row in rows])
        for row, token in zip(rows, choose(logits_NV, uniform_N, self.sampling, seen_NV).tolist(), strict=True):
            row.tokens.append(token)
            if row.seen_V is not None:
                row.seen_V[token] = True

    def _leave(self) -> Iterator[Decoded]:
        """Give the finished rows; the last row takes the slot of one that left."""
        for slot in reversed(range(len(self.rows))):
            row = self.rows[slot]
            is_stopped = row.tokens[-1] in self.eos
            if not is_stopped and len(row.tokens) < self.sampling.max_new_tokens:
                continue
            last = self.rows.pop()
            if last is not row:
                self.cache.move(len(self.rows), slot, last.num_columns)
                self.rows[slot] = last
            yield Decoded(row.request, tuple(row.tokens), "stop" if is_stopped else "length")
