"""A fold gives the hook's logits, comes off bit by bit, and is refused where it would not be exact."""

import pytest
import torch
from families import FAMILIES, family_model
from peft import LoHaConfig, LoraConfig, get_peft_model
from projections import WIDTH, four_sites, logits, num_hooks, operator, per_head, site
from tiny import tiny_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, GPT2Config, Phi3Config, Qwen2Config

from spd_dist.errors import ConfigError, DataError
from spd_dist.projection.hooks import projected
from spd_dist.types import KVSite, Projection, SiteOperator

SIZES = {
    "vocab_size": 259,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}


def random_model(config: object) -> torch.nn.Module:
    """Every parameter random, biases too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def qwen2() -> torch.nn.Module:
    return random_model(Qwen2Config(**SIZES, intermediate_size=48, num_key_value_heads=2))


def lora_model(**changes: object) -> torch.nn.Module:
    config = LoraConfig(target_modules=["k_proj", "v_proj"], init_lora_weights=False, r=4, **changes)
    return get_peft_model(qwen2(), config).eval()


def bits(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def rounding_noise(model: torch.nn.Module) -> float:
    """How much the logits move when every weight moves by half a unit in the last place, up or down."""
    draw = torch.Generator().manual_seed(0)
    before, base = bits(model), logits(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 2.0**-24 * torch.randn(parameter.shape, generator=draw).sign().double())
        moved = logits(model)
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    return (moved - base).abs().max().item()


def assert_fold_equals_hook(model: torch.nn.Module, projection: Projection) -> None:
    before, base, hooks = bits(model), logits(model), num_hooks(model)
    atol = 3e-6 + rounding_noise(model)
    with projected(model, projection) as applied:
        hooked = logits(model)
    with projected(model, projection, "fold") as seen:
        folded = logits(model)
    assert (hooked - base).abs().max() > 100 * atol
    assert_close(folded, hooked, atol=atol, rtol=0)
    assert applied.leakage() < 1e-5
    assert seen.leakage() < 1e-5
    assert seen.calls == applied.calls
    after = bits(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert num_hooks(model) == hooks


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_folds_as_it_hooks(name):
    family = FAMILIES[name]
    sites = [family.site(layer, kind) for layer in family.layers[-2:] for kind in ("key", "value")]
    operators = {place: operator(place.width // 2, seed=i, width=place.width) for i, place in enumerate(sites)}
    assert_fold_equals_hook(family_model(name), Projection(operators))


def test_plain_weights():
    assert_fold_equals_hook(tiny_model(), four_sites())


def test_weights_and_biases():
    assert_fold_equals_hook(qwen2(), four_sites())


def test_complement_form_and_per_head_form():
    removed = SiteOperator(1.0, operator(3).factor_DR, -torch.ones(3))
    assert_fold_equals_hook(qwen2(), Projection({site(): removed}))
    assert_fold_equals_hook(qwen2(), Projection({site(): per_head()}, insertion="head"))


def test_fused_module_changes_only_the_columns_of_the_site():
    model = random_model(Phi3Config(**SIZES, intermediate_size=48, num_key_value_heads=2))
    name = "model.layers.2.self_attn.qkv_proj"
    key, value = KVSite(2, "key", name, ((32, 48),)), KVSite(2, "value", name, ((48, 64),))
    assert_fold_equals_hook(model, Projection({key: operator(), value: operator(seed=1)}))
    weight = model.get_submodule(name).weight
    before = weight.detach().clone()
    with projected(model, Projection({value: operator()}), "fold"):
        assert torch.equal(weight[:48], before[:48])
        assert not torch.equal(weight[48:], before[48:])


def test_conv1d_and_interleaved_columns():
    model = random_model(GPT2Config(**SIZES, n_positions=64, attn_pdrop=0, resid_pdrop=0, embd_pdrop=0))
    name = "transformer.h.2.attn.c_attn"
    key, value = KVSite(2, "key", name, ((32, 64),), 4), KVSite(2, "value", name, ((64, 72), (80, 96)), 3)
    assert_fold_equals_hook(model, Projection({key: operator(width=32), value: operator(width=24)}))


def test_a_lora_adapter_is_folded_with_its_base():
    assert_fold_equals_hook(lora_model(), four_sites())
    assert_fold_equals_hook(lora_model(lora_bias=True, use_rslora=True), four_sites())


def test_a_merged_adapter_is_folded_and_unmerges_to_the_same_model():
    model = lora_model()
    model.merge_adapter()
    assert_fold_equals_hook(model, four_sites())


def test_dora_is_refused_until_it_is_merged():
    model = lora_model(use_dora=True)
    with pytest.raises(ConfigError, match="DoRA"), projected(model, four_sites(), "fold"):
        pass
    model.merge_adapter()
    assert_fold_equals_hook(model, four_sites())


def test_other_adapters_than_lora_are_refused():
    model = get_peft_model(tiny_model(), LoHaConfig(target_modules=["k_proj"], r=2)).eval()
    with pytest.raises(ConfigError, match="only LoRA can be folded"), projected(model, four_sites(), "fold"):
        pass


def test_weights_come_back_after_an_exception():
    model = qwen2()
    before = bits(model)

    def fail() -> None:
        with projected(model, four_sites(), "fold"):
            assert not torch.equal(
                before["model.layers.2.self_attn.k_proj.bias"], model.model.layers[2].self_attn.k_proj.bias
            )
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    after = bits(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_second_fold_is_refused_and_so_is_a_hook_on_a_folded_module():
    model = tiny_model()
    for mode in ("fold", "hook"):
        with (
            projected(model, four_sites(), "fold"),
            pytest.raises(DataError, match="projected already"),
            projected(model, four_sites(), mode),
        ):
            pass
    assert_fold_equals_hook(model, four_sites())


def test_after_the_observed_calls_a_folded_model_has_no_hooks():
    model = tiny_model()
    with projected(model, four_sites(), "fold", observe=1):
        logits(model)
        assert num_hooks(model) == 0
    with projected(model, four_sites(), "fold", observe=0) as applied:
        assert num_hooks(model) == 0
        logits(model)
    assert applied.leakage() is None


def test_bf16_is_rounded_once():
    model = qwen2().bfloat16()
    exact = qwen2().bfloat16().float()
    with projected(model, four_sites(), "fold"), projected(exact, four_sites(), "fold"):
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, exact.get_parameter(name).bfloat16())


def test_a_mild_projection_that_bfloat16_weights_would_round_away_is_refused_and_nothing_was_changed():
    mild = Projection({site(): operator(keep=0.995, weight=0.005)})
    with projected(tiny_model(), mild, "fold"):
        pass
    model = tiny_model().bfloat16()
    before = bits(model)
    with (
        pytest.raises(ConfigError, match=r"into bfloat16 weights, layers\.2\.key keeps \d+% of .*apply_as=hook, or"),
        projected(model, mild, "fold"),
    ):
        pass
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_keys_after_rope_are_refused_and_values_are_not():
    with (
        pytest.raises(ConfigError, match="turn with the position"),
        projected(tiny_model(), four_sites(insertion="rope"), "fold"),
    ):
        pass
    assert_fold_equals_hook(tiny_model(), Projection({site(kind="value"): operator()}, insertion="rope"))


def test_quantised_weights_are_refused():
    model = tiny_model()
    linear = model.get_submodule(site().module)
    linear.weight = torch.nn.Parameter(torch.zeros(WIDTH * 32 // 2, 1, dtype=torch.uint8), requires_grad=False)
    with (
        pytest.raises(ConfigError, match=r"Linear of torch\.uint8.*4-bit leaks"),
        projected(model, four_sites(), "fold"),
    ):
        pass


def test_tied_weights_are_refused():
    model = tiny_model()
    model.get_submodule(site(3).module).weight = model.get_submodule(site(2).module).weight
    with pytest.raises(ConfigError, match="weights are tied"), projected(model, four_sites(), "fold"):
        pass


def test_the_whole_key_of_latent_attention_is_refused():
    model = tiny_model()
    model.model.layers[2].self_attn.kv_a_proj_with_mqa = torch.nn.Linear(4, WIDTH)
    latent = KVSite(2, "key", "model.layers.2.self_attn.kv_a_proj_with_mqa", ((0, WIDTH),))
    with (
        pytest.raises(ConfigError, match="latent that keys and values share"),
        projected(model, Projection({latent: operator()}), "fold"),
    ):
        pass
