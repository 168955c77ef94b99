"""LoRA adapters by peft.

target_modules  which modules and parameters get one
initial_values  what they begin as
keyed_dropout   dropout that depends on no batch and no rank
quantised_base  base weights of 4 bits beneath them
adapters        put on a policy, taken off, saved and loaded
adapter_files   as they lie on disk, which may be a stranger's
merging         merged into the weights
"""

from peft import PeftModel

from spd_dist.models.lora.adapters import (
    adapter_parameters,
    add_adapters,
    base_model,
    key_dropout,
    load_adapter,
    lora_layers,
    remove_adapters,
    save_adapter,
    saved_parameters,
    without_adapters,
)
from spd_dist.models.lora.initial_values import InputSums, check_subspace, reads_inputs, summing_inputs
from spd_dist.models.lora.keyed_dropout import KeyedDropout, TokenKeys, mixed_, token_key, use_keyed_dropout
from spd_dist.models.lora.merging import LEAST_KEPT, check_kept, merged_tensors
from spd_dist.models.lora.quantised_base import BYTES_OF_FOUR_BITS, keep_codes_, quantised, quantised_sizes
from spd_dist.models.lora.target_modules import adapted_modules, check_targets

__all__ = [
    "BYTES_OF_FOUR_BITS", "LEAST_KEPT", "InputSums", "KeyedDropout", "PeftModel", "TokenKeys", "adapted_modules",
    "adapter_parameters", "add_adapters", "base_model", "check_kept", "check_subspace", "check_targets",
    "keep_codes_", "key_dropout", "load_adapter", "lora_layers", "merged_tensors", "mixed_", "quantised",
    "quantised_sizes", "reads_inputs", "remove_adapters", "save_adapter", "saved_parameters", "summing_inputs",
    "token_key", "use_keyed_dropout", "without_adapters",
]  # fmt: skip
