import dataclasses
from contextlib import nullcontext

import pytest
import torch
from families import FAMILIES, family_model
from tiny import tiny_config
from transformers import AutoModelForCausalLM, PretrainedConfig

from spd_dist.config import Calibrate, Finetune
from spd_dist.errors import DataError
from spd_dist.models.gradient_capture import capture
from spd_dist.models.kv_sites import discover_sites
from spd_dist.models.lora import add_adapters, key_dropout, token_key
from spd_dist.models.loss import Student, example_losses
from spd_dist.models.model_stats import meta_model, shallow
from spd_dist.planner.dry_run import LiveBytes, calibrate_peak, finetune_peak, inputs_peak

CONFIG = tiny_config(hidden_size=64, intermediate_size=176, num_hidden_layers=7, vocab_size=512)
KINDS = ("llama", "qwen3_moe", "gemma3", "gpt2", "deepseek_v3", "qwen3_next", "gpt_oss", "falcon_grouped")
"""Families of which each has something that no other before it has: experts, windows, other modules, parts of keys."""
FINETUNE = Finetune(micro_batch_size=3, max_tokens=80, lora_rank=4)
CALIBRATE = Calibrate(batch_size=3, max_tokens=64)


def real_model(config=CONFIG):
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)


def trained_peak(finetune):
    """Of a real forward and backward pass, gradients of parameters left out."""
    model = real_model()
    adapted = add_adapters(model, finetune, generator=torch.Generator()) if finetune.mode == "lora" else None
    keys = None if adapted is None else key_dropout(adapted)
    if adapted is None:
        model.requires_grad_(True)
    if finetune.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    student = Student(model, nullcontext if finetune.loss == "distil" else None).train()
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    token_BT = torch.randint(3, 500, (3, 80))
    source_N, label_N = torch.arange(239), token_BT.flatten()[1:]
    with LiveBytes([*student.parameters(), *student.buffers(), token_BT]) as live:
        if keys is not None:
            keys.key_BT = token_key(token_BT, token_BT)
        student(token_BT, source_N, label_N if student.teacher is None else None)[0].backward()
    return live.peak


@pytest.mark.seconds
@pytest.mark.parametrize("changes", [{}, {"mode": "full"}, {"loss": "distil"}], ids=lambda changes: str(changes))
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_pass_holds_what_two_shallow_copies_foretell(changes, checkpointing):
    finetune = dataclasses.replace(FINETUNE, checkpointing=checkpointing, **changes)
    assert finetune_peak(CONFIG, finetune, torch.float32) == pytest.approx(trained_peak(finetune), rel=0.05)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_capturing_gradients_holds_what_two_shallow_copies_foretell(checkpointing):
    calibrate = dataclasses.replace(CALIBRATE, checkpointing=checkpointing)
    model = real_model()
    sites = discover_sites(model, [2])
    token_BT = torch.randint(3, 500, (3, 64))
    target_BT = torch.arange(64).expand(3, 64) >= 32
    with (
        LiveBytes([*model.parameters(), *model.buffers(), token_BT, target_BT]) as live,
        capture(model, sites, checkpointing=checkpointing) as caught,
    ):
        attended_BT = torch.ones_like(token_BT)
        attended_BT[0, -1] = 0  # with padding, attention has a mask
        loss_B = example_losses(model, token_BT, attended_BT, target_BT)
        caught.gradients(loss_B.sum(), attended_BT.bool())
    foretold = calibrate_peak(CONFIG, calibrate, torch.float32, num_layers=5)
    assert foretold == pytest.approx(live.peak, rel=0.1)


@pytest.mark.seconds
def test_linear_layers_of_zero3_keep_the_inputs_of_frozen_weights():
    linear = torch.nn.functional.linear
    sharded = finetune_peak(CONFIG, FINETUNE, torch.float32, is_sharded=True)
    of_mlps = 4 * 3 * 80 * 7 * (64 + 176)  # one input of gate and up, and that of down
    assert of_mlps < sharded - finetune_peak(CONFIG, FINETUNE, torch.float32) < 1.5 * of_mlps
    assert torch.nn.functional.linear is linear


def test_adapters_that_begin_at_their_inputs_hold_a_square_for_each_input():
    corda = dataclasses.replace(FINETUNE, lora_init="corda")
    squares = 4 * CONFIG.num_hidden_layers * 2 * CONFIG.hidden_size**2  # one for q, k and v, and one for o
    assert squares < inputs_peak(CONFIG, corda, torch.bfloat16) < 3 * squares
    wider = dataclasses.replace(corda, lora_targets=("down_proj",))
    assert inputs_peak(CONFIG, wider, torch.bfloat16) > 4 * CONFIG.num_hidden_layers * CONFIG.intermediate_size**2


@pytest.mark.seconds
def test_experts_with_adapters_are_told_without_weights():
    """Weights and update of all experts are kept for the backward pass, unless it is checkpointed."""
    config = family_model("qwen3_moe").config
    changes = {"lora_parameters": ("experts.gate_up_proj", "experts.down_proj"), "lora_dropout": 0.0, "max_tokens": 32}
    experts = dataclasses.replace(FINETUNE, **changes)
    plain = finetune_peak(config, dataclasses.replace(experts, lora_parameters=()), torch.bfloat16)
    with_experts = finetune_peak(config, experts, torch.bfloat16)
    assert with_experts > plain + 2 * 4 * 4 * (3 * 32 * 16)  # bytes x layers x experts x weights
    assert finetune_peak(config, dataclasses.replace(experts, checkpointing=True), torch.bfloat16) < with_experts


@pytest.mark.seconds
def test_checkpointing_holds_less_and_a_longer_batch_more():
    plain = finetune_peak(CONFIG, FINETUNE, torch.bfloat16)
    assert finetune_peak(CONFIG, dataclasses.replace(FINETUNE, checkpointing=True), torch.bfloat16) < plain / 2
    assert finetune_peak(CONFIG, dataclasses.replace(FINETUNE, micro_batch_size=6), torch.bfloat16) > 1.8 * plain


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(
    "name", [name if name in KINDS else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
@pytest.mark.seconds
def test_every_architecture_tells_without_weights(name):
    config = family_model(name).config
    targets = {"lora_targets": (FAMILIES[name].value[0].rpartition(".")[2],), "lora_dropout": 0.0}
    finetune = dataclasses.replace(FINETUNE, max_tokens=32, **targets)
    assert finetune_peak(config, finetune, torch.bfloat16) > 0
    calibrate = dataclasses.replace(CALIBRATE, max_tokens=32)
    few, more = (calibrate_peak(config, calibrate, torch.bfloat16, num_layers=layers) for layers in (2, 4))
    assert 0 < few < more


def test_a_copy_with_fewer_layers_has_shorter_lists_too():
    config = family_model("gemma3").config
    copied = shallow(config, 2)
    assert (copied.num_hidden_layers, len(copied.layer_types)) == (2, 2)
    assert len(config.layer_types) == config.num_hidden_layers == 4
    assert all(parameter.is_meta for parameter in meta_model(copied, torch.float32).parameters())


def test_what_cannot_be_told_is_an_error():
    with pytest.raises(
        DataError, match=r"no bert_x model can be built from its config .* choose a causal language model"
    ):
        meta_model(Unknown(), torch.float32)
    with pytest.raises(DataError, match=r"what a mixtral model holds can't be told .* need model.dtype=bfloat16"):
        finetune_peak(family_model("mixtral").config, FINETUNE, torch.float32)


class Unknown(PretrainedConfig):
    model_type = "bert_x"
