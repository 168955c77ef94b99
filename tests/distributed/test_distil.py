"""A student of the projected policy's distributions has the same losses on any number of ranks, packed or killed."""

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
    with pytest.raises(ConfigError, match=r"finetune\.loss: distil is not valid with finetune\.mode=full"):
        train(model, folder, projection=four_sites(), loss="distil", mode="full")
    with pytest.raises(ConfigError, match=r"finetune\.mode: full is not valid from the adapter"):
        train(model, folder, start=folder, mode="full")
    with pytest.raises(DataError, match=r"holds no adapter_config\.json"):
        train(model, folder, start=folder)


def test_a_teacher_that_cannot_be_made_is_refused(model, tmp_path):
    assert Finetune().loss == "cross_entropy"
    run_on_ranks(1, tmp_path / "store", refuse, model, tmp_path / "run")
