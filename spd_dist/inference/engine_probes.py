"""Does an engine run the projected policy? Its greedy tokens must be those of the hooked reference.

That says something only where the unprojected policy would have answered otherwise: such prompts are looked for.

Shapes: S tokens of a prompt, T tokens of an answer, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spd_dist.errors import DataError
from spd_dist.inference.decode import pinned
from spd_dist.inference.requests import Decoded, DecodeSettings, Request
from spd_dist.inference.sampling import Sampling
from spd_dist.models.policy import Policy
from spd_dist.projection.hooks import ProjectionMonitor, projected
from spd_dist.projection.operators import is_identity
from spd_dist.types import Projection

log = logging.getLogger(__name__)

NUM_PROBES = 2
MAX_CANDIDATES = 6
MAX_TOKENS = 16
CLOSE_LOGITS = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}
"""Rounding may decide between two tokens whose logits are as close as this."""


class Reference(NamedTuple):
    """What the policy itself answers."""

    request: Request
    tokens: tuple[int, ...]
    logits_TV: Tensor


class References(NamedTuple):
    """The policy's own answers to a few prompts, under the projection's hooks."""

    answers: list[Reference]
    sampling: Sampling
    monitor: ProjectionMonitor | None
    """Calls and leakage of the hooks at the last of them."""


@torch.no_grad()
def references(
    policy: Policy, projection: Projection | None, candidates: Iterable[Request], max_new_tokens: int
) -> References:
    """Greedy answers of the untouched, placed policy by `model.generate`: each alone, without padding, by hooks.

    Of `candidates` those are preferred to which the unprojected policy answers otherwise. If there is none, the log
    says that nothing was shown.
    """
    sampling = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=min(MAX_TOKENS, max_new_tokens))
    if projection is None:
        answers = [_answer(policy, request, sampling) for request in islice(candidates, NUM_PROBES)]
        return References(answers, sampling, None)
    telling, others, monitor = [], [], ProjectionMonitor(projection.operators, observe=0)
    for request in islice(candidates, MAX_CANDIDATES):
        with projected(policy.model, projection, "hook") as last:
            answer, monitor = _answer(policy, request, sampling), last
        plain = _answer(policy, request, sampling)
        (others if agrees(answer, plain.tokens, policy.model.dtype) else telling).append(answer)
        if len(telling) == NUM_PROBES:
            break
    if others and not telling and not all(map(is_identity, projection.operators.values())):
        log.warning(
            "generate: the projected and the unprojected policy begin their greedy answers to %d prompts alike, so "
            "that the engine's answers do not show which of them it runs",
            len(others),
        )
    return References([*telling, *others][:NUM_PROBES], sampling, monitor)


def _answer(policy: Policy, request: Request, sampling: Sampling) -> Reference:
    stopping = DecodeSettings(sampling, frozenset(policy.eos_token_ids), policy.pad_token_id)
    model: Any = policy.model  # transformers types no `generate` of a PreTrainedModel
    input_1S = torch.tensor([request.tokens], device=next(policy.model.parameters()).device)
    with pinned(policy.model, stopping) as settings:
        settings.output_logits, settings.return_dict_in_generate = True, True
        output = model.generate(
            input_1S, attention_mask=torch.ones_like(input_1S), generation_config=settings, synced_gpus=False
        )
    tokens = tuple(output.sequences[0, len(request.tokens) :].tolist())
    return Reference(request, tokens, torch.cat(output.logits).float().cpu())


def check_probes(
    engine: str,
    expected: Sequence[Reference],
    found: Iterable[Decoded],
    dtype: torch.dtype,
    *,
    section: str = "generate",
) -> None:
    """Compare token by token, up to the first that rounding explains.

    Raises:
        DataError: an answer is missing, or another.
    """
    tokens_of = {(one.request.id, one.request.sample): one.tokens for one in found}
    for reference in expected:
        tokens = tokens_of.get((reference.request.id, reference.request.sample), ())
        index = _first_difference(reference.tokens, tokens)
        if index is None or agrees(reference, tokens, dtype):
            continue
        raise DataError(
            f"{section}.engine={engine}: the greedy answer to prompt {reference.request.id!r} differs from the "
            f"projected policy's at token {index} ({tokens[index : index + 1]} instead of "
            f"{reference.tokens[index : index + 1]}): the engine does not run that policy; set {section}.engine=hf"
        )


def agrees(reference: Reference, tokens: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether `tokens` are the reference's, up to the first that rounding explains."""
    index = _first_difference(reference.tokens, tokens)
    return index is None or _is_close(reference, tokens, index, CLOSE_LOGITS[dtype])


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
