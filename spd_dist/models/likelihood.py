"""How likely the policy finds given tokens.

Shapes: B examples, T positions, S supervised tokens, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from spd_dist.models.capture import supervised_rows


def example_losses(model: PreTrainedModel, tokens_BT: Tensor, attention_BT: Tensor, target_BT: Tensor) -> Tensor:
    """Each example's mean negative log-likelihood of its targets (paper, Eq. 6), float32, by one forward pass.

    Args:
        model: What is called: under ZeRO-3 the engine's module.
        tokens_BT: Right-padded.
        attention_BT: 1 at tokens and 0 at pads.
        target_BT: True where the token is supervised: at least once a row, and never at position 0.
    """
    source_BT = target_BT.roll(-1, dims=1)
    with supervised_rows(model, source_BT):
        logit_SV = model(tokens_BT, attention_mask=attention_BT, use_cache=False).logits
    loss_S = cross_entropy(logit_SV.float(), tokens_BT[target_BT], reduction="none")
    num_targets_B = target_BT.sum(dim=1)
    owner_S = torch.arange(len(num_targets_B), device=loss_S.device).repeat_interleave(num_targets_B)
    return loss_S.new_zeros(len(num_targets_B)).index_add(0, owner_S, loss_S) / num_targets_B
