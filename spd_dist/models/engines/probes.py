"""Does an engine run the projected policy? Its greedy tokens must be those of the hooked reference.

Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spd_dist.errors import DataError
from spd_dist.models.decoding import Decoded, Request, Sampling
from spd_dist.models.policy import Policy
from spd_dist.models.rows import Stopping
from spd_dist.models.static_loop import pinned

NUM_PROBES = 2
GREEDY = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=8)
CLOSE_LOGITS = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
"""Rounding may decide between two tokens whose logits are as close as this."""


class Reference(NamedTuple):
    """What the policy itself answers."""

    request: Request
    tokens: tuple[int, ...]
    logits_TV: Tensor


@torch.no_grad()
def references(policy: Policy, probes: Sequence[Request]) -> list[Reference]:
    """Greedy answers of the policy as it is now (projected, placed) by `model.generate`, alone and without padding."""
    stopping = Stopping(GREEDY, frozenset(policy.eos_token_ids), policy.pad_token_id)
    device = next(policy.model.parameters()).device
    found = []
    for request in probes:
        input_1S = torch.tensor([request.tokens], device=device)
        with pinned(policy.model, stopping) as settings:
            settings.output_logits, settings.return_dict_in_generate = True, True
            output = policy.model.generate(
                input_1S, attention_mask=torch.ones_like(input_1S), generation_config=settings, synced_gpus=False
            )
        tokens = tuple(output.sequences[0, len(request.tokens) :].tolist())
        found.append(Reference(request, tokens, torch.cat(output.logits).float().cpu()))
    return found


def check_probes(engine: str, expected: Sequence[Reference], found: Iterable[Decoded], dtype: torch.dtype) -> None:
    """Compare token by token, up to the first that rounding explains.

    Raises:
        DataError: an answer is missing, or another.
    """
    tokens_of = {(one.request.id, one.request.sample): one.tokens for one in found}
    for reference in expected:
        tokens = tokens_of.get((reference.request.id, reference.request.sample), ())
        index = _first_difference(reference.tokens, tokens)
        if index is None or _is_close(reference, tokens, index, CLOSE_LOGITS[dtype]):
            continue
        raise DataError(
            f"generate.engine={engine}: the greedy answer to prompt {reference.request.id!r} differs from the "
            f"projected policy's at token {index} ({tokens[index : index + 1]} instead of "
            f"{reference.tokens[index : index + 1]}): the engine does not run that policy; set generate.engine=hf"
        )


def _first_difference(left: tuple[int, ...], right: tuple[int, ...]) -> int | None:
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        if one != other:
            return index
    return None if len(left) == len(right) else min(len(left), len(right))


def _is_close(reference: Reference, tokens: tuple[int, ...], index: int, limit: float) -> bool:
    if index >= min(len(tokens), len(reference.tokens)):
        return False
    logits_V = reference.logits_TV[index]
    return bool(logits_V[reference.tokens[index]] - logits_V[tokens[index]] <= limit)
