"""A model in numbers, and what decoding with it takes: the arithmetic of both the placement and the planner.

It reads shapes and the config, so a model on the meta device, a sharded one and one in memory all give the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PretrainedConfig, PreTrainedModel

from spd_dist.distributed.zero import whole_shape
from spd_dist.models.slot_loop import MAX_PREFILL_TOKENS
from spd_dist.models.slots import GROWTH_COLUMNS

SAMPLING_BYTES = 16
"""A logit of a pass as sampling holds it: in the model's dtype, in float32, scaled, and as a weight."""


@dataclass(frozen=True)
class Outline:
    """What memory and time of a model follow from; elements, not bytes."""

    frozen: tuple[int, ...]
    """Size of every parameter that is not trained."""
    trained: tuple[int, ...]
    num_embedded: int
    """Of them in the input embedding alone: looked up, not multiplied."""
    num_idle: int
    """Of them in experts that a token does not pass through."""
    num_layers: int
    hidden_size: int
    intermediate_size: int
    """Width of a token inside an MLP, or inside all experts that it passes through."""
    attention_width: int
    """Query heads times head width."""
    kv_width: int
    """Elements that the cache keeps of a token in one layer: keys and values."""
    vocabulary_size: int

    @property
    def num_parameters(self) -> int:
        """All of them."""
        return sum(self.frozen) + sum(self.trained)

    @property
    def num_multiplied(self) -> int:
        """Parameters that one token is multiplied by."""
        return self.num_parameters - self.num_embedded - self.num_idle

    @property
    def forward_flops(self) -> int:
        """Of one token, without attention: a multiplication and an addition a weight."""
        return 2 * self.num_multiplied

    @property
    def training_flops(self) -> int:
        """As many again for the gradient of the input, and for that of each weight that is trained."""
        return 2 * self.forward_flops + 2 * sum(self.trained)


class DecodeBytes(NamedTuple):
    """What one rank needs to decode by itself."""

    weights: int
    """Whole."""
    cache: int
    """Keys and values of a full batch, and of the prompts that are being read."""
    working: int
    """The largest single step: a layer's activations while prompts are read, or the logits of a batch."""


def outline_of(model: PreTrainedModel) -> Outline:
    """The outline of a model, with its adapters if it has any."""
    parameters = dict(model.named_parameters())  # tied ones once
    sizes = {name: math.prod(whole_shape(parameter)) for name, parameter in parameters.items()}
    settings = model.config.get_text_config().to_dict()
    text = model.config.get_text_config()
    experts, active = settings.get("num_local_experts") or settings.get("num_experts") or 0, 0
    if experts:
        active = settings.get("num_experts_per_tok") or experts
    embedding = model.get_input_embeddings().weight
    is_tied = model.get_output_embeddings() is not None and model.get_output_embeddings().weight is embedding
    in_experts = sum(size for name, size in sizes.items() if ".experts." in name)
    return Outline(
        frozen=tuple(size for name, size in sizes.items() if not parameters[name].requires_grad),
        trained=tuple(size for name, size in sizes.items() if parameters[name].requires_grad),
        num_embedded=0 if is_tied else math.prod(whole_shape(embedding)),
        num_idle=in_experts * (experts - active) // experts if experts else 0,
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        intermediate_size=_intermediate_size(settings, text.hidden_size, active),
        attention_width=text.num_attention_heads * _head_width(settings, text),
        kv_width=_kv_width(settings, text),
        vocabulary_size=text.vocab_size,
    )


def decode_bytes(
    outline: Outline, *, batch_size: int, prompt_tokens: int, new_tokens: int, element_bytes: int
) -> DecodeBytes:
    """What decoding `batch_size` rows takes, beside shards of the same weights.

    Args:
        outline: The model's.
        batch_size: Rows of a pass.
        prompt_tokens: Of the longest prompt.
        new_tokens: Of the longest completion.
        element_bytes: Size of a weight, and of an activation.
    """
    prefill_tokens = min(batch_size * prompt_tokens, max(MAX_PREFILL_TOKENS, prompt_tokens))
    columns = batch_size * (prompt_tokens + new_tokens + GROWTH_COLUMNS)
    # The prompts that were read last stay beside those that are being read: further samples may follow.
    cache = outline.num_layers * outline.kv_width * (columns + 2 * prefill_tokens)
    # Inside the MLP, or where attention has repeated keys and values for every query head.
    inside = max(3 * outline.intermediate_size, 4 * outline.attention_width)
    layer = prefill_tokens * (4 * outline.hidden_size + inside)
    sampled = SAMPLING_BYTES * batch_size * outline.vocabulary_size
    working = max(element_bytes * layer, sampled)
    return DecodeBytes(element_bytes * outline.num_parameters, element_bytes * cache, working)


def _head_width(settings: Mapping[str, Any], text: PretrainedConfig) -> int:
    return settings.get("head_dim") or text.hidden_size // text.num_attention_heads


def _kv_width(settings: Mapping[str, Any], text: PretrainedConfig) -> int:
    if settings.get("kv_lora_rank"):  # multi-head latent attention: the cache keeps the latents
        return settings["kv_lora_rank"] + settings["qk_rope_head_dim"]
    if settings.get("multi_query") and not settings.get("new_decoder_architecture"):
        return 2 * _head_width(settings, text)
    num_heads = settings.get("num_key_value_heads") or text.num_attention_heads
    return 2 * num_heads * _head_width(settings, text)


def _intermediate_size(settings: Mapping[str, Any], hidden_size: int, num_active: int) -> int:
    if num_active:
        return num_active * (settings.get("moe_intermediate_size") or settings["intermediate_size"])
    return settings.get("intermediate_size") or settings.get("n_inner") or 4 * hidden_size
