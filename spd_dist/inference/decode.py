"""Decode many prompts at once; what a row draws depends on its prompt and its seed only."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel

from spd_dist.errors import DataError
from spd_dist.inference.compiled_pass import stays_plain
from spd_dist.inference.continuous import ContinuousBatcher
from spd_dist.inference.drawing import Drawer
from spd_dist.inference.kv_cache import num_slot_layers
from spd_dist.inference.requests import Decoded, DecodeSettings, Request, half_batch, is_out_of_memory
from spd_dist.types import Prompt


class StaticLoop:
    """Batches of prompts of like length; a batch ends with its longest completion."""

    def __init__(self, model: PreTrainedModel, stopping: DecodeSettings, batch_size: int) -> None:
        self.model, self.stopping, self.batch_size = model, stopping, batch_size
        self.waiting: list[Request] = []
        if stopping.compiled is not None:
            stays_plain("a cache of more than plain keys and values, or one row of fixed shape")

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
        model: Any = self.model  # transformers types no `generate` of a PreTrainedModel
        device = next(self.model.parameters()).device
        width = max(len(request.tokens) for request in batch)
        pad = self.stopping.pad_token_id
        input_NS = torch.tensor([[pad] * (width - len(one.tokens)) + list(one.tokens) for one in batch], device=device)
        pads_N = torch.tensor([width - len(request.tokens) for request in batch], device=device)
        mask_NS = (torch.arange(width, device=device) >= pads_N[:, None]).long()
        processor = Drawing(batch, self.stopping, device)
        with pinned(self.model, self.stopping) as settings:
            model.generate(
                input_NS,
                attention_mask=mask_NS,
                generation_config=settings,
                logits_processor=[processor],
                synced_gpus=False,  # transformers would decide by itself that ranks wait for each other
            )
        return [_whole(row.finished(self.stopping)) for row in processor.drawer.rows]


def _whole(decoded: Decoded | None) -> Decoded:
    assert decoded is not None  # `generate` ends where every row has
    return decoded


class Drawing(LogitsProcessor):
    """Draws each row's token itself, and gives it the only finite score."""

    def __init__(self, batch: Sequence[Request], stopping: DecodeSettings, device: torch.device) -> None:
        self.batch, self.stopping = batch, stopping
        self.drawer = Drawer(stopping, len(batch), device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores in which one token a row is possible: the drawn one, or the pad of a row that has ended."""
        drawer = self.drawer
        if not drawer.rows:
            drawer.admit(self.batch, scores.shape[-1])
        drawer.draw(scores)
        drawer.read_all()
        pad = self.stopping.pad_token_id
        token_N1 = torch.tensor([[pad if row.is_done else row.tokens[-1]] for row in drawer.rows], device=scores.device)
        for row in drawer.rows:
            row.is_done = row.finished(self.stopping) is not None
        return torch.full_like(scores, -torch.inf).scatter_(1, token_N1, 0.0)


@contextmanager
def pinned(model: PreTrainedModel, stopping: DecodeSettings) -> Generator[GenerationConfig]:
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


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    requests: Iterable[Request],
    settings: DecodeSettings,
    *,
    batch_size: int = 32,
    fixed_columns: int | None = None,
    smaller: Callable[..., int] = half_batch,
) -> Generator[Decoded, None, None]:
    """Completions in the order in which they finish, of at most `batch_size` rows at a time.

    The longest prompts go first: what does not fit in memory fails early. Out of memory, the rows at hand start again
    in a batch of half the size; their samples stay the same.

    Float32 rounds alike enough in batches of any shape that tokens are the same. In bfloat16 they are the same only
    with `fixed_columns`: all passes of `batch_size` rows have that many columns, idle rows and columns included, and
    each prompt is read alone. That is slower, the more so the more columns are idle. With a `batch_size` of 1 besides,
    nothing is idle: a row has the passes of transformers' own `generate`, and their logits bit by bit.

    Args:
        model: A causal LM in eval mode, whole or called in step with its other shards.
        requests: In any order.
        settings: How tokens are drawn, and what ends a completion.
        batch_size: Rows of a pass.
        fixed_columns: At least the longest prompt and `max_new_tokens`; the same in every run that is to agree.
        smaller: Gives the batch to go on with when memory runs out for one, or its error: `half_batch` with settings.

    Raises:
        DataError: a prompt that with `max_new_tokens` exceeds the model's context; logits that are NaN; memory that
            runs out for good.
    """
    ordered = longest_first(requests)
    if not ordered:
        return
    max_new_tokens = settings.sampling.max_new_tokens
    check_context(model, ordered[0], max_new_tokens)
    # Fixed shapes are those of the whole corpus: so is what they fit in, or the kind of loop would depend on the share.
    num_layers = num_slot_layers(model.config, fixed_columns or len(ordered[0].tokens) + max_new_tokens)
    while ordered:
        if num_layers and not (fixed_columns and batch_size == 1):
            num_slots = batch_size if fixed_columns else min(batch_size, len(ordered))
            loop = ContinuousBatcher(model, settings, num_layers, num_slots, fixed_columns)
        elif settings.contrast is not None:
            raise DataError(
                f"generate.contrast: {settings.contrast.beta:g} needs two caches of plain keys and values, which this "
                "model or a single row of fixed shape does not have; set generate.contrast=1"
            )
        else:
            loop = StaticLoop(model, settings, 1 if fixed_columns else batch_size)
        try:
            yield from loop.run(ordered)
            return
        except RuntimeError as error:
            if not is_out_of_memory(str(error)):
                raise
            batch_size = smaller(batch_size, is_fixed=fixed_columns is not None)
        ordered = longest_first(loop.unfinished())
        del loop
        torch.cuda.empty_cache()


def longest_first(requests: Iterable[Request]) -> list[Request]:
    """In the order in which they are decoded."""
    return sorted(requests, key=lambda request: (-len(request.tokens), request.id, request.sample))


def check_context(
    model: PreTrainedModel, longest: Request | Prompt, max_new_tokens: int, *, section: str = "generate"
) -> None:
    """Refuse what the model has no positions for.

    Raises:
        DataError: naming the prompt.
    """
    settings = model.config.get_text_config().to_dict()
    context = settings.get("max_position_embeddings") or settings.get("n_positions")
    num_tokens = len(longest.tokens)
    if context is not None and num_tokens + max_new_tokens > context:
        raise DataError(
            f"prompt {longest.id!r} has {num_tokens} tokens, with {section}.max_new_tokens={max_new_tokens} it takes "
            f"{num_tokens + max_new_tokens}, and the model's context is {context}; lower one of them"
        )
