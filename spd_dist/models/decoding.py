"""Decode many prompts at once; what a row draws depends on its prompt and its seed only."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence

import torch
from transformers import PreTrainedModel

from spd_dist.errors import DataError
from spd_dist.models.rows import Decoded, Request, Stopping
from spd_dist.models.sampling import Sampling
from spd_dist.models.slot_loop import SlotLoop
from spd_dist.models.slots import num_slot_layers
from spd_dist.models.static_loop import StaticLoop

__all__ = ["Decoded", "Request", "Sampling", "decode"]

log = logging.getLogger(__name__)


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    requests: Iterable[Request],
    sampling: Sampling,
    *,
    eos_token_ids: Sequence[int],
    pad_token_id: int,
    batch_size: int = 32,
    fixed_columns: int | None = None,
    halve: bool = True,
) -> Iterator[Decoded]:
    """Completions in the order in which they finish, of at most `batch_size` rows at a time.

    The longest prompts go first: what does not fit in memory fails early. Out of memory, the rows at hand start again
    in a batch of half the size; their samples stay the same.

    Float32 rounds alike enough in batches of any shape that tokens are the same. In bfloat16 they are the same only
    with `fixed_columns`: all passes of `batch_size` rows have that many columns, idle rows and columns included, and
    each prompt is read alone. On a CPU that costs about a third of the speed, and more the more columns are idle.

    Args:
        model: A causal LM in eval mode, whole or called in step with its other shards.
        requests: In any order.
        sampling: How tokens are drawn.
        eos_token_ids: Each ends a completion, and is its last token.
        pad_token_id: What rows are filled up with.
        batch_size: Rows of a pass.
        fixed_columns: At least the longest prompt and `max_new_tokens`; the same in every run that is to agree.
        halve: Whether to go on with half the batch when memory runs out; not where other ranks keep in step.

    Raises:
        DataError: a prompt that with `max_new_tokens` exceeds the model's context; logits that are NaN; memory that
            runs out for good.
    """
    ordered = sorted(requests, key=lambda request: (-len(request.tokens), request.id, request.sample))
    if not ordered:
        return
    max_length = len(ordered[0].tokens) + sampling.max_new_tokens
    check_context(model, ordered[0], max_length)
    stopping = Stopping(sampling, frozenset(eos_token_ids), pad_token_id)
    num_layers = num_slot_layers(model.config, max_length)
    while ordered:
        if num_layers:
            num_slots = batch_size if fixed_columns else min(batch_size, len(ordered))
            loop = SlotLoop(model, stopping, num_layers, num_slots, fixed_columns)
        else:
            loop = StaticLoop(model, stopping, 1 if fixed_columns else batch_size)
        try:
            yield from loop.run(ordered)
            return
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if batch_size == 1 or fixed_columns or not halve:
                raise DataError(
                    f"out of memory with generate.batch_size={batch_size}; lower generate.batch_size, "
                    "generate.max_new_tokens or data.max_prompt_tokens, or set generate.placement=layerwise"
                ) from error
        ordered, batch_size = loop.unfinished(), batch_size // 2
        del loop
        torch.cuda.empty_cache()
        log.warning("generate: out of memory; going on with generate.batch_size=%d", batch_size)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed, on an accelerator or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def check_context(model: PreTrainedModel, longest: Request, max_length: int) -> None:
    """Refuse what the model has no positions for.

    Raises:
        DataError: naming the prompt.
    """
    settings = model.config.get_text_config().to_dict()
    context = settings.get("max_position_embeddings") or settings.get("n_positions")
    if context is not None and max_length > context:
        num_tokens = len(longest.tokens)
        raise DataError(
            f"prompt {longest.id!r} has {num_tokens} tokens, with generate.max_new_tokens={max_length - num_tokens} it "
            f"takes {max_length}, and the model's context is {context}; lower one of them"
        )
