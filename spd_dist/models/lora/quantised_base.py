"""Base weights of 4 bits beneath adapters (QLoRA, arXiv 2305.14314), by bitsandbytes: frozen, and never merged.

Linear modules are stored in blocks of 64 normal-float values with a scale each, and the scales in 8 bits; embedding,
output layer, norms and experts in one tensor stay as they are. A pass makes one module's weight whole at a time.
"""

from __future__ import annotations

import importlib.util

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spd_dist.config import Model
from spd_dist.errors import ConfigError

BYTES_OF_FOUR_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a weight: its code, its part of a block's scale, and of the scale of 256 scales."""
PACKAGES = ("bitsandbytes", "accelerate")


def quantised(config: Model, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How `from_pretrained` stores weights for `model.quantization`; None where they stay as they are.

    Raises:
        ConfigError: a package of the extra `quantized` is missing.
    """
    if config.quantization == "none":
        return None
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"model.quantization: {config.quantization} needs {' and '.join(missing)}; pip install "
            "'spd_dist[quantized]', or set model.quantization=none"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantization,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
    )


def keep_codes_(model: nn.Module) -> None:
    """Keep bitsandbytes from packing codes anew for its CPU kernel, whose values are rounded to bfloat16.

    It would do so at the first pass without a gradient, and the weights would not be the same before and after.
    """
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            vars(module)["support_avx512bf16_for_cpu"] = False


def whole_weight(module: nn.Module) -> Tensor:
    """The weight of a linear module as its passes use it, transposed to (outputs, inputs)."""
    weight = dequantize_module_weight(module).detach()
    return weight.T if isinstance(module, Conv1D) else weight


def width_of(module: nn.Module) -> int:
    """The largest rank that a linear module's weight may have, whatever it is stored as."""
    if isinstance(module, Conv1D):
        return min(module.nx, module.nf)
    assert isinstance(module, nn.Linear)  # what gets adapters
    return min(module.in_features, module.out_features)


def quantised_sizes(model: PreTrainedModel) -> tuple[int, ...]:
    """Elements of each weight that `model.quantization` stores in 4 bits."""
    head = model.get_output_embeddings()
    linear = [one for one in model.modules() if isinstance(one, nn.Linear) and one is not head]
    return tuple(one.in_features * one.out_features for one in linear)
