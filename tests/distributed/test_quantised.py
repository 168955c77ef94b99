"""Adapters on base weights of 4 bits train alike on one rank and on two; activations in host memory change nothing."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from finetuning import train
from projections import four_sites
from ranks import run_on_ranks
from tiny import save_tiny_model

from spd_dist.distributed.zero import weights_fingerprint
from spd_dist.errors import DataError, StopRequested

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="the extra quantized is not installed"
)


def train_and_keep(model: Path, folder: Path, zero_stage: int, changes: dict) -> None:
    """Train on these ranks; rank 0 writes the losses down."""
    trained = train(model, folder, distributed={"zero_stage": zero_stage}, **changes)
    is_trained = changes.get("mode") == "full"
    assert (weights_fingerprint(trained.policy.model) != trained.policy.fingerprint) == is_trained
    if dist.get_rank() == 0:
        torch.save(trained.losses, folder / "losses.pt")


def losses_of(tmp_path: Path, *runs: tuple[int, int, dict]) -> list[torch.Tensor]:
    model = save_tiny_model(tmp_path / "policy", hidden_size=64, intermediate_size=128, head_dim=16)
    found = []
    for number, (world_size, zero_stage, changes) in enumerate(runs):
        folder = tmp_path / str(number)
        run_on_ranks(world_size, tmp_path / f"store-{number}", train_and_keep, model, folder, zero_stage, changes)
        found.append(torch.load(folder / "losses.pt"))
    return found


@pytest.mark.slow
@needs_bitsandbytes
def test_two_ranks_on_4_bit_weights_make_the_student_of_one(tmp_path):
    one, two = losses_of(
        tmp_path, (1, 0, {"quantization": "nf4"}), (2, 2, {"quantization": "nf4", "checkpointing": True})
    )
    torch.testing.assert_close(two, one, atol=1e-5, rtol=0)
    first, second = one.chunk(2)
    assert second.mean() < first.mean() - 0.1, "it learns"


@pytest.mark.slow
@needs_bitsandbytes
def test_a_student_on_4_bit_weights_learns_from_the_projected_ones(tmp_path):
    changes = {"quantization": "nf4", "loss": "distil", "projection": four_sites()}
    one, two = losses_of(tmp_path, (1, 0, changes), (2, 2, {**changes, "checkpointing": True}))
    torch.testing.assert_close(two, one, atol=1e-5, rtol=0)
    first, second = one.chunk(2)
    assert second.mean() < 0.9 * first.mean(), "it learns"


@pytest.mark.slow
def test_activations_that_wait_in_host_memory_change_no_loss(tmp_path):
    here, there = losses_of(
        tmp_path, (2, 3, {"checkpointing": True}), (2, 3, {"checkpointing": True, "offload_activations": True})
    )
    assert torch.equal(here, there)


EIGHT_BITS = {"optimizer": "adamw_8bit", "mode": "full", "learning_rate": 1e-3, "checkpoint_every": 2}


def train_by_halves(model: Path, folder: Path, zero_stage: int) -> None:
    """Train at once, and again with a stop in the middle; rank 0 writes the losses down."""
    distributed, asked = {"zero_stage": zero_stage}, iter([False] * 3 + [True])
    whole = train(model, folder / "whole", distributed=distributed, **EIGHT_BITS)
    with pytest.raises(StopRequested):
        train(model, folder / "halves", distributed=distributed, job={"should_stop": lambda: next(asked)}, **EIGHT_BITS)
    rest = train(model, folder / "halves", distributed=distributed, **EIGHT_BITS)
    assert len(rest.rows) == len(whole.rows) - 3
    assert torch.equal(rest.losses, whole.losses[3:]), "it goes on bit by bit"
    if dist.get_rank() == 0:
        torch.save(whole.losses, folder / "losses.pt")


def stop(model: Path, folder: Path, zero_stage: int) -> None:
    """Train for three steps."""
    asked = iter([False] * 3 + [True])
    with pytest.raises(StopRequested):
        train(
            model,
            folder,
            distributed={"zero_stage": zero_stage},
            job={"should_stop": lambda: next(asked)},
            **EIGHT_BITS,
        )


def go_on_alone(model: Path, folder: Path, zero_stage: int) -> None:
    """One rank cannot share what was divided between two."""
    message = rf"holds states of 8 bits for 2 ranks under distributed.zero_stage={zero_stage}, which no others"
    with pytest.raises(DataError, match=message):
        train(model, folder, distributed={"zero_stage": zero_stage}, **EIGHT_BITS)


@pytest.mark.slow
@needs_bitsandbytes
@pytest.mark.parametrize("zero_stage", [
    2, pytest.param(0, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)
])  # fmt: skip
def test_states_of_8_bits_learn_nearly_as_those_of_32_and_go_on_after_a_stop(tmp_path, zero_stage):
    model = save_tiny_model(tmp_path / "policy", hidden_size=64, intermediate_size=128, head_dim=16)
    run_on_ranks(2, tmp_path / "store", train_by_halves, model, tmp_path / "run", zero_stage)
    plain = {"mode": "full", "learning_rate": 1e-3}
    run_on_ranks(2, tmp_path / "store-32", train_and_keep, model, tmp_path / "plain", zero_stage, plain)
    found, expected = torch.load(tmp_path / "run" / "losses.pt"), torch.load(tmp_path / "plain" / "losses.pt")
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0)


@pytest.mark.slow
@needs_bitsandbytes
def test_states_of_8_bits_are_refused_at_another_number_of_ranks(tmp_path):
    model = save_tiny_model(tmp_path / "policy", hidden_size=64, intermediate_size=128, head_dim=16)
    run_on_ranks(2, tmp_path / "store", stop, model, tmp_path / "run", 2)
    run_on_ranks(1, tmp_path / "store-1", go_on_alone, model, tmp_path / "run", 2)
