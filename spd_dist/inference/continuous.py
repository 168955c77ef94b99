"""The decode loop: a finished row leaves the batch at once, and the next prompt takes its slot.

A pass waits for the device once, to read tokens (`drawing.py`); what it needs is there already, and changed in place.

Shapes: N rows of a pass, S tokens of the longest prompt among them, L columns of the window, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from spd_dist.inference.drawing import Drawer
from spd_dist.inference.kv_cache import SlotCache, prefill_cache
from spd_dist.inference.packed_weights import packed_weights
from spd_dist.inference.requests import Decoded, DecodeSettings, Request
from spd_dist.models.forward import call_model

MIN_PREFIX_TOKENS = 8  # a shorter beginning that all prompts share is not worth a pass of its own
MAX_PREFILL_TOKENS = 4096
"""Of a pass. A longer prompt is read in several, between which the rows at hand go on."""


class Prefilled(NamedTuple):
    """A prompt that the model has read."""

    caches: Sequence[Cache]
    """Of each policy."""
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
        weight = next(model.parameters())
        self.device = weight.device
        self.is_16_bit_cpu = self.device.type == "cpu" and weight.element_size() == 2
        # A pass over one prompt keeps a CPU as busy as one over many; an accelerator is kept waiting by small ones.
        self.min_group = 1 if self.device.type == "cpu" else max(1, num_slots // 8)
        self.drawer = Drawer(stopping, num_slots, self.device)
        self.rows = self.drawer.rows
        self.waiting: deque[Request] = deque()
        self.prefix: tuple[int, ...] = ()
        self.prefix_caches: Sequence[Cache | None] = [None] if stopping.contrast is None else [None, None]
        self.last_read: dict[tuple[int, ...], Prefilled] = {}
        self.compiled = stopping.compiled

    def run(self, requests: Sequence[Request]) -> Iterator[Decoded]:
        """Decode all of them, in the order in which they are given."""
        self.waiting.extend(requests)
        is_compiled = self.compiled is not None and self.compiled.is_on  # no compiler sees into packed weights
        is_packed = self.stopping.is_whole and not is_compiled
        with packed_weights(self.model) if is_packed else nullcontext():
            yield from self._run(requests)

    def _run(self, requests: Sequence[Request]) -> Iterator[Decoded]:
        num_columns = self.fixed_columns or _longest(requests) + self.stopping.sampling.max_new_tokens
        self.caches = [SlotCache(self.num_layers, self.num_slots, num_columns) for _ in self.prefix_caches]
        self.column_L = torch.arange(num_columns, device=self.device)
        self.mask_BL = torch.zeros(self.num_slots, num_columns, dtype=torch.long, device=self.device)
        if self.fixed_columns is None:
            self._read_common_prefix(requests)
        while self.waiting or self.rows:
            while self.waiting and self._has_room():
                group = self._next_group()
                for _ in self._read(list(dict.fromkeys(one.tokens for one in group))):
                    yield from self._step()
                self._admit(group)
                yield from self._evict_finished()
            yield from self._step()

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
        caches = [prefill_cache(self.num_layers) for _ in self.prefix_caches]
        input_1S = torch.tensor([shared], device=self.device)
        for _ in self._prefill(input_1S, torch.ones_like(input_1S), caches):
            pass  # there is no row yet that could go on
        self.prefix, self.prefix_caches = shared, caches

    def _next_group(self) -> list[Request]:
        """The next prompts to read together: the longest comes first, so that it sets the padding."""
        free = 1 if self.fixed_columns is not None else self.num_slots - len(self.rows)
        fitting = max(1, MAX_PREFILL_TOKENS // len(self.waiting[0].tokens))
        return list(islice(self.waiting, min(free, fitting)))

    def _admit(self, group: list[Request]) -> None:
        """Make rows of prompts that were read, and draw their first tokens; each waits until then: none gets lost."""
        read, start = [self.last_read[request.tokens] for request in group], len(self.rows)
        logits_NV = torch.stack([one.logits_V for one in read])
        for slot, (request, one) in enumerate(zip(group, read, strict=True), start):
            for cache, read_cache in zip(self.caches, one.caches, strict=True):
                cache.admit(read_cache, one.row, slot, prefix=len(self.prefix), num_columns=len(request.tokens))
        self.drawer.admit(group, logits_NV.shape[-1])
        for _ in group:
            self.waiting.popleft()
        self.drawer.draw(logits_NV, start)
        self.last_read = {group[-1].tokens: read[-1]}  # further samples of that prompt may follow

    def _read(self, wanted: list[tuple[int, ...]]) -> Iterator[None]:
        """Read the prompts that were not read last; it gives way between two passes."""
        prompts = [prompt for prompt in wanted if prompt not in self.last_read]
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
        column_S = self.column_L[:width]
        is_token_NS = (column_S < start) | (column_S >= start + torch.tensor(pads, device=self.device)[:, None])
        caches = [prefill_cache(self.num_layers, prefix, len(prompts)) for prefix in self.prefix_caches]
        logits_NV = yield from self._prefill(input_NS, is_token_NS.long(), caches)
        self.last_read |= {
            prompt: Prefilled(caches, row, logits_V)
            for row, (prompt, logits_V) in enumerate(zip(prompts, logits_NV, strict=True))
        }

    def _prefill(self, input_NS: Tensor, mask_NL: Tensor, caches: Sequence[Cache]) -> Generator[None, None, Tensor]:
        """logits_NV at the last position; positions count the tokens before each, without the padding."""
        num_rows, width = input_NS.shape
        position_NS = (mask_NL.cumsum(-1) - 1).clamp_min(0)[:, -width:]
        most, last = max(1, MAX_PREFILL_TOKENS // num_rows), 0
        for stop in range(most, width, most):
            first, last = last, stop
            mask_so_far = mask_NL[:, : stop - width]
            self._forward(input_NS[:, first:stop], mask_so_far, position_NS[:, first:stop], caches)
            yield
        return self._forward(input_NS[:, last:], mask_NL, position_NS[:, last:], caches)

    def _step(self) -> Iterator[Decoded]:
        """One token for every row; what is finished by it."""
        if not self.rows:
            return
        num_rows, num_columns = len(self.rows), max(row.num_cached for row in self.rows) + 1
        if self.fixed_columns is not None:
            num_rows, num_columns = self.num_slots, self.fixed_columns
        elif self.compiled is not None:
            num_rows, num_columns = self.compiled.shape(num_rows, num_columns, *self.mask_BL.shape)
        token_N1, column_N1 = self.drawer.newest(num_rows)
        for cache in self.caches:
            cache.open(column_N1[:, 0], num_columns)
        mask_NL = self.mask_BL[:num_rows, :num_columns]
        mask_NL.copy_(self.column_L[:num_columns] <= column_N1)
        logits_NV = self._forward(token_N1, mask_NL, column_N1, self.caches)
        self.drawer.draw(logits_NV[: len(self.rows)])
        yield from self._evict_finished()

    def _forward(self, input_NS: Tensor, mask_NL: Tensor, position_NS: Tensor, caches: Sequence[Cache]) -> Tensor:
        """logits_NV that are drawn from, after a pass of each policy."""
        contrast, own_NV = self.stopping.contrast, self._pass(input_NS, mask_NL, position_NS, caches[0])
        if contrast is None:
            return own_NV
        with contrast.without():
            return contrast.logits(self._pass(input_NS, mask_NL, position_NS, caches[1]), own_NV)

    def _pass(self, input_NS: Tensor, mask_NL: Tensor, position_NS: Tensor, cache: Cache) -> Tensor:
        num_rows, width = input_NS.shape
        # The last states as a slice are no matrix, and a CPU multiplies them row by row, in 16 bits without its fast
        # kernels: 4.9 s where 32 rows that are taken by their index need 0.02 (49152 words, 576 wide, one thread).
        is_slow = self.is_16_bit_cpu and num_rows > 1 and width > 1
        optional = {"position_ids": position_NS, "logits_to_keep": torch.tensor([width - 1]) if is_slow else 1}
        inputs = {name: value for name, value in optional.items() if name in self.takes}
        inputs |= {"input_ids": input_NS, "attention_mask": mask_NL, "past_key_values": cache, "use_cache": True}
        if self.compiled is not None and isinstance(cache, SlotCache):
            return self.compiled.logits(inputs)[:, -1]
        return call_model(self.model, inputs).logits[:, -1]

    def _evict_finished(self) -> Iterator[Decoded]:
        """Give the finished rows; the last row takes the slot of one that left."""
        for slot in reversed(range(len(self.rows))):
            row = self.rows[slot]
            decoded = row.finished(self.stopping)
            if decoded is None:
                continue
            row.is_done = True
            last = self.drawer.remove(slot)
            if last is not None:
                for cache in self.caches:
                    cache.move(len(self.rows), slot, last.num_cached)
            yield decoded


def _longest(requests: Sequence[Request]) -> int:
    return max(len(request.tokens) for request in requests)


def common_prefix(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What all prompts begin with, and at least one token less than the shortest: each has something left to read."""
    first, last = min(prompts), max(prompts)  # in the order of words, these two share least
    stop = min(map(len, prompts)) - 1
    same = [one == other for one, other in zip(first[:stop], last[:stop], strict=True)]
    return first[: [*same, False].index(False)]
