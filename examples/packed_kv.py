"""An architecture whose keys and values come in a new form, as docs/adding_an_architecture.md tells it.

`python examples/packed_kv.py` prints where they were found, in a random model of four layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb, eager_attention_forward

from spd_dist.models.kv_sites import discover_sites


class PackedKVAttention(LlamaAttention):
    """Llama's attention with one linear module for both: KV head after KV head, first its value, then its key."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        del self.k_proj, self.v_proj
        self.vk_proj = nn.Linear(config.hidden_size, 2 * config.num_key_value_heads * self.head_dim, bias=False)

    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **options):
        """As Llama's; B batch, H heads, T tokens, D head width."""
        batch, num_tokens, _ = hidden_states.shape
        query_BHTD = self.q_proj(hidden_states).view(batch, num_tokens, -1, self.head_dim).transpose(1, 2)
        packed = self.vk_proj(hidden_states).view(batch, num_tokens, -1, 2, self.head_dim)
        value_BHTD, key_BHTD = packed.permute(3, 0, 2, 1, 4).unbind()
        query_BHTD, key_BHTD = apply_rotary_pos_emb(query_BHTD, key_BHTD, *position_embeddings)
        if past_key_values is not None:
            key_BHTD, value_BHTD = past_key_values.update(key_BHTD, value_BHTD, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(
            self, query_BHTD, key_BHTD, value_BHTD, attention_mask, dropout=0.0, scaling=self.scaling, **options
        )
        return self.o_proj(output.reshape(batch, num_tokens, -1).contiguous()), weights


class PackedKVForCausalLM(LlamaForCausalLM):
    """Llama with that attention in every layer."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = PackedKVAttention(config, index)
        self.post_init()


def packed(output: Tensor, kind: str, head_dim: int) -> Tensor:
    """The keys or the values in what `vk_proj` puts out, KV head after KV head."""
    return torch.cat(output.split(head_dim, dim=-1)[kind == "key" :: 2], dim=-1)


if __name__ == "__main__":
    small = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    for site in discover_sites(PackedKVForCausalLM(small), ["middle"]):
        print(site, site.module, site.columns)
