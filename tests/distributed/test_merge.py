"""A student merged on shards is the student: the model of the next round."""

from pathlib import Path

import pytest
import torch
from finetuning import train
from peft import PeftModel
from ranks import run_on_ranks
from tiny import save_tiny_model, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from spd_dist.config import Distributed, Model
from spd_dist.distributed.world import join_world
from spd_dist.distributed.zero import weights_fingerprint
from spd_dist.models.policy import load_policy
from spd_dist.runs.rounds import write_merged

TOKENS = torch.arange(3, 40)[None]
SHARDED = Distributed(timeout_seconds=60, deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}})


def merge(model: Path, adapter: Path, folder: Path, zero_stage: int) -> None:
    config = SHARDED if zero_stage == 3 else Distributed(zero_stage=0, timeout_seconds=60)
    world = join_world(config)
    policy = load_policy(Model(name=str(model)), config, world)
    write_merged(policy, adapter, folder, world)
    assert weights_fingerprint(policy.model) == policy.fingerprint, "the policy is as it was"


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_the_merged_model_is_base_and_adapter_whether_sharded_or_not(tmp_path, variant):
    model = save_tiny_model(tmp_path / "model")
    train(model, tmp_path / "student", distributed={"zero_stage": 0}, lora_variant=variant, num_epochs=1)
    adapter = tmp_path / "student" / "adapter"
    student = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)
    expected = student(TOKENS).logits
    assert not torch.allclose(expected, tiny_model()(TOKENS).logits, atol=1e-4)
    run_on_ranks(2, tmp_path / "store", merge, model, adapter, tmp_path / "sharded", 3)
    merge(model, adapter, tmp_path / "whole", 0)
    for folder in (tmp_path / "sharded", tmp_path / "whole"):
        merged = AutoModelForCausalLM.from_pretrained(folder)
        torch.testing.assert_close(merged(TOKENS).logits, expected, rtol=0, atol=1e-5)
        assert AutoTokenizer.from_pretrained(folder).chat_template
        assert not (folder.with_name(f"{folder.name}.partial")).exists()
