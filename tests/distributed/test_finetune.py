"""Fine-tuning gives the same losses and the same student on any number of ranks, sharded or whole."""

from pathlib import Path

import pytest
import torch
from finetuning import losses, train
from peft import PeftModel
from ranks import run_on_ranks
from tiny import save_tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from spd_dist.config import Distributed
from spd_dist.distributed.world import join_world
from spd_dist.distributed.zero import weights_fingerprint


def train_and_keep(model: Path, folder: Path, zero_stage: int, changes: dict) -> None:
    """Train on these ranks; rank 0 writes the losses down."""
    rows, _, policy = train(model, folder, zero_stage=zero_stage, **changes)
    assert weights_fingerprint(policy.model) == policy.fingerprint, "LoRA leaves the policy as it was"
    if join_world(Distributed()).is_main:
        torch.save(losses(rows), folder / "losses.pt")


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """A model, and what one rank without ZeRO makes of it."""
    folder = tmp_path_factory.mktemp("reference")
    save_tiny_model(folder / "model")
    run_on_ranks(1, folder / "store", train_and_keep, folder / "model", folder / "run", 0, {"micro_batch_size": 8})
    return folder


@pytest.mark.parametrize(("world_size", "zero_stage", "changes"), [
    (1, 3, {"micro_batch_size": 3}),
    (2, 3, {"micro_batch_size": 2}),  # 2 ranks x 2 sequences x 2 accumulated
    (4, 3, {"micro_batch_size": 2, "checkpointing": True}),
    (2, 2, {"micro_batch_size": 4, "packing": True}),
    (2, 3, {"micro_batch_size": 1, "packing": True}),
])  # fmt: skip
def test_losses_and_adapter_are_those_of_one_unsharded_rank(reference, tmp_path, world_size, zero_stage, changes):
    run_on_ranks(
        world_size, tmp_path / "store", train_and_keep, reference / "model", tmp_path / "run", zero_stage, changes
    )
    expected, found = (torch.load(folder / "run/losses.pt") for folder in (reference, tmp_path))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert found[-1] < found[0] - 0.3, "it learns"
    torch.testing.assert_close(plain_logits(tmp_path), plain_logits(reference), atol=1e-4, rtol=0)


def plain_logits(folder: Path) -> torch.Tensor:
    """What a user of plain transformers and peft gets."""
    base = folder / "model" if (folder / "model").exists() else None
    model = AutoModelForCausalLM.from_pretrained(base or adapter_base(folder))
    student = PeftModel.from_pretrained(model, folder / "run/adapter").eval()
    tokens = tiny_tokenizer()("12 + 5 = 17", return_tensors="pt").input_ids
    with torch.no_grad():
        return student(tokens).logits


def adapter_base(folder: Path) -> str:
    from peft import PeftConfig

    return PeftConfig.from_pretrained(folder / "run/adapter").base_model_name_or_path
