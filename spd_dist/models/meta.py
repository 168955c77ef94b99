"""Models without weights, built from their config alone."""

from __future__ import annotations

import copy

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

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
    trusted = {"trust_remote_code": True} if type(config).__module__.startswith("transformers_modules") else {}
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, **trusted)
    except FOREIGN_FAULTS as error:
        raise DataError(
            f"model.name: no {config.model_type} model can be built from its config ({first_line(error)}); "
            "choose a causal language model that transformers knows"
        ) from error
    return model.eval().requires_grad_(False)


def first_line(error: Exception) -> str:
    """An error in short: some messages list all that would have been right."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


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
