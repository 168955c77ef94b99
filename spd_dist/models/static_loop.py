"""Static batches through `model.generate`, for models whose cache is more than keys and values in columns.

The tokens are drawn as everywhere else: a logits processor leaves `generate` no choice.

Shapes: N rows, S tokens of the longest prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel

from spd_dist.models.rows import Decoded, Request, Row, Stopping, draw, new_row


class StaticLoop:
    """Batches of prompts of like length; a batch ends with its longest completion."""

    def __init__(self, model: PreTrainedModel, stopping: Stopping, batch_size: int) -> None:
        self.model, self.stopping, self.batch_size = model, stopping, batch_size
        self.waiting: list[Request] = []

    def run(self, requests: Sequence[Request]) -> Iterator[Decoded]:
        """Decode all of them, in the order in which they are given."""
        self.waiting = list(requests)
        while self.waiting:
            batch = self.waiting[: self.batch_size]
            decoded = self._decode(batch)
            del self.waiting[: len(batch)]
            yield from decoded

    def unfinished(self) -> list[Request]:
        """What is still to be done, from its beginning."""
        return list(self.waiting)

    def _decode(self, batch: Sequence[Request]) -> list[Decoded]:
        device = next(self.model.parameters()).device
        width = max(len(request.tokens) for request in batch)
        pad = self.stopping.pad_token_id
        input_NS = torch.tensor([[pad] * (width - len(one.tokens)) + list(one.tokens) for one in batch], device=device)
        pads_N = torch.tensor([width - len(request.tokens) for request in batch], device=device)
        mask_NS = (torch.arange(width, device=device) >= pads_N[:, None]).long()
        processor = Drawing(batch, self.stopping)
        with pinned(self.model, self.stopping) as settings:
            self.model.generate(
                input_NS,
                attention_mask=mask_NS,
                generation_config=settings,
                logits_processor=[processor],
                synced_gpus=False,  # transformers would decide by itself that ranks wait for each other
            )
        return [row.finished(self.stopping) for row in processor.rows]


class Drawing(LogitsProcessor):
    """Draws each row's token itself, and gives it the only finite score."""

    def __init__(self, batch: Sequence[Request], stopping: Stopping) -> None:
        self.batch, self.stopping = batch, stopping
        self.rows: list[Row] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores in which one token a row is possible: the drawn one, or the pad of a row that has ended."""
        if not self.rows:
            shape = {"vocabulary_size": scores.shape[-1], "device": scores.device}
            self.rows = [new_row(request, self.stopping.sampling, **shape) for request in self.batch]
        live = [index for index, row in enumerate(self.rows) if not row.tokens or row.finished(self.stopping) is None]
        draw([self.rows[index] for index in live], scores[live], self.stopping.sampling)
        token_N = torch.full((len(self.rows), 1), self.stopping.pad_token_id)
        token_N[live, 0] = torch.tensor([self.rows[index].tokens[-1] for index in live])
        return torch.full_like(scores, -torch.inf).scatter_(1, token_N.to(scores.device), 0.0)


@contextmanager
def pinned(model: PreTrainedModel, stopping: Stopping) -> Iterator[GenerationConfig]:
    """Greedy settings in full: within this context nothing is inherited from the model's own generation config."""
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=stopping.sampling.max_new_tokens,
        eos_token_id=sorted(stopping.eos_token_ids),
        pad_token_id=stopping.pad_token_id,
    )
    inherited, model.generation_config = model.generation_config, settings
    try:
        yield settings
    finally:
        model.generation_config = inherited
