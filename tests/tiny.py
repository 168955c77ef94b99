"""A tokenizer and models small enough for every test, and real: built, saved and loaded by transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and three special ones; `<|im_end|>` (2) ends a sequence."""
    vocab = {token: index for index, token in enumerate(SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[2], pad_token=SPECIAL[0])
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[1:2]})
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_config(**changes: object) -> LlamaConfig:
    """Llama with 4 layers, 2 KV heads of 8: KV width 16."""
    settings = {
        "vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "eos_token_id": 2, "pad_token_id": 0,
        "bos_token_id": None, "initializer_range": 0.2, "tie_word_embeddings": True,
    }  # fmt: skip
    return LlamaConfig(**settings | changes)


def tiny_model(seed: int = 0, **changes: object) -> torch.nn.Module:
    """A random model in float32, in eval mode: the same one for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(tiny_config(**changes), dtype=torch.float32).eval()


def save_tiny_model(folder: Path, seed: int = 0, **changes: object) -> Path:
    """The same as a checkpoint folder with its tokenizer."""
    tiny_model(seed, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
