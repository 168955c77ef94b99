"""Base weights of 4 bits: gradients are those of the values they stand for, and what hashes them sees their scales."""

import dataclasses
import importlib.util
import re

import pytest
import torch
from peft import PeftModel
from peft.utils.integrations import dequantize_module_weight
from tiny import save_tiny_model, tiny_model
from torch import nn

from spd_dist.config import Calibrate, Distributed, Finetune, Model
from spd_dist.distributed.world import World
from spd_dist.distributed.zero import weights_fingerprint
from spd_dist.errors import ConfigError
from spd_dist.models.gradient_capture import capture
from spd_dist.models.kv_sites import discover_sites
from spd_dist.models.lora import add_adapters, quantised_sizes, remove_adapters, save_adapter, saved_parameters
from spd_dist.models.loss import example_losses
from spd_dist.models.policy import load_policy
from spd_dist.models.save_weights import whole_tensors

pytest.importorskip("bitsandbytes", reason="the extra quantized is not installed")
pytestmark = pytest.mark.slow  # make test-slow brings it

ALONE = World(0, 1, torch.device("cpu"))
TOKENS = torch.arange(3, 30)[None]
WHOLE = Distributed(zero_stage=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("policy"), hidden_size=64, intermediate_size=128, head_dim=16)


@pytest.fixture
def model(folder):
    return load_policy(Model(name=str(folder), quantization="nf4"), WHOLE, ALONE).model


def as_it_is_read(model: nn.Module, folder) -> nn.Module:
    """A plain model with the values that the codes stand for."""
    plain = load_policy(Model(name=str(folder)), WHOLE, ALONE).model
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            plain.get_submodule(name).weight.data = dequantize_module_weight(module).detach().clone()
    return plain


def gradients(model: nn.Module) -> list[torch.Tensor]:
    sites = discover_sites(model, Calibrate().layers)
    target_BT = torch.zeros_like(TOKENS, dtype=torch.bool)
    target_BT[0, 10:] = True
    with capture(model, sites) as caught, torch.enable_grad():
        loss_B = example_losses(model, TOKENS, torch.ones_like(TOKENS), target_BT)
        return list(torch.autograd.grad(loss_B.sum(), caught.outputs))


def test_gradients_at_the_sites_are_those_of_the_weights_that_the_codes_stand_for(model, folder):
    four_bits = [module for module in model.modules() if type(module).__name__ == "Linear4bit"]
    assert len(four_bits) == 4 * 7
    assert sum(quantised_sizes(tiny_model())) == 4 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    for found, expected in zip(gradients(model), gradients(as_it_is_read(model, folder)), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_fingerprint_is_that_of_codes_and_of_scales(model, folder):
    again = load_policy(Model(name=str(folder), quantization="nf4"), WHOLE, ALONE).model
    assert weights_fingerprint(again) == weights_fingerprint(model)
    assert weights_fingerprint(as_it_is_read(model, folder)) != weights_fingerprint(model)
    state = again.model.layers[0].mlp.down_proj.weight.quant_state
    state.offset = state.offset * 2
    assert weights_fingerprint(again) != weights_fingerprint(model)


@pytest.mark.parametrize("changes", [{}, {"lora_variant": "dora"}, {"lora_init": "pissa"}, {"lora_init": "olora"}])
def test_an_adapter_of_4_bit_weights_is_read_back_beside_them(model, folder, tmp_path, changes):
    base, before = model(TOKENS).logits, weights_fingerprint(model)
    config = dataclasses.replace(Finetune(lora_rank=4, lora_dropout=0.0), **changes)
    adapted = add_adapters(model, config, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(TOKENS).logits, base, atol=1e-4, rtol=1e-4)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name and parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    expected = model(TOKENS).logits
    assert (expected - base).abs().max() > 0.1
    save_adapter(adapted, dict(whole_tensors(saved_parameters(adapted))), tmp_path)
    remove_adapters(adapted)
    assert weights_fingerprint(model) == before
    again = load_policy(Model(name=str(folder), quantization="nf4"), WHOLE, ALONE).model
    found = PeftModel.from_pretrained(again, tmp_path).eval()(TOKENS).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_missing_package_is_named_with_the_extra_that_has_it(folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    message = re.escape("model.quantization: nf4 needs bitsandbytes; pip install 'spd_dist[quantized]', or set")
    with pytest.raises(ConfigError, match=message):
        load_policy(Model(name=str(folder), quantization="nf4"), WHOLE, ALONE)
