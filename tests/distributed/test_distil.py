"""A student of the projected policy's distributions has the same losses on any number of ranks, packed or killed."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from finetuning import TINY, completions, train
from projections import four_sites
from ranks import run_on_ranks
from tiny import save_tiny_model, tiny_model
from torch.nn.functional import kl_div

from spd_dist.config import Finetune
from spd_dist.distributed.zero import is_sharded, weights_fingerprint
from spd_dist.errors import ConfigError, DataError, StopRequested
from spd_dist.projection.hooks import projected
from spd_dist.projection.operators import MARK
from spd_dist.seeding import generator
from spd_dist.stages.finetune.batching import global_batches
from spd_dist.stages.finetune.training import learning_rate_fraction

TOKENS = torch.arange(3, 40)[None]
EPOCHS = 3


def distil(model: Path, folder: Path, zero_stage: int = 3, **changes: Any) -> torch.Tensor:
    """Train on these ranks, see that the policy is left as it was, and give the losses of the steps."""
    settings = {"num_epochs": EPOCHS, "loss": "distil", "projection": four_sites(), **changes}
    trained = train(model, folder, distributed={"zero_stage": zero_stage}, **settings)
    policy = trained.policy
    assert weights_fingerprint(policy.model) == policy.fingerprint
    assert is_sharded(policy.model) == (zero_stage == 3)
    with torch.no_grad():
        torch.testing.assert_close(policy.model(TOKENS).logits, tiny_model()(TOKENS).logits)
    assert not any(hasattr(module, MARK) for module in policy.model.modules()), "the teacher's hooks are gone"
    policy.release()
    return trained.losses


def keep(model: Path, folder: Path, kinds: Mapping[str, Mapping[str, Any]]) -> None:
    """Train in several ways; rank 0 writes the losses down."""
    for name, changes in kinds.items():
        found = distil(model, folder / name, **changes)
        if dist.get_rank() == 0:
            torch.save(found, folder / f"{name}.pt")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory) -> torch.Tensor:
    """What one rank without ZeRO makes of it, all sequences of a step at once."""
    return reference(model, tmp_path_factory.mktemp("reference"))


def reference(model: Path, folder: Path, **changes: Any) -> torch.Tensor:
    folder.mkdir(exist_ok=True)
    kinds = {"run": {"zero_stage": 0, "micro_batch_size": 8, **changes}}
    run_on_ranks(1, folder / "store", keep, model, folder, kinds)
    return torch.load(folder / "run.pt")


def test_the_loss_is_the_divergence_from_the_projected_policy_and_it_falls(expected):
    sequences = [torch.tensor(one.prompt_tokens + one.tokens) for one in completions()]
    batch = global_batches([len(one) for one in sequences], TINY, generator(3, "finetune", "order", 0))[0]
    model, total = tiny_model(), 0.0
    with torch.no_grad():
        for index in batch:
            tokens = sequences[index][None]
            own = model(tokens).logits[0, :-1].double().log_softmax(-1)
            with projected(model, four_sites()):
                taught = model(tokens).logits[0, :-1].double().log_softmax(-1)
            total += kl_div(own, taught, reduction="sum", log_target=True).item()
    count = sum(len(sequences[index]) - 1 for index in batch)
    assert expected[0].item() == pytest.approx(total / count, rel=1e-4), "the adapter begins at zero"
    assert expected[-1] < 0.8 * expected[0]


def stop_and_go_on(model: Path, folder: Path) -> None:
    """Train whole, and once more with a stop after the fourth step; another teacher does not go on from there."""
    calls = [0]

    def should_stop() -> bool:
        calls[0] += 1
        return calls[0] > 4

    whole = distil(model, folder / "whole", micro_batch_size=2, checkpointing=True)
    job = {"should_stop": should_stop}
    with pytest.raises(StopRequested, match="stopped on request after step 4 of 9"):
        distil(model, folder / "parts", micro_batch_size=2, checkpointing=True, job=job)
    rest = distil(model, folder / "parts", micro_batch_size=2, checkpointing=True)
    assert torch.equal(rest, whole[4:])
    if dist.get_rank() == 0:
        torch.save(whole, folder / "whole.pt")
    keep(model, folder, {"packed": {"zero_stage": 2, "packing": True}, "js": {"divergence": "js"}})
    distil(model, folder / "validated", validation_fraction=0.1, num_epochs=1)


def test_two_ranks_have_the_losses_of_one_and_a_kill_changes_no_bit(model, expected, tmp_path):
    run_on_ranks(2, tmp_path / "store", stop_and_go_on, model, tmp_path)
    for name in ("whole", "packed"):
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.pt"), expected, atol=2e-6, rtol=0)
    other = reference(model, tmp_path / "reference", divergence="js")
    torch.testing.assert_close(torch.load(tmp_path / "js.pt"), other, atol=2e-6, rtol=0)
    assert 0 < other[-1] < other[0] < expected[0]


@pytest.mark.slow
def test_four_ranks_packed_and_checkpointed_have_the_losses_of_one(model, expected, tmp_path):
    kinds = {"run": {"micro_batch_size": 1, "packing": True, "checkpointing": True}}
    run_on_ranks(4, tmp_path / "store", keep, model, tmp_path, kinds)
    torch.testing.assert_close(torch.load(tmp_path / "run.pt"), expected, atol=2e-6, rtol=0)


def refuse(model: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"finetune\.loss: distil is not valid where no projection was given"):
        train(model, folder, loss="distil")
    with pytest.raises(ConfigError, match=r"cross_entropy is not valid where a projection was given"):
        train(model, folder, projection=four_sites())
    twice = {"deepspeed": {"zero_optimization": {"zero_hpz_partition_size": 2}}}
    with pytest.raises(ConfigError, match=r"zero_hpz_partition_size: 2 is not valid with finetune\.loss=distil and"):
        train(model, folder, distributed=twice, projection=four_sites(), loss="distil", mode="full")
    with pytest.raises(ConfigError, match=r"finetune\.mode: full is not valid from the adapter"):
        train(model, folder, start=folder, mode="full")
    with pytest.raises(DataError, match=r"holds no adapter_config\.json"):
        train(model, folder, start=folder)


def test_a_teacher_that_cannot_be_made_is_refused(model, tmp_path):
    assert Finetune().loss == "cross_entropy"
    run_on_ranks(1, tmp_path / "store", refuse, model, tmp_path / "run")


FULL = {"loss": "distil", "mode": "full", "projection": four_sites(), "num_epochs": EPOCHS, "learning_rate": 1e-3}


def by_hand() -> torch.Tensor:
    """Losses of the steps of a second model, which learns from a first one that stays as it was."""
    sequences = [torch.tensor(one.prompt_tokens + one.tokens)[None] for one in completions()]
    first, student = tiny_model(), tiny_model()
    parameters, settings = list(student.parameters()), dataclasses.replace(TINY, num_epochs=EPOCHS)
    groups = [
        {"params": [one for one in parameters if (one.dim() > 1) == is_matrix], "weight_decay": decay}
        for is_matrix, decay in ((True, settings.weight_decay), (False, 0.0))
    ]
    optimizer, losses = torch.optim.AdamW(groups, lr=1.0), []
    order = [
        batch
        for epoch in range(EPOCHS)
        for batch in global_batches(
            [one.shape[1] for one in sequences], settings, generator(3, "finetune", "order", epoch)
        )
    ]
    warm_up = int(settings.warmup_epochs * len(order) / EPOCHS)
    for step, batch in enumerate(order):
        total, count = torch.zeros(()), sum(sequences[index].shape[1] - 1 for index in batch)
        for tokens in (sequences[index] for index in batch):
            with torch.no_grad(), projected(first, four_sites()):
                taught = first(tokens).logits[0, :-1].log_softmax(-1)
            total = total + kl_div(
                student(tokens).logits[0, :-1].log_softmax(-1), taught, reduction="sum", log_target=True
            )
        fraction = learning_rate_fraction(step, num_steps=len(order), num_warmup_steps=warm_up)
        for group in optimizer.param_groups:
            group["lr"] = FULL["learning_rate"] * fraction
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item() / count)
    return torch.tensor(losses, dtype=torch.float64)


def train_all_weights(model: Path, folder: Path) -> None:
    """Sharded, with a stop and whole; in ZeRO's second stage, packed; and with the small parameters in shards, too."""
    calls = [0]

    def should_stop() -> bool:
        calls[0] += 1
        return calls[0] > 4

    changes = {**FULL, "checkpointing": True, "micro_batch_size": 2}
    whole = train(model, folder / "whole", **changes)
    with pytest.raises(StopRequested, match="stopped on request after step 4 of 9"):
        train(model, folder / "parts", job={"should_stop": should_stop}, **changes)
    rest = train(model, folder / "parts", **changes)
    assert torch.equal(rest.losses, whole.losses[4:]), "the teacher is the untouched model, not the checkpoint's"
    assert weights_fingerprint(rest.policy.model) == weights_fingerprint(whole.policy.model)
    second = train(model, folder / "second", distributed={"zero_stage": 2}, **{**FULL, "packing": True})
    small = {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
    shards = train(model, folder / "shards", distributed=small, **FULL)
    half = train(model, folder / "bfloat16", dtype="bfloat16", **FULL)
    found = {"whole": whole.losses, "second": second.losses, "shards": shards.losses, "bfloat16": half.losses}
    if dist.get_rank() == 0:
        torch.save(found, folder / "losses.pt")


def test_a_student_of_all_weights_learns_from_those_that_it_began_with(model, tmp_path):
    run_on_ranks(2, tmp_path / "store", train_all_weights, model, tmp_path)
    expected = by_hand()
    assert expected[-1] < 0.5 * expected[0]
    for name, found in torch.load(tmp_path / "losses.pt").items():
        atol = 2e-3 if name == "bfloat16" else 2e-5
        torch.testing.assert_close(found, expected, atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def keep_losses_of_all_weights(model: Path, folder: Path) -> None:
    found = train(model, folder, **{**FULL, "packing": True}).losses
    if dist.get_rank() == 0:
        torch.save(found, folder / "losses.pt")


@pytest.mark.slow
def test_four_ranks_that_train_all_weights_have_the_losses_of_two_models(model, tmp_path):
    run_on_ranks(4, tmp_path / "store", keep_losses_of_all_weights, model, tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "losses.pt"), by_hand(), atol=2e-5, rtol=0)
