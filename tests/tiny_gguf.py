"""A GGUF file that converts in a second: the tiny Llama, with some tensors in blocks of eight bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quantize
from tiny import CHAT_TEMPLATE, SPECIAL, tiny_model, tiny_tokenizer

SHAPE = {"intermediate_size": 64, "vocab_size": 260}
"""Rows that are whole blocks, and one more token: a GGUF array of merges may not be empty."""
PLACES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_tiny_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    whole: bool = False,
    left_out: str = "",
    num_parts: int = 0,
    **changes: object,
) -> Path:
    """Write the tiny model; `whole` keeps all of its numbers, or its MLPs are in Q8_0."""
    model = tiny_model(**SHAPE | changes)
    config = model.config
    writer = GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    if num_parts:
        writer.add_uint16("split.count", num_parts)
    _add_tokenizer(writer)
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        if "q_proj" in name or "k_proj" in name:
            tensor = _interleaved(tensor, head_dim=config.head_dim)
        is_packed = "mlp" in name and not whole
        kind = GGMLQuantizationType.Q8_0 if is_packed else GGMLQuantizationType.F32
        if place_of(name) != left_out:
            writer.add_tensor(place_of(name), quantize(np.ascontiguousarray(tensor), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def place_of(name: str) -> str:
    """What a parameter is called in a GGUF file."""
    module, _, kind = name.rpartition(".")
    if module in PLACES:
        return f"{PLACES[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{PLACES[rest]}.{kind}"


def _add_tokenizer(writer: GGUFWriter) -> None:
    vocab = tiny_tokenizer().get_vocab()
    tokens = [*sorted(vocab, key=vocab.get), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in SPECIAL else TokenType.NORMAL for token in tokens])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _interleaved(weight: torch.Tensor, *, head_dim: int) -> torch.Tensor:
    """As llama.cpp keeps what RoPE turns: the two halves of a head by turns."""
    heads = weight.view(-1, 2, head_dim // 2, weight.shape[1])
    return heads.swapaxes(1, 2).reshape(weight.shape)
