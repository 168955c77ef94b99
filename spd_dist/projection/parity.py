"""Whether an exported policy gives the logits of the hooked one: the check before an export is called done.

Shapes: B prompts, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from spd_dist.distributed.zero import weights_fingerprint
from spd_dist.errors import DataError
from spd_dist.projection.hooks import projected
from spd_dist.types import Projection

PROMPTS, LENGTH = 3, 24
COMPUTED = 1e-4  # of the largest logit: float32 products in another order
ROUNDED = 4  # units in the last place of the weights' dtype, of the largest logit
OF_THE_EFFECT = 0.1


class Parity(NamedTuple):
    """Largest differences between logits, on the same prompts."""

    error: float
    """Between the exported and the hooked policy."""
    effect: float
    """Between the hooked policy and the base model."""
    largest_logit: float


def load_float32(folder: Path) -> PreTrainedModel:
    """The model of a folder, as plain transformers loads it, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def check_base(base: Path, fingerprint: str) -> None:
    """Compare a folder's weights with those that a subspace was computed on, in whichever dtype that was.

    Raises:
        DataError: they differ in every dtype.
    """
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if weights_fingerprint(AutoModelForCausalLM.from_pretrained(base, dtype=dtype)) == fingerprint:
            return
    raise DataError(
        f"--base {base} does not hold the weights that the subspace was computed on (fingerprint {fingerprint}); give "
        "that model's folder, or --other-base if another model is meant"
    )


def check_parity(
    base: Path, projection: Projection, load_exported: Callable[[], nn.Module], dtype: torch.dtype
) -> Parity:
    """Compare the exported policy with the hooked base, in float32, one model in memory at a time.

    `load_exported` loads the exported policy as its users do; `dtype` is that of the stored weights, which bounds what
    a fold can hold.

    Raises:
        DataError: they differ by more than the rounding of `dtype` explains.
    """
    model = load_float32(base)
    tokens_BT = _prompts(model.config.get_text_config().vocab_size)
    base_BTV = _logits(model, tokens_BT)
    with projected(model, projection):
        hooked_BTV = _logits(model, tokens_BT)
    del model
    exported_BTV = _logits(load_exported(), tokens_BT)
    error, effect = _largest(exported_BTV - hooked_BTV), _largest(hooked_BTV - base_BTV)
    parity = Parity(error, effect, _largest(hooked_BTV))
    allowed = max(COMPUTED, ROUNDED * torch.finfo(dtype).eps) * parity.largest_logit
    if not error <= (min(allowed, OF_THE_EFFECT * effect) if effect > allowed else allowed):
        raise DataError(
            f"the exported policy differs from the hooked one by {error:.2e} in its logits, where {allowed:.2e} is "
            f"allowed and the projection changes {effect:.2e}: it cannot be exported; set generate.apply_as=hook"
        )
    return parity


def _prompts(vocabulary: int) -> Tensor:
    return torch.randint(0, vocabulary, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _logits(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    return model(input_ids=tokens_BT, use_cache=False).logits


def _largest(logits_BTV: Tensor) -> float:
    return logits_BTV.abs().max().item()
