"""Capture gives the gradients of a full backward pass for less, and leaves nothing behind."""

import pytest
import torch
from families import FAMILIES, family_model
from tiny import tiny_model
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close
from transformers import AutoModel

from spd_dist.errors import DataError
from spd_dist.models.gradient_capture import capture, supervised_rows
from spd_dist.models.kv_sites import discover_sites
from spd_dist.models.loss import example_losses
from spd_dist.types import KVSite

TOKENS_BT = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
ALL_BT = torch.ones_like(TOKENS_BT, dtype=torch.bool)
TARGET_BT = torch.zeros_like(ALL_BT)
TARGET_BT[0, 4:6] = TARGET_BT[1, 3] = True


def loss_of(model):
    return example_losses(model, TOKENS_BT, ALL_BT.long(), TARGET_BT).sum()


def gradients(model, sites, **options):
    with capture(model, sites, **options) as caught:
        return caught.gradients(loss_of(model), ALL_BT)


def saved_bytes(run):
    """What a forward pass keeps for its backward pass, weights left out."""
    total, seen = 0, set()

    def pack(tensor):
        nonlocal total
        if not isinstance(tensor, torch.nn.Parameter) and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            total += tensor.nbytes
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = run()
    del kept
    return total


def footprint(model):
    """Everything that capture touches."""
    return [
        (name, module.training, len(module._forward_hooks), len(module._forward_pre_hooks), "forward" in vars(module))
        for name, module in model.named_modules()
    ] + [(name, parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()]


@pytest.mark.parametrize("name", FAMILIES)
def test_supervised_rows_give_the_loss_of_all_logits(name):
    model = family_model(name)
    logit_BTV = model(TOKENS_BT, use_cache=False).logits.log_softmax(-1)
    nll_BT = torch.zeros(TOKENS_BT.shape)
    nll_BT[:, 1:] = -logit_BTV[:, :-1].gather(-1, TOKENS_BT[:, 1:, None])[..., 0]
    expected_B = (nll_BT * TARGET_BT).sum(1) / TARGET_BT.sum(1)
    assert_close(example_losses(model, TOKENS_BT, ALL_BT.long(), TARGET_BT), expected_B, rtol=1e-5, atol=1e-6)


def test_positions_behind_the_last_target_have_zero_gradient():
    model = tiny_model()
    for grad_ND in gradients(model, discover_sites(model)).values():
        grad_BTD = grad_ND.view(2, 9, -1)
        assert grad_BTD[0, :5].abs().sum(-1).all()  # position 4 still predicts the target at 5
        assert not grad_BTD[0, 5:].any()
        assert not grad_BTD[1, 3:].any()


def test_a_higher_site_does_not_cut_the_path_to_a_lower_one():
    model = tiny_model()
    low, high = discover_sites(model, [1], "key")[0], discover_sites(model, [3], "value")[0]
    alone, both = gradients(model, [low]), gradients(model, [low, high])
    assert_close(both[low], alone[low], rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "phi3", "falcon", "deepseek_v3", "qwen3_next"])
def test_checkpointing_keeps_less_and_gives_the_same(name):
    model = family_model(name)
    sites = discover_sites(model)
    plain, recomputed = gradients(model, sites), gradients(model, sites, checkpointing=True)
    for site in sites:
        assert_close(recomputed[site], plain[site], rtol=0, atol=1e-6 * plain[site].abs().max().item())

    def kept(checkpointing):
        with capture(model, sites, checkpointing=checkpointing):
            return saved_bytes(lambda: loss_of(model))

    assert kept(True) < kept(False) / 2


def test_nothing_below_the_lowest_site_is_kept():
    model = tiny_model(num_hidden_layers=8)
    full = saved_bytes(lambda: loss_of(model.requires_grad_(True)))
    model.requires_grad_(False)
    with capture(model, discover_sites(model, ["middle"])):
        half = saved_bytes(lambda: loss_of(model))
    with capture(model, discover_sites(model, ["last"])):
        last = saved_bytes(lambda: loss_of(model))
    assert half < 0.5 * full
    assert last < 0.15 * full


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_agree(attention):
    model, reference = tiny_model(), tiny_model()
    model.set_attn_implementation(attention)
    sites = discover_sites(model)
    expected = gradients(reference, sites)
    for site, grad_ND in gradients(model, sites).items():
        assert_close(grad_ND, expected[site], rtol=0, atol=1e-5 * expected[site].abs().max().item())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_is_left_behind_when_the_loss_fails(checkpointing):
    model = tiny_model().train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    before, sites = footprint(model), discover_sites(model)

    def fail():
        with capture(model, sites, checkpointing=checkpointing), supervised_rows(model, TARGET_BT):
            assert not model.training
            assert not any(parameter.requires_grad for parameter in model.parameters())
            model(TOKENS_BT)
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail()
    assert footprint(model) == before


def test_nothing_is_left_behind_when_a_site_is_not_in_the_model():
    model = tiny_model().train()
    before = footprint(model)
    with (
        pytest.raises(AttributeError),
        capture(model, [*discover_sites(model), KVSite(9, "key", "no.such", ((0, 1),))]),
    ):
        pass
    assert footprint(model) == before


def test_no_parameter_gets_a_gradient():
    model = tiny_model().requires_grad_(True)
    gradients(model, discover_sites(model))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_a_site_that_did_not_run_is_named():
    model = tiny_model()
    sites = discover_sites(model)
    with capture(model, sites) as caught:
        loss = loss_of(model)
        caught.gradients(loss, ALL_BT)
        with pytest.raises(
            DataError, match=r"layers.2.key: model.layers.2.self_attn.k_proj took no part in the forward pass"
        ):
            caught.gradients(loss, ALL_BT)


def test_a_model_without_output_embeddings_is_refused():
    model = AutoModel.from_config(tiny_model().config)
    with pytest.raises(DataError, match="LlamaModel has no output embeddings"), supervised_rows(model, TARGET_BT):
        pass


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_half_precision_on_an_accelerator_gives_the_same_directions(attention):
    if attention == "flash_attention_2":
        pytest.importorskip("flash_attn")
    reference = tiny_model(head_dim=32)
    sites = discover_sites(reference)
    expected = gradients(reference, sites)
    model = tiny_model(head_dim=32).to("cuda", torch.bfloat16)
    model.set_attn_implementation(attention)
    on_device = [mask_BT.cuda() for mask_BT in (TOKENS_BT, ALL_BT.long(), TARGET_BT)]
    with capture(model, sites) as caught:
        found = caught.gradients(example_losses(model, *on_device).sum(), ALL_BT.cuda())
    for site in sites:
        pair = found[site].flatten().double().cpu(), expected[site].flatten().double()
        assert torch.nn.functional.cosine_similarity(*pair, dim=0) > 0.99
