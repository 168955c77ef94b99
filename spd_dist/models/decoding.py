"""Decode many prompts at once; what a row draws depends on its prompt and its seed only."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence

import torch
from transformers import PreTrainedModel

from spd_dist.errors import DataError
from spd_dist.models.out_of_memory import half_batch, is_out_of_memory
from spd_dist.models.rows import Decoded, Request, Stopping
from spd_dist.models.sampling import Sampling
from spd_dist.models.slot_loop import SlotLoop
from spd_dist.models.slots import num_slot_layers
from spd_dist.models.static_loop import StaticLoop
from spd_dist.types import Prompt

__all__ = ["Decoded", "Request", "Sampling", "check_context", "decode", "longest_first"]


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
    smaller: Callable[..., int] = half_batch,
) -> Generator[Decoded, None, None]:
    """Completions in the order in which they finish, of at most `batch_size` rows at a time.

    The longest prompts go first: what does not fit in memory fails early. Out of memory, the rows at hand start again
    in a batch of half the size; their samples stay the same.

    Float32 rounds alike enough in batches of any shape that tokens are the same. In bfloat16 they are the same only
    with `fixed_columns`: all passes of `batch_size` rows have that many columns, idle rows and columns included, and
    each prompt is read alone. That is slower, the more so the more columns are idle.

    Args:
        model: A causal LM in eval mode, whole or called in step with its other shards.
        requests: In any order.
        sampling: How tokens are drawn.
        eos_token_ids: Each ends a completion, and is its last token.
        pad_token_id: What rows are filled up with.
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
    check_context(model, ordered[0], sampling.max_new_tokens)
    stopping = Stopping(sampling, frozenset(eos_token_ids), pad_token_id)
    # Fixed shapes are those of the whole corpus: so is what they fit in, or the kind of loop would depend on the share.
    num_layers = num_slot_layers(model.config, fixed_columns or len(ordered[0].tokens) + sampling.max_new_tokens)
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
