"""The next token, chosen row by row: what a row draws depends on its own logits and its own random numbers only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

NUM_CANDIDATES = 64  # the nucleus nearly always lies within so many; where it does not, all tokens are sorted
ENTROPY_ROWS = {"cpu": 1}
"""Rows whose probabilities are held at a time, by device: a core's cache holds no more. Elsewhere 16: few launches."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn and when a completion is cut: all of it, nothing comes from the model's own settings."""

    temperature: float = 0.7
    """0 is greedy, and the truncations then change nothing."""
    top_p: float = 0.9
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 256

    @property
    def truncates(self) -> bool:
        """Whether some tokens are never drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


SUGGESTED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def suggested_decoding(model: PreTrainedModel) -> dict[str, float]:
    """What the model's `generation_config.json` asks for, by its own names; nothing here takes it."""
    own: Any = model.generation_config  # None is left out of its type
    values = {name: vars(own).get(name) for name in SUGGESTED if own is not None}
    return {name: float(value) for name, value in values.items() if value is not None}


def uniforms(seed: int, num_tokens: int) -> Tensor:
    """uniform_T in [0, 1), float64: the random numbers of one completion; a longer one begins with the same."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(num_tokens, generator=generator, dtype=torch.float64)


def entropies(logits_NV: Tensor) -> Tensor:
    """entropy_N in nats of what each row's logits give the tokens, float32: at temperature 1, before any truncation."""
    parts = logits_NV.split(ENTROPY_ROWS.get(logits_NV.device.type, 16))  # the copies are as wide as V
    return torch.cat([torch.special.entr(part.float().softmax(-1)).sum(-1) for part in parts])


UNCERTAIN, NOT_FINITE = -1, -2
"""In the place of a token: of a row whose nucleus is wider than the candidates, and of one without a finite logit."""


def choose(logits_NV: Tensor, uniform_N: Tensor, sampling: Sampling, seen_NV: Tensor | None = None) -> Tensor:
    """token_N: greedy, or by inverting each row's truncated distribution function at its uniform number.

    The device is not waited for: in a token's place stands what else must be known of its row, `UNCERTAIN`, to which
    `choose_of_all` gives the token, or `NOT_FINITE`.

    Penalty, temperature, top-k, top-p and min-p apply in this order, as in transformers; ties go to the lower token.
    The distribution function runs over token ids, not over ranks: rounding that swaps two nearly equal logits then
    moves an interval's edge by 1e-7 and not the interval.

    Args:
        logits_NV: the model's logits; taken to float32.
        uniform_N: one number in [0, 1) a row, float64; unused when greedy.
        sampling: what is drawn from.
        seen_NV: tokens of the prompt and of the completion so far, for the repetition penalty.
    """
    score_NV = _penalised(logits_NV, sampling, seen_NV)
    top_N1 = score_NV.amax(-1, keepdim=True)
    if sampling.temperature == 0:
        token_N = score_NV.argmax(-1)
    else:
        token_N = _draw_once((score_NV - top_N1) / sampling.temperature, uniform_N, sampling)
    return token_N.where(top_N1[:, 0].isfinite(), NOT_FINITE)


def choose_of_all(logits_NV: Tensor, uniform_N: Tensor, sampling: Sampling, seen_NV: Tensor | None = None) -> Tensor:
    """token_N of rows that `choose` left uncertain: all tokens are sorted, not a few candidates."""
    score_NV = _penalised(logits_NV, sampling, seen_NV)
    score_NV = (score_NV - score_NV.amax(-1, keepdim=True)) / sampling.temperature
    sorted_NV, order_NV = score_NV.sort(dim=-1, descending=True, stable=True)
    return _draw(sorted_NV, order_NV, score_NV, uniform_N, sampling)[0]


def _penalised(logits_NV: Tensor, sampling: Sampling, seen_NV: Tensor | None) -> Tensor:
    score_NV = logits_NV.float()
    if seen_NV is None:
        return score_NV
    penalty = sampling.repetition_penalty
    return torch.where(seen_NV, torch.where(score_NV < 0, score_NV * penalty, score_NV / penalty), score_NV)


def _draw_once(score_NV: Tensor, uniform_N: Tensor, sampling: Sampling) -> Tensor:
    """The truncations keep a prefix of the ranking, so that a few candidates suffice if they outnumber what is kept."""
    if not sampling.truncates:
        return _inverse_distribution(score_NV.double().exp(), uniform_N)
    num_candidates = min(score_NV.shape[-1], max(NUM_CANDIDATES, 2 * sampling.top_k))
    score_NK, token_NK = score_NV.topk(num_candidates, dim=-1)
    token_N, is_certain_N = _draw(*_ranked(score_NK, token_NK), score_NV, uniform_N, sampling)
    return token_N.where(is_certain_N, UNCERTAIN)


def _ranked(score_NK: Tensor, token_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Strongest first, ties by token: `topk` promises no order among ties."""
    token_NK, order_NK = token_NK.sort(dim=-1)
    score_NK, rank_NK = score_NK.gather(-1, order_NK).sort(dim=-1, descending=True, stable=True)
    return score_NK, token_NK.gather(-1, rank_NK)


def _draw(
    score_NK: Tensor, token_NK: Tensor, score_NV: Tensor, uniform_N: Tensor, sampling: Sampling
) -> tuple[Tensor, Tensor]:
    """token_N from ranked candidates, and whether no token outside them could have been kept."""
    weight_NK = score_NK.double().exp()
    is_kept_NK = torch.ones_like(weight_NK, dtype=torch.bool)
    mass_N1 = score_NV.exp().sum(-1, keepdim=True).double()
    if sampling.top_k > 0:
        is_kept_NK[:, sampling.top_k :] = False
        mass_N1 = weight_NK[:, : sampling.top_k].sum(-1, keepdim=True)
    stronger_NK = weight_NK.cumsum(-1) - weight_NK
    if sampling.top_p < 1:
        is_kept_NK &= stronger_NK < sampling.top_p * mass_N1
    is_kept_NK &= weight_NK >= sampling.min_p  # the strongest weighs 1
    is_kept_NK[:, 0] = True
    num_kept_N1 = is_kept_NK.sum(-1, keepdim=True)
    is_certain_N = score_NK.gather(-1, num_kept_N1 - 1)[:, 0] > score_NK[:, -1]
    ids_NK, order_NK = token_NK.sort(dim=-1)
    index_N = _inverse_distribution((weight_NK * is_kept_NK).gather(-1, order_NK), uniform_N)
    return ids_NK.gather(-1, index_N[:, None])[:, 0], is_certain_N


def _inverse_distribution(weight_NK: Tensor, uniform_N: Tensor) -> Tensor:
    """The first index whose cumulative weight exceeds uniform * total; never one of weight zero."""
    cumulative_NK = weight_NK.cumsum(-1)
    total_N1 = cumulative_NK[:, -1:]
    target_N1 = uniform_N.to(weight_NK)[:, None] * total_N1
    last_N1 = (cumulative_NK < total_N1).sum(-1, keepdim=True)  # where rounding gives target == total
    return torch.minimum(torch.searchsorted(cumulative_NK, target_N1, right=True), last_N1)[:, 0]
