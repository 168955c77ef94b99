"""Adapters come, are saved as peft reads them, and go without a trace."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from families import family_model
from peft import PeftModel
from tiny import tiny_model
from transformers import AutoModelForCausalLM

from spd_dist.config import Finetune
from spd_dist.distributed.world import World
from spd_dist.distributed.zero import weights_fingerprint
from spd_dist.errors import ConfigError, DataError
from spd_dist.models.lora import (
    KeyedDropout,
    adapter_parameters,
    add_adapters,
    key_dropout,
    load_adapter,
    merged_tensors,
    remove_adapters,
    save_adapter,
    saved_parameters,
)
from spd_dist.models.save_weights import save_model, stored_parameters, whole_tensors

ALONE = World(0, 1, torch.device("cpu"))
TOKENS = torch.arange(3, 30)[None]


def adapted_model(variant: str = "lora", seed: int = 0, **changes: object) -> tuple[torch.nn.Module, PeftModel]:
    model = tiny_model()
    config = dataclasses.replace(Finetune(lora_variant=variant), **changes)
    adapted = add_adapters(model, config, generator=torch.Generator().manual_seed(seed))
    return model, adapted


def train_a_little(adapted: PeftModel) -> None:
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapter_parameters(adapted).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))


def test_adapters_begin_as_the_base_model_whatever_the_global_generator_holds():
    base = tiny_model()(TOKENS).logits
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        model, adapted = adapted_model()
        assert torch.equal(torch.random.get_rng_state(), before)
        torch.testing.assert_close(model.eval()(TOKENS).logits, base)
        found.append({name: parameter.clone() for name, parameter in adapter_parameters(adapted).items()})
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) == 4 * 4 * 2
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "lora" not in name)


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_a_saved_adapter_and_a_merged_model_load_in_plain_peft_and_transformers(tmp_path, variant):
    model, adapted = adapted_model(variant)
    key_dropout(adapted)
    train_a_little(adapted)
    expected = model.eval()(TOKENS).logits
    save_adapter(adapted, dict(whole_tensors(adapter_parameters(adapted))), tmp_path / "adapter")
    save_model(model, merged_tensors(adapted), tmp_path / "model", world=ALONE, shard_bytes=10_000)
    plain = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter").eval()
    torch.testing.assert_close(plain(TOKENS).logits, expected)
    assert len(list((tmp_path / "model").glob("model-*-of-*.safetensors"))) > 2
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(merged(TOKENS).logits, expected, atol=1e-5, rtol=1e-5)


def test_the_base_model_is_the_same_bits_after_adapters_were_there(tmp_path):
    model, adapted = adapted_model()
    train_a_little(adapted)
    save_adapter(adapted, dict(whole_tensors(adapter_parameters(adapted))), tmp_path)
    remove_adapters(adapted)
    assert weights_fingerprint(model) == weights_fingerprint(tiny_model())
    loaded = load_adapter(model, tmp_path)
    assert not torch.allclose(loaded(TOKENS).logits, tiny_model()(TOKENS).logits)
    remove_adapters(loaded)
    assert weights_fingerprint(model) == weights_fingerprint(tiny_model())


def test_dropout_is_keyed_in_every_adapter():
    _, adapted = adapted_model()
    keys = key_dropout(adapted)
    modules = [module for module in adapted.modules() if isinstance(module, KeyedDropout)]
    assert len(modules) == 16
    assert len({module.module_key for module in modules}) == 16
    assert all(module.keys is keys for module in modules)


def test_a_target_that_the_model_has_not_is_an_error():
    with pytest.raises(ConfigError, match=r"finetune\.lora_targets: \['c_attn'\] are no linear modules .*'k_proj'"):
        adapted_model(lora_targets=("q_proj", "c_attn"))


def test_experts_in_one_tensor_get_no_adapter_in_silence():
    """Neither where no module has the name, nor where one outside of the experts has it."""
    config = dataclasses.replace(Finetune(), lora_targets=("q_proj", "gate_proj"))
    draw = torch.Generator().manual_seed(0)
    with pytest.raises(ConfigError, match=r"lora_targets: \['gate_proj'\] are no linear modules"):
        add_adapters(family_model("qwen3_moe"), config, generator=draw)
    mixed = family_model("qwen3_moe")
    mixed.model.layers[0].mlp = copy.deepcopy(family_model("qwen3").model.layers[0].mlp)
    with pytest.raises(ConfigError, match=r"\['gate_proj'\] would get no adapter in the experts .* finetune.mode=full"):
        add_adapters(mixed, config, generator=draw)
    attention = dataclasses.replace(Finetune(), lora_targets=("q_proj",))
    assert adapter_parameters(add_adapters(mixed, attention, generator=draw))
    assert adapter_parameters(add_adapters(family_model("llama"), config, generator=draw))


def test_a_whole_model_is_stored_once_a_tied_weight(tmp_path):
    model = tiny_model()
    stored = stored_parameters(model)
    assert "lm_head.weight" not in stored
    save_model(model, whole_tensors(stored), tmp_path, world=ALONE)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert weights_fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path)) == weights_fingerprint(model)


def test_a_folder_that_cannot_be_written_is_an_error_at_the_first_shard(tmp_path):
    model = tiny_model()
    gathered: list[str] = []

    def tensors() -> object:
        for name, tensor in whole_tensors(stored_parameters(model)):
            gathered.append(name)
            yield name, tensor

    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/model/part-00001\.safetensors cannot be written: .*make room"):
        save_model(model, tensors(), Path(tmp_path / "file/model"), world=ALONE, shard_bytes=10_000)
    assert len(gathered) < len(stored_parameters(model))


@pytest.mark.parametrize("changes", [{}, {"lora_init": "olora"}, {"lora_variant": "dora"}])
def test_adapters_go_on_from_saved_ones(changes, tmp_path):
    model, adapted = adapted_model(**changes)
    train_a_little(adapted)
    save_adapter(adapted, saved_parameters(adapted), tmp_path)
    config = dataclasses.replace(Finetune(), **changes)
    other = tiny_model()
    again = add_adapters(other, config, generator=torch.Generator().manual_seed(9), start=tmp_path)
    assert adapter_parameters(again).keys() == adapter_parameters(adapted).keys(), "what is trained is trained again"
    for name, parameter in saved_parameters(adapted).items():
        assert torch.equal(saved_parameters(again)[name], parameter)
    assert torch.equal(other.eval()(TOKENS).logits, model.eval()(TOKENS).logits)
    unlike = dataclasses.replace(config, lora_rank=config.lora_rank // 2)
    with pytest.raises(DataError, match=r"is an adapter of other settings: .*lora_A.* is \(.*, and would be \("):
        add_adapters(tiny_model(), unlike, generator=torch.Generator(), start=tmp_path)
