"""The corpus of the termination control: what plain self-retraining learns from, but that everything in it ends."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Sequence

from spd_dist.types import Completion

ENDS = (".", "!", "?", "\n")


def ended(
    completions: Sequence[Completion], decode: Callable[[list[int]], str], *, eos_token_ids: Collection[int]
) -> list[Completion]:
    """Every completion with an end: one that was cut at the limit ends behind its last whole sentence or line.

    Without one it ends in place of its last token. The end is the token by which the others end, else the smallest id.
    A student of these learns to stop, and nothing else that a student of `completions` does not.
    """
    last = Counter(one.tokens[-1] for one in completions if one.finish_reason == "stop" and one.tokens)
    (end, _), *_ = last.most_common(1) or [(min(eos_token_ids), 0)]
    return [one if one.finish_reason == "stop" else _ended(one, decode, end) for one in completions]


def _ended(completion: Completion, decode: Callable[[list[int]], str], end: int) -> Completion:
    stops = [number for number, token in enumerate(completion.tokens, 1) if decode([token]).endswith(ENDS)]
    kept = completion.tokens[: stops[-1] if stops else len(completion.tokens) - 1]
    return dataclasses.replace(completion, tokens=(*kept, end), text=decode(list(kept)), finish_reason="stop")
