"""A model in numbers, built from its config alone: the arithmetic of both the placement and the planner."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pickle import UnpicklingError
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from spd_dist.distributed.zero import whole_shape
from spd_dist.errors import DataError

FOREIGN_FAULTS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What other people's model code raises where it does not fit."""


def meta_model(config: PretrainedConfig, dtype: torch.dtype, *, num_layers: int | None = None) -> PreTrainedModel:
    """The model of `config` on the meta device, frozen and in eval mode; of its layers only the first `num_layers`.

    Raises:
        DataError: transformers can't build it.
    """
    config = config if num_layers is None else shallow(config, num_layers)
    # Its own code was allowed to run when the config was read, or this would be another class.
    trusted = True if type(config).__module__.startswith("transformers_modules") else None
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trusted)
    except FOREIGN_FAULTS as error:
        raise DataError(
            f"model.name: no {config.model_type} model can be built from its config ({first_line(error)}); "
            "choose a causal language model that transformers knows"
        ) from error
    return model.eval().requires_grad_(False)


def first_line(error: Exception) -> str:
    """An error in short: some messages list all that would have been right."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def is_of_files(error: Exception) -> bool:
    """Whether a library has met what it can't read in a model's files; else memory or another rank may be the cause.

    What `tokenizers` raises has no class of its own.
    """
    known = (
        OSError, ArithmeticError, AttributeError, ImportError, LookupError, RecursionError, TypeError, ValueError,
        SafetensorError, UnpicklingError,
    )  # fmt: skip
    return isinstance(error, known) or type(error) is Exception or "mismatch" in str(error)


def in_a_line(error: Exception) -> str:
    """What an error says, without line ends, and not without end."""
    return " ".join(str(error).split())[:600] or type(error).__name__


def shallow(config: PretrainedConfig, num_layers: int) -> PretrainedConfig:
    """A copy of `config` with `num_layers` layers; lists that have an entry a layer are cut."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    depth = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == depth:
            setattr(text, name, value[:num_layers])
    text.num_hidden_layers = num_layers
    return config


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


def outline_of(model: PreTrainedModel) -> Outline:
    """The outline of a model, with its adapters if it has any."""
    parameters = dict(model.named_parameters())  # tied ones once
    sizes = {name: math.prod(whole_shape(parameter)) for name, parameter in parameters.items()}
    settings = model.config.get_text_config().to_dict()
    text = model.config.get_text_config()
    experts, active = settings.get("num_local_experts") or settings.get("num_experts") or 0, 0
    if experts:
        active = settings.get("num_experts_per_tok") or experts
    embedding = cast("nn.Parameter", model.get_input_embeddings().weight)
    head = model.get_output_embeddings()
    is_tied = head is not None and head.weight is embedding
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
