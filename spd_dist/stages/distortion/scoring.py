"""A held-out row, teacher-forced: likelihood of its answer, divergence from the untouched policy, entropy.

Shapes: B rows, T positions, S scored positions of a batch, K of them at which the divergence is taken, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from spd_dist.data.batches import PaddedBatch, pad
from spd_dist.data.held_out import PARTS, HeldOutExample
from spd_dist.models.gradient_capture import layers_of, supervised_rows
from spd_dist.models.policy import Policy
from spd_dist.types import KVSite

BLOCK_BYTES = 64 * 2**20
"""Of logits that are worked on at once."""


@dataclass(frozen=True)
class RowValues:
    """What one row says of one policy: in nats; None where the row has no such tokens."""

    nll_answer: float
    """Of the tokens that define correctness, summed."""
    nll_solution: float
    """Of the whole reference answer, summed."""
    log_odds: float | None
    """Of the right answer against the strongest wrong one, at the token at which these part."""
    kl: float
    """KL(base || policy), a token of the whole row."""
    kl_prompt: float | None
    kl_solution: float | None
    kl_answer: float | None
    entropy: float
    """Of the next token, over the positions at which the divergence is taken."""
    leakage: float | None = None
    """Of the projection in this row's batch, as `ProjectionMonitor.leakage`; None without one."""


@dataclass(frozen=True)
class ScoredBatch:
    """Rows that are run together, ready for the model."""

    rows: tuple[HeldOutExample, ...]
    padded: PaddedBatch
    label_S: Tensor
    compared_K: Tensor
    """Indices into S."""

    @classmethod
    def of(cls, rows: Sequence[HeldOutExample], pad_token_id: int, device: torch.device) -> ScoredBatch:
        """The rows as tensors on `device`."""
        padded = pad([row.example for row in rows], pad_token_id, device)
        weights = [weight for row in rows for weight in row.kl_weights]
        compared_K = torch.tensor([index for index, weight in enumerate(weights) if weight > 0], device=device)
        return cls(tuple(rows), padded, padded.tokens_BT[padded.target_BT], compared_K)

    @property
    def num_tokens(self) -> int:
        """Without padding."""
        return sum(len(row.example.tokens) for row in self.rows)


@torch.no_grad()
def scored_logits(policy: Policy, batch: ScoredBatch) -> Tensor:
    """The logits (S, V) that predict the scored positions, float32."""
    source_BT = batch.padded.target_BT.roll(-1, dims=1)
    with supervised_rows(policy.model, source_BT), float32_head(policy):
        return policy.model(batch.padded.tokens_BT, attention_mask=batch.padded.attention_BT, use_cache=False).logits


@contextmanager
def float32_head(policy: Policy) -> Generator[None]:
    """Within it, the output layer's product is in float32, whatever its weights are, a block of them at a time.

    In bfloat16 logits between 16 and 32 lie an eighth apart: as much as the effects that are looked for.
    """
    head: Any = policy.model.get_output_embeddings()
    own = vars(head).get("forward")

    def forward(state_SD: Tensor) -> Tensor:
        weight_VD, bias_V = head.weight, getattr(head, "bias", None)  # under ZeRO-3 they are there within a call only
        logit_SV = torch.empty(*state_SD.shape[:-1], len(weight_VD), dtype=torch.float32, device=state_SD.device)
        start, state_SD = 0, state_SD.float()
        for block_CD in _blocks(weight_VD):
            stop = start + len(block_CD)
            bias_C = None if bias_V is None else bias_V[start:stop].float()
            logit_SV[..., start:stop] = linear(state_SD, block_CD.float(), bias_C)
            start = stop
        return logit_SV

    if head.weight.dtype not in (torch.bfloat16, torch.float16):
        yield
        return
    head.forward = forward
    try:
        yield
    finally:
        del head.forward
        if own is not None:
            head.forward = own


@torch.no_grad()
def log_probabilities(logit_SV: Tensor, batch: ScoredBatch) -> Tensor:
    """Those of the base (K, V), float32, to be compared with."""
    return logit_SV[batch.compared_K].float().log_softmax(-1)


@torch.no_grad()
def row_values(
    logit_SV: Tensor, batch: ScoredBatch, base_KV: Tensor | None, leakage: float | None
) -> Iterator[tuple[str, RowValues]]:
    """Id and values of each row of the batch; `base_KV` is what `log_probabilities` gave, None for the base itself."""
    log_sum_S = torch.cat([block.float().logsumexp(-1) for block in _blocks(logit_SV)])
    loss_S = (log_sum_S - logit_SV.gather(1, batch.label_S[:, None])[:, 0].float()).cpu()
    kl_S, entropy_S = torch.zeros_like(loss_S), torch.zeros_like(loss_S)
    compared_K = batch.compared_K.cpu()
    kl_S[compared_K], entropy_S[compared_K] = _divergences(logit_SV, log_sum_S, batch, base_KV)
    start = 0
    for row in batch.rows:
        stop = start + len(row.parts)
        odds = [
            (
                logit_SV[start + target, row.example.tokens[row.example.targets[target]]]
                - logit_SV[start + target, token]
            )
            for target, token in row.wrong
        ]
        yield row.example.id, _of_row(row, loss_S[start:stop], kl_S[start:stop], entropy_S[start:stop], odds, leakage)
        start = stop


def _divergences(
    logit_SV: Tensor, log_sum_S: Tensor, batch: ScoredBatch, base_KV: Tensor | None
) -> tuple[Tensor, Tensor]:
    """KL(base || this) and the entropy of this, at each of the K positions."""
    kls, entropies, start = [], [], 0
    for index_C in _blocks(batch.compared_K, logit_SV.shape[1]):
        ours_CV = logit_SV[index_C].float() - log_sum_S[index_C, None]
        entropies.append(-(ours_CV.exp() * ours_CV).sum(-1))
        if base_KV is None:
            kls.append(torch.zeros_like(entropies[-1]))
        else:
            theirs_CV = base_KV[start : start + len(index_C)]
            kls.append((theirs_CV.exp() * (theirs_CV - ours_CV)).sum(-1))
        start += len(index_C)
    return torch.cat(kls).cpu(), torch.cat(entropies).cpu()


def _blocks(tensor: Tensor, width: int | None = None) -> tuple[Tensor, ...]:
    return tensor.split(max(1, BLOCK_BYTES // (4 * (width or tensor.shape[1]))))


def _of_row(
    row: HeldOutExample, loss_S: Tensor, kl_S: Tensor, entropy_S: Tensor, odds: list[Tensor], leakage: float | None
) -> RowValues:
    loss_S, kl_S, entropy_S = loss_S.double(), kl_S.double(), entropy_S.double()
    answer = [index for index, part in enumerate(row.parts) if part == "answer"]
    solution = [index for index, part in enumerate(row.parts) if part != "prompt"]
    places = {part: row.positions(part) for part in PARTS}
    compared = [index for found in places.values() for index in found]
    parts = {f"kl_{part}": kl_S[found].mean().item() if found else None for part, found in places.items()}
    return RowValues(
        nll_answer=loss_S[answer].sum().item(),
        nll_solution=loss_S[solution].sum().item(),
        log_odds=min(float(one) for one in odds) if odds else None,
        kl=(kl_S * torch.tensor(row.kl_weights, dtype=torch.float64)).sum().item(),
        kl_prompt=parts["kl_prompt"],
        kl_solution=parts["kl_solution"],
        kl_answer=parts["kl_answer"],
        entropy=entropy_S[compared].mean().item(),
        leakage=leakage,
    )


class SharedPrefix:
    """What enters some layers of a model in one pass, to be given to them again in others with the same tokens.

    A pass that replays runs the whole model but the layers below: masks, rotary embeddings, norms and output layer are
    the model's own, whatever its architecture, as long as its layers are called one after the other with what the one
    before gave. `measure` checks that on its first batch.
    """

    def __init__(self, model: nn.Module, sites: Iterable[KVSite]) -> None:
        """Find the layers; `sites` are any of the model's."""
        self.layers = layers_of(model, next(iter(sites)))
        self.inputs: dict[int, Tensor] = {}
        self.gives_tuples = False

    @contextmanager
    def recording(self, firsts: Iterable[int]) -> Generator[None]:
        """Within it, note what enters the layers `firsts` of the latest pass."""
        self.inputs.clear()
        with ExitStack() as undo:
            for first in set(firsts) - {0}:
                hook = self.layers[first].register_forward_pre_hook(partial(self._note, first), with_kwargs=True)
                undo.callback(hook.remove)
                hook = self.layers[first - 1].register_forward_hook(self._note_form)
                undo.callback(hook.remove)
            yield

    @contextmanager
    def replaying(self, first: int) -> Generator[None]:
        """Within it, the model begins at layer `first`, with what `recording` noted; all of it runs if that is 0."""
        if first == 0:
            yield
            return
        noted = self.inputs[first]
        with ExitStack() as undo:
            for layer in self.layers[:first]:
                layer.forward = self._pass_through
                undo.callback(delattr, layer, "forward")
            hook = self.layers[first].register_forward_pre_hook(partial(_enter, noted), with_kwargs=True)
            undo.callback(hook.remove)
            yield

    def _note(self, first: int, _layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.inputs[first] = inputs[0] if inputs else named["hidden_states"]

    def _note_form(self, _layer: nn.Module, _inputs: tuple[Any, ...], output: object) -> None:
        self.gives_tuples = isinstance(output, tuple)

    def _pass_through(self, *inputs: Any, **named: Any) -> Any:
        hidden = inputs[0] if inputs else named["hidden_states"]
        return (hidden,) if self.gives_tuples else hidden


def _enter(
    noted: Tensor, _layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if inputs:
        return (noted, *inputs[1:]), named
    return inputs, {**named, "hidden_states": noted}
