"""Adapters of experts in one tensor train alike on one rank and on two, whole and sharded."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from families import family_model, save_family
from finetuning import train
from peft import PeftModel
from ranks import run_on_ranks

from spd_dist.distributed.zero import weights_fingerprint

TOKENS = torch.arange(3, 40)[None]
EXPERTS = {
    "lora_targets": ("q_proj",), "lora_parameters": ("experts.gate_up_proj", "experts.down_proj"), "lora_dropout": 0.0,
}  # fmt: skip


def train_and_keep(model: Path, folder: Path, zero_stage: int, changes: dict) -> None:
    """Train on these ranks; rank 0 writes the losses down."""
    trained = train(model, folder, distributed={"zero_stage": zero_stage}, **{**EXPERTS, **changes})
    assert weights_fingerprint(trained.policy.model) == trained.policy.fingerprint, "LoRA leaves the policy as it was"
    if dist.get_rank() == 0:
        torch.save(trained.losses, folder / "losses.pt")


@pytest.mark.parametrize(("name", "changes"), [
    ("qwen3_moe", {}),
    pytest.param("mixtral", {"lora_targets": ()}, marks=pytest.mark.slow),
    pytest.param("gpt_oss", {"checkpointing": True}, marks=pytest.mark.slow),
    pytest.param("qwen3_moe", {"checkpointing": True, "lora_variant": "rslora"}, marks=pytest.mark.slow),
])  # fmt: skip
def test_two_sharded_ranks_make_the_student_of_one(tmp_path, name, changes):
    model = save_family(name, tmp_path / "policy")
    losses, logits = [], []
    for world_size, zero_stage in ((1, 0), (2, 3)):
        folder = tmp_path / str(world_size)
        run_on_ranks(
            world_size, tmp_path / f"store-{world_size}", train_and_keep, model, folder, zero_stage,
            {**changes, "merge": world_size == 2},
        )  # fmt: skip
        losses.append(torch.load(folder / "losses.pt"))
        base = family_model(name, vocab_size=259, max_position_embeddings=512)
        with torch.no_grad():
            logits.append(PeftModel.from_pretrained(base, folder / "adapter").eval()(TOKENS).logits)
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(logits[1], logits[0], atol=1e-3, rtol=0)
    first, second = losses[0].chunk(2)
    assert second.mean() < first.mean() - 0.1, "it learns"
    assert (tmp_path / "2" / "model" / "config.json").is_file(), "merged, and read back"
