"""Draw a batch's tokens where its logits are: the device is waited for once a token, on a GPU for the one before.

What a row draws depends on its own logits and its own random numbers only.

Shapes: B slots, N rows of a draw, T tokens of the longest completion, F numbers of a slot, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spd_dist.errors import DataError
from spd_dist.inference.requests import DecodeSettings, Request, Row
from spd_dist.inference.sampling import NOT_FINITE, UNCERTAIN, Sampling, choose, choose_of_all, entropies, uniforms

READ_LATE = {"cuda"}
"""Devices whose tokens are read while the next pass runs. A CPU has nothing to do meanwhile."""

TOKEN, COLUMN, COUNT, THINKING, LIMIT, OPEN, CLOSE = range(7)
"""Of a slot: its newest token, the column that it belongs in, how many were drawn; and of a thought with a budget,
whether it is open, the tokens that it may end behind, and its marks."""
NO_TOKEN = -9
Chooser = Callable[[Tensor, Tensor, Sampling, Tensor | None], Tensor]


class Unread(NamedTuple):
    """What was drawn and is on its way to the host."""

    rows: Sequence[Row]
    numbers_2N: Tensor
    """Tokens, or what stands in the place of one; and entropies where they are measured."""
    logits_NV: Tensor
    """For the rows that were left uncertain."""
    event: torch.cuda.Event | None


class Drawer:
    """The rows of a batch: `admit` some, `draw` a token for each, `remove` one; row n is in slot n.

    A row without a certain token stays as it is until its token is known: a pass meanwhile does its last one again.
    """

    def __init__(self, stopping: DecodeSettings, num_slots: int, device: torch.device) -> None:
        self.sampling, self.device = stopping.sampling, device
        self.lag = int(device.type in READ_LATE)
        self.rows: list[Row] = []
        self.unread: deque[Unread] = deque()
        self.slot_B = torch.arange(num_slots, device=device)
        self.idle_F = torch.tensor([stopping.pad_token_id, 0, 0, 0, 0, 0, 0], device=device)
        self.state_BF = self.idle_F.repeat(num_slots, 1)
        self.uniform_BT = torch.zeros(num_slots, self.sampling.max_new_tokens, dtype=torch.float64, device=device)
        self.seen_BV: Tensor | None = None
        self.has_budget = self.measures_entropy = False

    def newest(self, num_slots: int) -> tuple[Tensor, Tensor]:
        """token_N1 and column_N1 of the first slots; an idle one has the pad token in column 0."""
        state_NF = self.state_BF[:num_slots]
        return state_NF[:, TOKEN : TOKEN + 1], state_NF[:, COLUMN : COLUMN + 1]

    def admit(self, requests: Sequence[Request], vocabulary_size: int) -> None:
        """New rows, in the next free slots, that have drawn nothing yet."""
        slots = slice(len(self.rows), len(self.rows) + len(requests))
        state = [_first_state(request) for request in requests]
        self.state_BF[slots] = torch.tensor(state, device=self.device)
        # Drawn on the CPU, so that they are the same on every machine.
        uniform_NT = torch.stack([uniforms(request.seed, self.sampling.max_new_tokens) for request in requests])
        self.uniform_BT[slots] = uniform_NT.to(self.device)
        if self.sampling.repetition_penalty != 1:
            if self.seen_BV is None:
                shape = (len(self.slot_B), vocabulary_size)
                self.seen_BV = torch.zeros(shape, dtype=torch.bool, device=self.device)
            self.seen_BV[slots] = False
            for slot, request in enumerate(requests, slots.start):
                self.seen_BV[slot, torch.tensor(request.tokens, device=self.device)] = True
        self.has_budget |= any(request.budget is not None for request in requests)
        self.measures_entropy |= any(request.measures_entropy for request in requests)
        self.rows += [Row(request) for request in requests]

    def remove(self, slot: int) -> Row | None:
        """Take a row out; the last one takes its slot, and is given."""
        last = len(self.rows) - 1
        moved = self.rows.pop()
        if slot < last:
            self.rows[slot] = moved
            for held in (self.state_BF, self.uniform_BT, self.seen_BV):
                if held is not None:
                    held[slot] = held[last]
        self.state_BF[last] = self.idle_F
        return moved if slot < last else None

    def draw(self, logits_NV: Tensor, start: int = 0) -> None:
        """A token for each of the rows from slot `start` on; read what was drawn before, on a CPU this, too."""
        slot_N = self.slot_B[start : start + len(logits_NV)]
        self.unread.append(self._drawn(self.rows[start : start + len(logits_NV)], slot_N, logits_NV, choose))
        while len(self.unread) > self.lag:
            self._read()

    def read_all(self) -> None:
        """Wait for all that was drawn."""
        while self.unread:
            self._read()

    def _drawn(self, rows: Sequence[Row], slot_N: Tensor, logits_NV: Tensor, how: Chooser) -> Unread:
        state_NF = self.state_BF[slot_N]
        last = self.sampling.max_new_tokens - 1  # where a row is drawn for that has ended, and nobody knows yet
        uniform_N = self.uniform_BT[slot_N, state_NF[:, COUNT].clamp_max(last)]
        seen_NV = None if self.seen_BV is None else self.seen_BV[slot_N]
        token_N = self._advance(slot_N, state_NF, how(logits_NV, uniform_N, self.sampling, seen_NV))
        numbers = [token_N.double()]
        if self.measures_entropy:
            numbers.append(entropies(logits_NV).double())
        numbers_2N = torch.stack(numbers)
        event = None
        if self.lag and self.device.type == "cuda":
            numbers_2N, event = numbers_2N.to("cpu", non_blocking=True), torch.cuda.Event()
            event.record()
        for row in rows:
            row.num_drawn += 1
        return Unread(rows, numbers_2N, logits_NV, event)

    def _advance(self, slot_N: Tensor, state_NF: Tensor, drawn_N: Tensor) -> Tensor:
        """token_N: the drawn one, unless the thought has to end. Nothing moves where no token is known."""
        token_N = drawn_N
        if self.has_budget:
            is_thinking_N = state_NF[:, THINKING] > 0
            is_over_N = is_thinking_N & (state_NF[:, COUNT] >= state_NF[:, LIMIT]) & (drawn_N != NOT_FINITE)
            token_N = torch.where(is_over_N, state_NF[:, CLOSE], drawn_N)
            is_open_N = (token_N == state_NF[:, OPEN]) | (is_thinking_N & (token_N != state_NF[:, CLOSE]))
            state_NF[:, THINKING] = is_open_N
        is_known_N = token_N >= 0
        state_NF[:, TOKEN] = torch.where(is_known_N, token_N, state_NF[:, TOKEN])
        state_NF[:, COLUMN : COUNT + 1] += is_known_N[:, None]
        self.state_BF[slot_N] = state_NF
        if self.seen_BV is not None:
            self.seen_BV[slot_N, state_NF[:, TOKEN]] = True
        return token_N

    def _read(self) -> None:
        """The oldest tokens; all of them where one is uncertain: its row may have come to know it since."""
        uncertain: dict[Row, Tensor] = {}
        self._take(self.unread.popleft(), uncertain)
        while uncertain and self.unread:
            self._take(self.unread.popleft(), uncertain)
        if uncertain:
            rows = list(uncertain)
            slot_N = torch.tensor([self.rows.index(row) for row in rows], device=self.device)
            self._take(self._drawn(rows, slot_N, torch.stack(list(uncertain.values())), choose_of_all), {})

    def _take(self, unread: Unread, uncertain: dict[Row, Tensor]) -> None:
        if unread.event is not None:
            unread.event.synchronize()
        tokens, *entropy = unread.numbers_2N.tolist()
        for index, (row, token) in enumerate(zip(unread.rows, tokens, strict=True)):
            uncertain.pop(row, None)
            if row.is_done:
                continue
            if token == NOT_FINITE:
                raise DataError(
                    "the logits are NaN or infinite; check the weights, and model.dtype (float16 overflows easily)"
                )
            if token == UNCERTAIN:
                row.num_drawn -= 1
                uncertain[row] = unread.logits_NV[index]
            else:
                row.tokens.append(int(token))
                row.entropy += entropy[0][index] if entropy else 0.0


def _first_state(request: Request) -> list[int]:
    """Of a slot before its first draw: its prompt's last token, which the model has read."""
    newest = [request.tokens[-1], len(request.tokens) - 1, 0]
    budget = request.budget
    if budget is None:
        return [*newest, 0, 0, NO_TOKEN, NO_TOKEN]
    return [*newest, int(budget.is_open(request.tokens)), budget.num_tokens, budget.open_token, budget.close_token]
