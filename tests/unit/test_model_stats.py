import math

import pytest
import torch
from families import FAMILIES, family_model
from tiny import tiny_config, tiny_model
from transformers import DynamicCache

from spd_dist.inference.decode import decode
from spd_dist.inference.placement import decode_bytes
from spd_dist.inference.requests import DecodeSettings, Request
from spd_dist.inference.sampling import Sampling
from spd_dist.models.model_stats import meta_model, outline_of
from spd_dist.planner.dry_run import LiveBytes

OTHERWISE = {"qwen3_next", "gpt_neox"}
"""A cache with states of linear attention, too; a test config with a number of KV heads that means nothing to it."""


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - OTHERWISE))
def test_the_cache_is_as_wide_as_the_model_makes_it(name):
    model = family_model(name).eval()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.arange(3, 11)[None] % 60, past_key_values=cache, use_cache=True)
    widths = {math.prod(layer.keys.shape[1::2]) + math.prod(layer.values.shape[1::2]) for layer in cache.layers}
    assert widths == {outline_of(model).kv_width}


def test_without_weights_a_model_has_the_same_outline():
    for changes in ({}, {"tie_word_embeddings": False}):
        whole = outline_of(tiny_model(**changes).requires_grad_(False))
        assert outline_of(meta_model(tiny_config(**changes), torch.float32)) == whole
        assert whole.num_parameters == sum(parameter.numel() for parameter in tiny_model(**changes).parameters())


def test_a_tied_embedding_is_multiplied_and_an_untied_one_only_looked_up():
    tied, untied = (outline_of(tiny_model(tie_word_embeddings=tie)) for tie in (True, False))
    assert tied.num_multiplied == untied.num_multiplied == tied.num_parameters
    assert untied.num_parameters - untied.num_multiplied == 259 * 32


def test_experts_that_a_token_passes_by_take_memory_and_no_time():
    outline = outline_of(family_model("mixtral"))
    experts = sum(size for name, size in sizes(family_model("mixtral")).items() if ".experts." in name)
    assert outline.num_parameters - outline.num_multiplied == experts // 2 + 64 * 32  # 2 of 4, and the embedding


def sizes(model):
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


def test_training_takes_three_passes_for_what_is_trained_and_two_for_what_is_frozen():
    model = tiny_model().requires_grad_(False)
    frozen = outline_of(model)
    assert frozen.training_flops == 2 * frozen.forward_flops
    assert outline_of(model.requires_grad_(True)).training_flops == 3 * frozen.forward_flops


@pytest.mark.seconds
def test_decoding_holds_what_the_arithmetic_says():
    model = tiny_model(hidden_size=128, intermediate_size=352, num_hidden_layers=6, vocab_size=2048).requires_grad_(
        False
    )
    requests = [Request(str(index), 0, tuple(range(3 + index, 99 + index)), index) for index in range(48)]
    sampling = Sampling(max_new_tokens=24)
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        list(decode(model, requests, DecodeSettings(sampling, frozenset(), 0), batch_size=16))
    shape = {"batch_size": 16, "prompt_tokens": 96, "new_tokens": 24, "element_bytes": 4}
    predicted = decode_bytes(outline_of(model), **shape)
    assert predicted.weights == 4 * sum(sizes(model).values())
    assert 0.8 < (predicted.cache + predicted.working) / live.peak < 1.25
