"""Sites are found in every architecture, by what the model computes and not by its names."""

import logging

import pytest
import torch
from families import COMMON, FAMILIES, family_model
from peft import LoraConfig, get_peft_model
from tiny import tiny_model
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from spd_dist.errors import DataError
from spd_dist.models.gradient_capture import capture
from spd_dist.models.kv_sites import discover_sites
from spd_dist.models.kv_tracing import trace_origins
from spd_dist.projection.hooks import projected
from spd_dist.types import Projection, SiteOperator

TOKENS_BT = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))


def loss_of(model):
    return model(TOKENS_BT, use_cache=False).logits.log_softmax(-1)[..., 7].sum()


def captured(model, sites):
    with capture(model, sites) as caught:
        return caught.gradients(loss_of(model), torch.ones_like(TOKENS_BT, dtype=torch.bool))


def by_plain_autograd(model, sites):
    """The same by a backward pass through everything, nothing frozen and nothing cut."""
    outputs = {}

    def keep(name):
        def hook(_module, _inputs, output):
            output.retain_grad()
            outputs[name] = output
            return output.clone()

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in {site.module for site in sites}]
    loss_of(model.requires_grad_(True)).backward()
    for handle in handles:
        handle.remove()
    features = {site: [f for start, stop in site.columns for f in range(start, stop)] for site in sites}
    return {site: outputs[site.module].grad.flatten(0, -2)[:, features[site]] for site in sites}


def random_model(model_type, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **COMMON | changes)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def gemma4(**changes):
    settings = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, "global_head_dim": 16}
    layers = ["sliding_attention", "full_attention"] * 2
    return random_model("gemma4_text", **settings, layer_types=layers, **{"num_kv_shared_layers": 0} | changes)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_its_sites_found_captured_and_projected(name):
    family, model = FAMILIES[name], family_model(name)
    sites = discover_sites(model, family.layers)
    assert sites == sorted(family.site(layer, kind) for layer in family.layers for kind in ("key", "value"))

    expected = by_plain_autograd(family_model(name), sites)
    for site, grad_ND in captured(model, sites).items():
        assert grad_ND.shape == (TOKENS_BT.numel(), site.width)
        scale = expected[site].abs().max().item()
        assert scale > 0
        assert_close(grad_ND, expected[site], rtol=0, atol=1e-5 * scale)

    halves = {
        site: SiteOperator(0.0, torch.eye(site.width)[:, ::2], torch.ones((site.width + 1) // 2)) for site in sites
    }
    with torch.no_grad():
        plain = model(TOKENS_BT).logits
        with projected(model, Projection(halves)):
            hooked = model(TOKENS_BT).logits
        with projected(model, Projection(halves), "fold"):
            assert_close(model(TOKENS_BT).logits, hooked, rtol=0, atol=5e-6)
    assert (hooked - plain).abs().max() > 1e-2


@pytest.mark.parametrize("bias", [False, True])
def test_adapters_are_part_of_what_is_captured(bias):
    config = LoraConfig(target_modules=["k_proj", "v_proj"], init_lora_weights=False, r=4)
    plain = tiny_model(attention_bias=bias)
    sites = discover_sites(get_peft_model(plain, config))
    assert [site.module for site in sites][:2] == [
        "base_model.model.model.layers.2.self_attn.k_proj", "base_model.model.model.layers.2.self_attn.v_proj"
    ]  # fmt: skip
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(attention_bias=bias), config).eval()
    found, expected = captured(model, sites), by_plain_autograd(model, sites)
    for site in sites:
        assert_close(found[site], expected[site], rtol=0, atol=1e-5 * expected[site].abs().max().item())


def test_middle_and_last_count_only_layers_that_make_keys_and_values(caplog):
    caplog.set_level(logging.INFO)
    model = random_model(
        "qwen3_next", num_hidden_layers=7, num_experts=4, num_experts_per_tok=2,
        layer_types=["linear_attention", "full_attention"] * 3 + ["linear_attention"],
    )  # fmt: skip
    assert [site.layer for site in discover_sites(model)] == [3, 3, 5, 5]
    assert "['middle', 'last'] are layers [3, 5] of 3 that make keys and values" in caplog.text


def test_layers_are_sorted_and_taken_once():
    sites = discover_sites(tiny_model(), ["last", 0, 3], "value")
    assert [(site.layer, site.kind) for site in sites] == [(0, "value"), (3, "value")]


def test_a_layer_without_attention_is_refused_with_those_that_have_it():
    with pytest.raises(DataError, match=r"layer 2 of Qwen3Next\w+: there is no attention .*; usable layers: \[1, 3\]"):
        discover_sites(family_model("qwen3_next"), [2])


def test_a_layer_that_reads_the_keys_of_another_is_refused():
    model = gemma4(num_kv_shared_layers=2)
    assert [site.layer for site in discover_sites(model, ["last"])] == [1, 1]
    with pytest.raises(DataError, match=r"layer 3 .*: it reads the keys of layer 1; usable layers: \[0, 1\]"):
        discover_sites(model, [3])


def test_values_that_are_the_keys_are_one_site_whatever_the_names_say(caplog):
    model = gemma4(attention_k_eq_v=True, num_global_key_value_heads=1)
    assert [(site.layer, site.kind) for site in discover_sites(model)] == [(2, "key"), (2, "value"), (3, "key")]
    (site,) = discover_sites(model, ["last"], "value")
    assert site.module.endswith("3.self_attn.k_proj")
    assert "3.self_attn.k_proj makes the values of its layer" in caplog.text


def test_whole_keys_of_latent_attention_are_refused():
    model = family_model("deepseek_v3")
    with pytest.raises(
        DataError, match=r"its keys come from several modules, self_attn.kv_a_proj_with_mqa and self_attn.kv_b_proj"
    ):
        discover_sites(model, whole_keys=True)
    assert len(discover_sites(family_model("llama"), whole_keys=True)) == 4


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        (
            "mamba",
            "MambaForCausalLM has no layer to take keys and values from .it has no attention.; usable layers: none",
        ),
        ("diffllama", r"layers \[0, 1, 2, 3\]: it takes its keys several times"),
        ("hrm_text", "no linear module puts out its keys"),
        ("zaya", "its keys come from several modules, self_attn.qkv_proj.k_proj and self_attn.qkv_proj.q_proj"),
        ("xmod", "keys and values of XmodForCausalLM can't be traced, .*ValueError: Input language unknown"),
    ],
)
def test_models_without_usable_attention_fail_with_the_reason(model_type, reason):
    with pytest.raises(DataError, match=reason):
        discover_sites(random_model(model_type))


def test_a_module_that_runs_twice_is_refused():
    model = tiny_model()

    class Twice(type(model)):
        def __init__(self, config):
            super().__init__(config)
            self.model.layers[1].self_attn.v_proj = self.model.layers[1].self_attn.k_proj

    with pytest.raises(DataError, match=r"layer 1 .*: self_attn.k_proj runs 2 times in a forward pass"):
        discover_sites(Twice(model.config), [1])


def test_a_model_that_does_not_fit_its_config_is_refused():
    model = tiny_model()
    model.model.layers[3].self_attn.k_proj = torch.nn.Linear(32, 8)
    with pytest.raises(
        DataError, match=r"layers.3.self_attn.k_proj puts out 8 features, .* up to 15; the module does not fit"
    ):
        discover_sites(model)


def test_finding_sites_leaves_the_model_and_the_generator_alone():
    model = tiny_model().requires_grad_(True)
    state, before = torch.get_rng_state(), {name: value.clone() for name, value in model.state_dict().items()}
    discover_sites(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.config._attn_implementation == "sdpa"


def test_a_copy_needs_no_memory_for_weights():
    with torch.device("meta"):  # as large as it likes: only its config and its modules are read
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("llama", hidden_size=16384, num_attention_heads=128)
        )
    key, value = discover_sites(model, ["last"])
    assert (key.width, value.width, key.num_heads) == (16384, 16384, 128)


def test_origins_say_what_each_head_is_made_of():
    origins = trace_origins(family_model("falcon_grouped"))
    assert [(origin.reader, origin.kind) for origin in origins[:2]] == [("cache.0", "key"), ("cache.0", "value")]
    by_head = origins[0].features("transformer.h.0.self_attention.query_key_value")
    assert by_head == (tuple(range(16, 24)),) * 2 + (tuple(range(48, 56)),) * 2  # four query heads, two groups
