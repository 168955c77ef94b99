"""Adapters that begin at the weights or at their inputs train alike on one rank and on two, whole and sharded."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from finetuning import train
from peft import PeftModel
from ranks import run_on_ranks
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM

from spd_dist.distributed.zero import weights_fingerprint

TOKENS = torch.arange(3, 40)[None]


def train_each(model: Path, folder: Path, zero_stage: int, inits: list[str]) -> None:
    """Train from each start; rank 0 writes the losses down."""
    for init in inits:
        changes = {"lora_init": init, "lora_rank": 4, "lora_init_examples": 9}
        trained = train(model, folder / init, distributed={"zero_stage": zero_stage}, **changes)
        assert weights_fingerprint(trained.policy.model) == trained.policy.fingerprint, "the base weights are untouched"
        if dist.get_rank() == 0:
            torch.save(trained.losses, folder / f"{init}.pt")


@pytest.mark.parametrize("inits", [["corda"], pytest.param(["pissa", "eva"], marks=pytest.mark.slow)])
def test_two_sharded_ranks_make_the_student_of_one(tmp_path, inits):
    model = save_tiny_model(tmp_path / "policy")
    for world_size, zero_stage in ((1, 0), (2, 3)):
        folder = tmp_path / str(world_size)
        run_on_ranks(world_size, tmp_path / f"store-{world_size}", train_each, model, folder, zero_stage, inits)
    for init in inits:
        losses, logits = [], []
        for world_size in (1, 2):
            losses.append(torch.load(tmp_path / str(world_size) / f"{init}.pt"))
            student = PeftModel.from_pretrained(
                AutoModelForCausalLM.from_pretrained(model), tmp_path / str(world_size) / init / "adapter"
            )
            with torch.no_grad():
                logits.append(student.eval()(TOKENS).logits)
        torch.testing.assert_close(losses[1], losses[0], atol=2e-6, rtol=0)
        torch.testing.assert_close(logits[1], logits[0], atol=2e-4, rtol=0)
        first, second = losses[0].chunk(2)
        assert second.mean() < first.mean() - 0.1, f"{init} learns"
