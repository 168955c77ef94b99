"""Tiny configs of every architecture that we promise to support, and where their keys and values come from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tiny import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from spd_dist.types import KVSite

COMMON = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def slots(*starts: int, width: int) -> tuple[tuple[int, int], ...]:
    """One range a head."""
    return tuple((start, start + width) for start in starts)


@dataclass(frozen=True)
class Family:
    """An architecture: its config, and the truth about it, written down by hand from its source."""

    model_type: str
    settings: dict
    key: tuple[str, tuple[tuple[int, int], ...]] = ("self_attn.k_proj", ((0, 16),))
    """Module inside a layer, and the columns of its output."""
    value: tuple[str, tuple[tuple[int, int], ...]] = ("self_attn.v_proj", ((0, 16),))
    num_heads: int = 2
    layers: tuple[int, ...] = (0, 1, 2, 3)
    """Those that make keys and values."""
    prefix: str = "model.layers"
    attention: str = "sdpa"
    without: tuple[str, ...] = ()
    """Common settings that the architecture's config does not have."""

    def site(self, layer: int, kind: str) -> KVSite:
        """The keys or the values of a layer, as they ought to be found."""
        module, columns = self.key if kind == "key" else self.value
        return KVSite(layer, kind, f"{self.prefix}.{layer}.{module}", columns, self.num_heads)


FAMILIES = {
    "llama": Family("llama", {}),
    "llama_bias": Family("llama", {"attention_bias": True}),
    "qwen2": Family("qwen2", {}),
    "qwen3": Family("qwen3", {}),
    "mistral": Family("mistral", {"sliding_window": 4}),
    "mixtral": Family("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": Family("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "gemma2": Family("gemma2", {"query_pre_attn_scalar": 8, "sliding_window": 4}, attention="eager"),
    "gemma3": Family("gemma3_text", {"query_pre_attn_scalar": 8, "sliding_window": 4}),
    "phi3": Family("phi3", {}, key=("self_attn.qkv_proj", ((32, 48),)), value=("self_attn.qkv_proj", ((48, 64),))),
    "gpt2": Family(
        "gpt2",
        {},
        key=("attn.c_attn", ((32, 64),)),
        value=("attn.c_attn", ((64, 96),)),
        num_heads=4,
        prefix="transformer.h",
        without=("num_key_value_heads", "head_dim", "intermediate_size"),
    ),
    "gpt_neox": Family(
        "gpt_neox",
        {},
        key=("attention.query_key_value", slots(8, 32, 56, 80, width=8)),
        value=("attention.query_key_value", slots(16, 40, 64, 88, width=8)),
        num_heads=4,
        prefix="gpt_neox.layers",
    ),
    "olmo2": Family("olmo2", {}),
    "granite": Family("granite", {"logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3}),
    "deepseek_v3": Family(
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 24,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 6,
            "head_dim": 4,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
        key=("self_attn.kv_b_proj", slots(0, 14, 28, 42, width=8)),
        value=("self_attn.kv_b_proj", slots(8, 22, 36, 50, width=6)),
        num_heads=4,
    ),
    "qwen3_next": Family(
        "qwen3_next",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"] * 2,
        },
        layers=(1, 3),
    ),
    "gpt_oss": Family(
        "gpt_oss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 4,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        attention="eager",
    ),
    "falcon": Family(
        "falcon",
        {"multi_query": True, "new_decoder_architecture": False, "bias": True},
        key=("self_attention.query_key_value", ((32, 40),)),
        value=("self_attention.query_key_value", ((40, 48),)),
        num_heads=1,
        prefix="transformer.h",
        without=("num_key_value_heads", "head_dim", "intermediate_size"),
    ),
    "falcon_grouped": Family(
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": False},
        key=("self_attention.query_key_value", slots(16, 48, width=8)),
        value=("self_attention.query_key_value", slots(24, 56, width=8)),
        prefix="transformer.h",
        without=("num_key_value_heads", "head_dim", "intermediate_size"),
    ),
}


def family_model(name: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random model of the family, float32, in eval mode: the same one for the same seed and changes."""
    family = FAMILIES[name]
    common = {key: value for key, value in COMMON.items() if key not in family.without}
    config = AutoConfig.for_model(family.model_type, **common | family.settings | changes)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=family.attention)
        for path, parameter in model.named_parameters():
            if path.endswith("bias") or "norm" in path:  # initial biases are zero: a fault with them would not show
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def save_family(name: str, folder: Path) -> Path:
    """A model of the family that reads and writes the bytes of the tiny tokenizer, as a checkpoint folder."""
    tokenizer = tiny_tokenizer()
    family_model(name, vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
