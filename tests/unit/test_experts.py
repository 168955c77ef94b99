"""Adapters of experts in one tensor: as peft has them, saved and merged, or refused before weights are there."""

import dataclasses

import pytest
import torch
from families import family_model
from peft import PeftModel
from transformers import AutoModelForCausalLM

from spd_dist.config import Finetune
from spd_dist.distributed.world import World
from spd_dist.distributed.zero import weights_fingerprint
from spd_dist.errors import ConfigError
from spd_dist.models.lora import (
    adapter_parameters,
    add_adapters,
    check_targets,
    merged_tensors,
    remove_adapters,
    save_adapter,
    saved_parameters,
)
from spd_dist.models.model_stats import meta_model
from spd_dist.models.save_weights import save_model, whole_tensors

ALONE = World(0, 1, torch.device("cpu"))
TOKENS = torch.arange(3, 30)[None]
EXPERTS = Finetune(
    lora_targets=("q_proj",), lora_parameters=("experts.gate_up_proj", "experts.down_proj"), lora_dropout=0.0,
    lora_rank=2,
)  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"lora_init": "gaussian", "lora_variant": "rslora"}], ids=["lora", "rslora"])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_experts_get_adapters_that_are_saved_and_merged(tmp_path, name, changes):
    model, base = family_model(name), family_model(name)
    draw = torch.Generator().manual_seed(0)
    adapted = add_adapters(model, dataclasses.replace(EXPERTS, **changes), generator=draw)
    torch.testing.assert_close(model(TOKENS).logits, base(TOKENS).logits)
    trained = adapter_parameters(adapted)
    assert sum(".experts." in one for one in trained) == 4 * 2 * 2
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    expected = model(TOKENS).logits
    save_adapter(adapted, dict(whole_tensors(saved_parameters(adapted))), tmp_path / "adapter")
    save_model(model, merged_tensors(adapted), tmp_path / "model", world=ALONE)
    plain = PeftModel.from_pretrained(family_model(name), tmp_path / "adapter").eval()
    torch.testing.assert_close(plain(TOKENS).logits, expected)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    torch.testing.assert_close(merged(TOKENS).logits, expected, atol=1e-4, rtol=1e-4)
    remove_adapters(adapted)
    assert weights_fingerprint(model) == weights_fingerprint(base), "the same bits in the same order"


def test_experts_begin_the_same_whatever_the_global_generator_holds():
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        adapted = add_adapters(family_model("mixtral"), EXPERTS, generator=torch.Generator().manual_seed(0))
        found.append({name: parameter.clone() for name, parameter in adapter_parameters(adapted).items()})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(("name", "changes", "message"), [
    ("qwen3_moe", {"lora_parameters": ("experts.w1",)},
     r"lora_parameters: \['experts.w1'\] are no weights .* has \['experts.down_proj', 'experts.gate_up_proj'\]; set "),
    ("llama", {}, r"lora_parameters: .* are no weights of experts in one tensor; this model has none; set .*=\[\]"),
    ("qwen3_moe", {"lora_parameters": (), "lora_targets": ("all-linear",)},
     r"lora_targets: \['all-linear'\] would get no adapter in the experts .* set finetune.lora_parameters="
     r"\[experts.down_proj,experts.gate_up_proj\] and finetune.lora_dropout=0, or .* finetune.mode=full"),
])  # fmt: skip
def test_experts_out_of_reach_are_an_error_without_weights(name, changes, message):
    skeleton = meta_model(family_model(name).config, torch.float32)
    with pytest.raises(ConfigError, match=rf"finetune\.{message}"):
        check_targets(skeleton, dataclasses.replace(EXPERTS, **changes))
    check_targets(meta_model(family_model("qwen3_moe").config, torch.float32), EXPERTS)


def test_experts_that_are_stored_quantised_are_an_error_without_weights():
    skeleton = meta_model(family_model("gpt_oss").config, torch.float32)
    skeleton.config.quantization_config = {"quant_method": "mxfp4"}
    with pytest.raises(ConfigError, match=r"lora_parameters: .* whose experts are stored as mxfp4, .* in bfloat16, or"):
        check_targets(skeleton, EXPERTS)
    check_targets(skeleton, dataclasses.replace(EXPERTS, lora_parameters=()))
