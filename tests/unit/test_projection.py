"""Hooks: what they change, what they leave behind, and what they refuse."""

import pytest
import torch
from families import FAMILIES, family_model
from peft import LoraConfig, get_peft_model
from projections import TOKENS_BT, WIDTH, four_sites, logits, num_hooks, operator, per_head, site
from tiny import tiny_model
from torch.testing import assert_close
from transformers.models.llama import modeling_llama

from spd_dist.errors import ConfigError, DataError
from spd_dist.projection.hooks import projected
from spd_dist.projection.operators import SiteMap
from spd_dist.types import KVSite, Projection, SiteOperator


@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rank", [0, 3, 8, 15])
def test_every_form_of_an_operator_is_its_matrix(rank, keep):
    op = operator(rank, keep, weight=-0.7)
    matrix_DD = keep * torch.eye(WIDTH) + op.factor_DR @ torch.diag(op.weight_R) @ op.factor_DR.T
    z = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))
    assert_close(SiteMap(op)(z), z @ matrix_DD, atol=1e-6, rtol=1e-5)


def test_attention_sees_projected_keys_and_values_only_within_the_context():
    model, seen = tiny_model(), {}
    base = logits(model)
    projection = four_sites()
    with projected(model, projection) as applied:
        handles = [
            model.get_submodule(s.module).register_forward_hook(lambda m, i, z, s=s: seen.__setitem__(s, z))
            for s in applied.calls
        ]
        held = logits(model)
    for handle in handles:
        handle.remove()
    for place, op in projection.operators.items():
        assert_close(seen[place], seen[place] @ op.factor_DR @ op.factor_DR.T, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(base, held, atol=1e-2)
    assert torch.equal(base, logits(model))


@pytest.mark.parametrize("insertion", ["linear", "rope"])
def test_hooks_that_are_off_change_count_and_measure_nothing(insertion):
    model = tiny_model()
    base = logits(model)
    with projected(model, four_sites(insertion=insertion), observe=1) as applied:
        applied.is_on = False
        assert torch.equal(logits(model), base)
        assert (set(applied.calls.values()), applied.model_calls, applied.leakage()) == ({0}, 0, None)
        applied.is_on = True
        held = logits(model)
        assert (set(applied.calls.values()), applied.model_calls) == ({1}, 1)
        assert applied.leakage() < 1e-5
    with projected(model, four_sites(insertion=insertion)):
        assert torch.equal(logits(model), held)


def test_calls_are_counted_and_leakage_measured():
    model = tiny_model()
    with projected(model, four_sites(), observe=2) as applied:
        assert applied.leakage() is None
        for _ in range(3):
            logits(model)
    assert set(applied.calls.values()) == {3}
    assert applied.leakage() < 1e-5


def test_leakage_is_seen_when_something_undoes_the_projection():
    model = tiny_model()
    handle = model.get_submodule(site().module).register_forward_hook(lambda m, i, z: z)
    with projected(model, Projection({site(): operator()}), observe=1) as applied:
        hooks = model.get_submodule(site().module)._forward_hooks
        undo = model.get_submodule(site().module).register_forward_hook(lambda m, i, z: z + 1)
        hooks.move_to_end(next(key for key in hooks if key == list(hooks)[-2]))
        logits(model)
    undo.remove()
    handle.remove()
    assert applied.leakage() > 1e-2


def test_nothing_is_left_behind_after_an_exception():
    model = tiny_model()
    base, hooks = logits(model), num_hooks(model)

    def fail() -> None:
        with projected(model, four_sites()):
            logits(model)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert num_hooks(model) == hooks
    assert torch.equal(base, logits(model))
    with projected(model, four_sites()):
        logits(model)


def test_the_identity_changes_nothing():
    model = tiny_model()
    with projected(model, Projection({site(): operator(0, keep=1.0)})) as applied:
        assert torch.equal(logits(model), logits(tiny_model()))
    assert applied.leakage() == 0


def test_complement_and_basis_give_the_same_logits():
    model = tiny_model()
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3))).Q
    kept, removed = SiteOperator(0.0, basis[:, :12], torch.ones(12)), SiteOperator(1.0, basis[:, 12:], -torch.ones(4))
    results = []
    for op in (kept, removed):
        with projected(model, Projection({site(): op})) as applied:
            results.append(logits(model))
        assert applied.leakage() < 1e-5
    assert_close(*results, atol=2e-6, rtol=0)


def test_blend_is_measured_against_what_it_should_give():
    model = tiny_model()
    with projected(model, Projection({site(): operator(keep=0.25, weight=0.75)})) as applied:
        logits(model)
    assert applied.leakage() < 1e-5


def test_cached_decoding_equals_the_full_forward():
    model = tiny_model()
    with projected(model, four_sites()):
        full = logits(model)
        cache = model(input_ids=TOKENS_BT[:, :8]).past_key_values
        steps = [model(input_ids=TOKENS_BT[:, t : t + 1], past_key_values=cache).logits for t in range(8, 12)]
    assert_close(torch.cat(steps, 1), full[:, 8:], atol=1e-5, rtol=0)


def test_gradients_flow_after_a_first_call_in_inference_mode():
    model = tiny_model()
    with projected(model, four_sites()):
        with torch.inference_mode():
            model(input_ids=TOKENS_BT)
        model(input_ids=TOKENS_BT).logits.sum().backward()
    assert model.get_submodule(site(0).module).weight.grad.abs().sum() > 0


def test_bf16_leaks_only_its_rounding():
    model = tiny_model().bfloat16()
    with projected(model, four_sites()) as applied:
        logits(model)
    assert applied.leakage() < 6e-3


def test_the_outer_layer_of_a_peft_model_is_projected():
    model = get_peft_model(
        tiny_model(), LoraConfig(target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    with projected(model, four_sites()) as applied:
        hooked = logits(model)
        assert applied.leakage() is not None
    assert applied.leakage() < 1e-5
    merged = model.merge_and_unload()
    with projected(merged, four_sites()):
        assert_close(logits(merged), hooked, atol=2e-5, rtol=0)


def test_a_second_projection_of_a_module_is_refused_and_the_first_stays():
    model = tiny_model()
    with projected(model, four_sites()) as applied:
        once = logits(model)
        with (
            pytest.raises(DataError, match=r"layers\.2\.self_attn\.k_proj is projected already"),
            projected(model, four_sites()),
        ):
            pass
        assert torch.equal(once, logits(model))
    assert applied.leakage() < 1e-5


def test_a_site_that_the_model_never_called_is_an_error():
    model = tiny_model()
    model.model.spare = torch.nn.Linear(4, WIDTH)
    spare = KVSite(9, "key", "model.spare", ((0, WIDTH),))

    def run() -> None:
        with projected(model, Projection({spare: operator(), site(): operator()})):
            logits(model)

    with pytest.raises(DataError, match=r"never reached layers\.9\.key"):
        run()
    assert num_hooks(model) == 0
    with projected(model, Projection({spare: operator()})):
        pass  # the model did not run


@pytest.mark.parametrize(
    ("place", "op", "message"),
    [
        (KVSite(2, "key", "model.layers.9.self_attn.k_proj", ((0, 16),)), operator(), "has no module model.layers.9"),
        (KVSite(2, "key", "model.norm", ((0, 16),)), operator(), "not a linear module"),
        (KVSite(2, "key", site().module, ((8, 24),)), operator(), "has 16 output features and the subspace needs 24"),
        (site(), operator(width=8), r"factor is \(8, 6\) with 6 weights, and must be \(16, 6\)"),
        (site(), SiteOperator(0.0, 2 * operator().factor_DR, torch.ones(6)), "not orthonormal"),
    ],
)
def test_a_projection_of_another_model_is_refused(place, op, message):
    model = tiny_model()
    with pytest.raises(DataError, match=message), projected(model, Projection({place: op})):
        pass
    assert num_hooks(model) == 0


def test_sites_that_share_features_are_refused():
    both = Projection({site(): operator(), KVSite(2, "value", site().module, ((0, WIDTH),)): operator()})
    with pytest.raises(DataError, match="share output features"), projected(tiny_model(), both):
        pass


def test_an_unknown_mode_or_insertion_is_refused():
    with pytest.raises(ConfigError, match=r"generate\.apply_as"), projected(tiny_model(), four_sites(), mode="glue"):
        pass
    with pytest.raises(ConfigError, match=r"project\.insertion"), projected(tiny_model(), four_sites(insertion="nose")):
        pass


def test_a_module_that_returns_no_tensor_is_refused():
    model = tiny_model()
    model.get_submodule(site().module).register_forward_hook(lambda m, i, z: (z,))
    with pytest.raises(DataError, match="returns a tuple"), projected(model, Projection({site(): operator()})):
        logits(model)


def test_per_head_operators_mix_no_heads():
    model = tiny_model()
    with projected(model, Projection({site(): per_head()}, insertion="head")) as applied:
        logits(model)
    assert applied.leakage() < 1e-5
    mixing = Projection({site(): operator()}, insertion="head")
    with pytest.raises(DataError, match="reaches over 2 of 2 KV heads"), projected(model, mixing):
        pass


def test_after_rope_the_keys_in_the_cache_are_projected():
    model, projection = tiny_model(), four_sites(insertion="rope")
    rotation = modeling_llama.apply_rotary_pos_emb
    with projected(model, projection) as applied:
        output = model(input_ids=TOKENS_BT)
        key_BTD = output.past_key_values.layers[2].keys.transpose(1, 2).flatten(2)
        other = tiny_model()
        assert torch.equal(logits(other), logits(tiny_model()))  # a model beside it is not touched
    basis = projection.operators[site()].factor_DR
    assert_close(key_BTD @ basis @ basis.T, key_BTD, atol=1e-5, rtol=1e-5)
    assert set(applied.calls.values()) == {1}
    assert applied.leakage() < 1e-5
    assert modeling_llama.apply_rotary_pos_emb is rotation
    assert torch.equal(logits(model), logits(tiny_model()))


def test_rope_leaves_nothing_behind_after_an_exception_inside_attention():
    model = tiny_model()
    boom = model.get_submodule("model.layers.2.self_attn.o_proj").register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), projected(model, four_sites(insertion="rope")):
        logits(model)
    boom.remove()
    assert num_hooks(model) == 0
    assert torch.equal(logits(model), logits(tiny_model()))


@pytest.mark.parametrize("name", ["qwen3", "phi3", "gpt_neox", "gpt_oss", "falcon"])
def test_keys_are_projected_after_rope_in_every_storage(name):
    model, family = family_model(name), FAMILIES[name]
    place = family.site(family.layers[-1], "key")
    with projected(model, Projection({place: operator(4, width=place.width)}, insertion="rope")) as applied:
        held = logits(model)
    assert applied.calls[place] == 1
    assert applied.leakage() < 1e-5
    assert (logits(model) - held).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("gpt2", ConfigError, "GPT2Attention of layers.3.key does not rotate its whole keys"),
        ("deepseek_v3", ConfigError, "does not rotate its whole keys"),
        ("falcon_grouped", DataError, "not the whole key of width 16"),
    ],
)
def test_keys_that_rope_does_not_reach_are_refused(name, error, message):
    model, family = family_model(name), FAMILIES[name]
    place = family.site(family.layers[-1], "key")
    rope = Projection({place: operator(4, width=place.width)}, insertion="rope")
    with pytest.raises(error, match=message), projected(model, rope):
        logits(model)
    assert num_hooks(model) == 0
