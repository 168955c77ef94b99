"""The decode loop: a finished row leaves the batch at once, and the next prompt takes its slot.

Shapes: N rows of a pass, S tokens of the longest prompt among them, L columns of the window, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from spd_dist.inference.kv_cache import SlotCache, prefill_cache
from spd_dist.inference.requests import Decoded, DecodeSettings, Request, Row, draw, new_row
from spd_dist.models.forward import call_model

MIN_PREFIX_TOKENS = 8  # a shorter beginning that all prompts share is not worth a pass of its own
MAX_PREFILL_TOKENS = 4096


class Prefilled(NamedTuple):
    """A prompt that the model has read."""

    cache: Cache
    row: int
    logits_V: Tensor


class ContinuousBatcher:
    """A batch in motion, over a model whose cache is plain keys and values."""

    def __init__(
        self,
        model: PreTrainedModel,
        stopping: DecodeSettings,
        num_layers: int,
        num_slots: int,
        fixed_columns: int | None,
    ) -> None:
        """With `fixed_columns`, a pass has `num_slots` rows by that many columns, and a prompt a pass of its own."""
        self.model, self.stopping, self.num_layers, self.num_slots = model, stopping, num_layers, num_slots
        self.fixed_columns = fixed_columns
        self.takes = inspect.signature(model.forward).parameters
        self.device = next(model.parameters()).device
        # A pass over one prompt keeps a CPU as busy as one over many; an accelerator is kept waiting by small ones.
        self.min_group = 1 if self.device.type == "cpu" else max(1, num_slots // 8)
        self.cache = SlotCache(num_layers, num_slots)
        self.rows: list[Row] = []
        self.waiting: deque[Request] = deque()
        self.prefix: tuple[int, ...] = ()
        self.prefix_cache: Cache | None = None
        self.last_read: dict[tuple[int, ...], Prefilled] = {}

    def run(self, requests: Sequence[Request]) -> Iterator[Decoded]:
        """Decode all of them, in the order in which they are given."""
        self.waiting.extend(requests)
        if self.fixed_columns is None:
            self._read_common_prefix(requests)
        while self.waiting or self.rows:
            while self.waiting and self._has_room():
                self._admit(self._next_group())
                yield from self._evict_finished()
            if self.rows:
                self._step()
                yield from self._evict_finished()

    def unfinished(self) -> list[Request]:
        """What is still to be done, from its beginning."""
        return [row.request for row in self.rows] + list(self.waiting)

    def _has_room(self) -> bool:
        free = self.num_slots - len(self.rows)
        return free >= min(self.min_group, len(self.waiting)) or not self.rows

    def _read_common_prefix(self, requests: Sequence[Request]) -> None:
        """Read once what all prompts begin with: system prompt, instructions, examples."""
        shared = common_prefix([request.tokens for request in requests])
        if len(shared) < MIN_PREFIX_TOKENS or len(requests) == 1:
            return
        cache = prefill_cache(self.num_layers)
        self._forward(torch.tensor([shared], device=self.device), torch.ones(1, len(shared)), cache)
        self.prefix, self.prefix_cache = shared, cache

    def _next_group(self) -> list[Request]:
        """The next prompts to read together: the longest comes first, so that it sets the padding."""
        free = 1 if self.fixed_columns is not None else self.num_slots - len(self.rows)
        fitting = max(1, MAX_PREFILL_TOKENS // len(self.waiting[0].tokens))
        return list(islice(self.waiting, min(free, fitting)))

    def _admit(self, group: list[Request]) -> None:
        """Read the prompts and draw the first token of each; one waits until it is a row: no failure loses it."""
        self._read(list(dict.fromkeys(one.tokens for one in group if one.tokens not in self.last_read)))
        read = [self.last_read[request.tokens] for request in group]
        logits_NV = torch.stack([one.logits_V for one in read])
        rows = [
            new_row(request, self.stopping.sampling, vocabulary_size=logits_NV.shape[-1], device=self.device)
            for request in group
        ]
        for row, one in zip(rows, read, strict=True):
            self.cache.admit(
                one.cache, one.row, len(self.rows), prefix=len(self.prefix), num_columns=len(row.request.tokens)
            )
            self.rows.append(row)
            self.waiting.popleft()
        draw(rows, logits_NV, self.stopping.sampling)
        self.last_read = {group[-1].tokens: read[-1]}  # further samples of that prompt may follow

    def _read(self, prompts: list[tuple[int, ...]]) -> None:
        if not prompts:
            return
        start, width = len(self.prefix), max(map(len, prompts))
        pads = [width - len(prompt) for prompt in prompts]
        input_NS = torch.tensor(
            [
                [self.stopping.pad_token_id] * pad + list(prompt[start:])
                for pad, prompt in zip(pads, prompts, strict=True)
            ],
            device=self.device,
        )
        column_S = torch.arange(width, device=self.device)
        is_token_NS = (column_S < start) | (column_S >= start + torch.tensor(pads, device=self.device)[:, None])
        cache = prefill_cache(self.num_layers, self.prefix_cache, len(prompts))
        logits_NV = self._forward(input_NS, is_token_NS, cache)
        self.last_read |= {
            prompt: Prefilled(cache, row, logits_V)
            for row, (prompt, logits_V) in enumerate(zip(prompts, logits_NV, strict=True))
        }

    def _step(self) -> None:
        """One token for every row."""
        columns, newest = [row.num_cached for row in self.rows], [row.tokens[-1] for row in self.rows]
        num_columns = max(columns) + 1
        if self.fixed_columns is not None:
            num_idle = self.num_slots - len(self.rows)
            columns, newest = columns + [0] * num_idle, newest + [self.stopping.pad_token_id] * num_idle
            num_columns = self.fixed_columns
        column_N = torch.tensor(columns, device=self.device)
        self.cache.open(column_N, num_columns)
        is_token_NL = torch.arange(num_columns, device=self.device) <= column_N[:, None]
        logits_NV = self._forward(torch.tensor(newest, device=self.device)[:, None], is_token_NL, self.cache)
        draw(self.rows, logits_NV[: len(self.rows)], self.stopping.sampling)

    def _forward(self, input_NS: Tensor, is_token_NL: Tensor, cache: Cache) -> Tensor:
        """logits_NV at the last position; positions count the tokens before each, without the padding."""
        mask_NL = is_token_NL.to(self.device, torch.long)
        position_NS = (mask_NL.cumsum(-1) - 1).clamp_min(0)
        if cache is self.cache:
            position_NS = mask_NL.sum(-1, keepdim=True) - 1
        optional = {"position_ids": position_NS[:, -input_NS.shape[1] :], "logits_to_keep": 1}
        inputs = {name: value for name, value in optional.items() if name in self.takes}
        inputs |= {"input_ids": input_NS, "attention_mask": mask_NL, "past_key_values": cache, "use_cache": True}
        return call_model(self.model, inputs).logits[:, -1]

    def _evict_finished(self) -> Iterator[Decoded]:
        """Give the finished rows; the last row takes the slot of one that left."""
        for slot in reversed(range(len(self.rows))):
            decoded = self.rows[slot].finished(self.stopping)
            if decoded is None:
                continue
            last = self.rows.pop()
            if slot < len(self.rows):
                self.cache.move(len(self.rows), slot, last.num_cached)
                self.rows[slot] = last
            yield decoded


def common_prefix(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What all prompts begin with, and at least one token less than the shortest: each has something left to read."""
    first, last = min(prompts), max(prompts)  # in the order of words, these two share least
    stop = min(map(len, prompts)) - 1
    same = [one == other for one, other in zip(first[:stop], last[:stop], strict=True)]
    return first[: [*same, False].index(False)]
