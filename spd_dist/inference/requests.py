"""A completion in the making: what was asked, what was drawn, when it ends; and memory that runs out meanwhile.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from spd_dist.errors import DataError
from spd_dist.inference.sampling import Sampling
from spd_dist.types import ThoughtBudget

if TYPE_CHECKING:
    from spd_dist.inference.compiled_pass import CompiledPass

log = logging.getLogger(__name__)

SIGNS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""What torch says on accelerators, on the CPU, and where a library of the accelerator allocates by itself."""


def is_out_of_memory(message: str) -> bool:
    """Whether an error says that an allocation failed."""
    return any(sign in message for sign in SIGNS)


def half_batch(batch_size: int, *, section: str = "generate", in_step: bool = False, is_fixed: bool = False) -> int:
    """Half of a batch that memory ran out for.

    Args:
        batch_size: Rows of it.
        section: The config's that it is from.
        in_step: Whether other ranks take part in its passes: they can't be told between two gathers.
        is_fixed: Whether samples depend on the batch's shape.

    Raises:
        DataError: no smaller batch may be tried, with what to do instead.
    """
    key, shorter = f"{section}.batch_size", f"{section}.max_new_tokens or data.max_prompt_tokens"
    if is_fixed:
        remedy = (
            f"{section}.batch_invariant=true makes the batch a part of the result: lower {key} in a run_dir of its "
            f"own, or {shorter}"
        )
    elif in_step:
        remedy = f"ranks in step (layerwise) cannot halve it: lower {key}, {shorter}, or take more ranks"
    elif batch_size == 1:
        remedy = f"lower {shorter}, or shard the weights: distributed.zero_stage=3, {section}.placement=layerwise"
    else:
        log.warning("%s: out of memory; going on with %s=%d", section, key, batch_size // 2)
        return batch_size // 2
    raise DataError(f"out of memory with {key}={batch_size}; {remedy}")


@dataclass(frozen=True)
class Request:
    """One completion to make."""

    id: str
    sample: int
    tokens: tuple[int, ...]
    seed: int
    """Of its random numbers: nothing else makes its sample."""
    budget: ThoughtBudget | None = None
    """For its thought; our own loops keep to it, and no other engine does."""
    measures_entropy: bool = False
    """Whether to say how sure the model was of its tokens; our own loops do, and no other engine does."""


@dataclass(frozen=True)
class Decoded:
    """A completion as tokens."""

    request: Request
    tokens: tuple[int, ...]
    """With the end-of-sequence token if there was one."""
    finish_reason: Literal["stop", "length"]
    mean_entropy: float | None = None
    """Nats a token, of what the model gives every token at temperature 1; None where it was not measured."""


@dataclass(frozen=True)
class Contrast:
    """Draw from log p + beta (log q - log p): q the model as it is, p as it is where `without` holds.

    Each is given the drawn tokens, and has a cache of its own. As contrastive decoding (Li et al., arXiv 2210.15097),
    with the untouched policy as the weaker model.
    """

    beta: float
    without: Callable[[], AbstractContextManager[None]]

    def logits(self, of_p_NV: Tensor, of_q_NV: Tensor) -> Tensor:
        """What is drawn from, in float32; a token that both rule out stays so."""
        log_p_NV, log_q_NV = (logits_NV.float().log_softmax(-1) for logits_NV in (of_p_NV, of_q_NV))
        are_out_NV = log_p_NV.isneginf() & log_q_NV.isneginf()
        return (log_p_NV + self.beta * (log_q_NV - log_p_NV)).masked_fill_(are_out_NV, -math.inf)


@dataclass(frozen=True)
class DecodeSettings:
    """How completions are drawn, and which tokens end one."""

    sampling: Sampling
    eos_token_ids: frozenset[int]
    pad_token_id: int
    contrast: Contrast | None = None
    is_whole: bool = True
    """The weights stay here from pass to pass; else they come from shards, layer by layer."""
    compiled: CompiledPass | None = None
    """What makes the passes that add a token a row, if they are compiled."""


@dataclass(eq=False)
class Row:
    """A request being answered, as far as its tokens were read."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    num_drawn: int = 0
    """Tokens of it that the device has drawn, or is about to: those that are not read yet, too."""
    is_done: bool = False
    """Its completion is known: what else was drawn for it is nothing."""
    entropy: float = 0.0
    """Of all its tokens, in nats, if its request asks for it."""

    @property
    def num_cached(self) -> int:
        """Tokens whose keys and values the model has made: all but the newest."""
        return len(self.request.tokens) + self.num_drawn - 1

    def finished(self, stopping: DecodeSettings) -> Decoded | None:
        """The completion, if the newest token that was read was its last."""
        is_ended = bool(self.tokens) and self.tokens[-1] in stopping.eos_token_ids
        if not is_ended and len(self.tokens) < stopping.sampling.max_new_tokens:
            return None
        mean_entropy = self.entropy / len(self.tokens) if self.request.measures_entropy else None
        return Decoded(self.request, tuple(self.tokens), "stop" if is_ended else "length", mean_entropy)
