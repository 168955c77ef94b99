"""A fine-tuning that was stopped anywhere goes on as if it had not been, at the same or another world size."""

import argparse
import logging
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from finetuning import losses, train
from ranks import run_on_ranks
from tiny import save_tiny_model
from torch.utils._pytree import tree_leaves

from spd_dist.distributed.checkpoint_safety import data_alone
from spd_dist.distributed.collectives import gather_objects
from spd_dist.distributed.universal import convert_to_universal
from spd_dist.errors import DataError, StopRequested
from spd_dist.process.signals import STOP_FILE, StopSignals
from spd_dist.storage.artifacts import read_json, read_jsonl, sha256_of, write_json

FULL = {"mode": "full", "learning_rate": 1e-3}
LORA: dict = {}
BFLOAT16 = {"dtype": "bfloat16"}


def after(num_steps: int, action: Callable[[], bool], rank: int = 0) -> Callable[[], bool]:
    """A `should_stop` that does `action` on one rank once `num_steps` are done, and before that says no."""
    calls = [0]

    def should_stop() -> bool:
        calls[0] += 1
        return calls[0] > num_steps and dist.get_rank() == rank and action()

    return should_stop


def train_and_stop(model: Path, folder: Path, zero_stage: int, num_steps: int | None, changes: dict) -> None:
    job = {} if num_steps is None else {"should_stop": after(num_steps, lambda: True, rank=dist.get_world_size() - 1)}
    work = {"distributed": {"zero_stage": zero_stage}, "job": job, "num_epochs": 3, "checkpoint_every": 2} | changes
    if num_steps is None:
        train(model, folder, **work)
    else:
        with pytest.raises(
            StopRequested, match=r"stopped on request after step \d of 9 of spd; start the same command"
        ):
            train(model, folder, **work)


def curve(folder: Path) -> torch.Tensor:
    rows = [row for row in read_jsonl(folder / "metrics/rank_00000.jsonl") if "finetune/loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 10)), "each step is taken once"
    return losses(rows)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("policy"))


def train_whole_and_in_parts(model: Path, folder: Path, zero_stage: int, changes: dict) -> None:
    train_and_stop(model, folder / "whole", zero_stage, None, changes)
    train_and_stop(model, folder / "same", zero_stage, 4, changes)
    train_and_stop(model, folder / "same", zero_stage, None, changes)
    train_and_stop(model, folder / "changing", zero_stage, 3, changes)
    if changes == BFLOAT16:
        train_and_stop(model, folder / "exact", zero_stage, None, LORA)
        train_and_stop(model, folder / "other-order", zero_stage, None, {**changes, "micro_batch_size": 1})


@pytest.mark.parametrize(("zero_stage", "changes"), [
    (3, LORA),
    pytest.param(3, FULL, marks=pytest.mark.slow),
    pytest.param(1, FULL, marks=pytest.mark.slow),
    pytest.param(2, LORA, marks=pytest.mark.slow),
    pytest.param(0, LORA, marks=pytest.mark.slow),
    pytest.param(3, BFLOAT16, marks=pytest.mark.slow),
])  # fmt: skip
def test_resume_is_bitwise_and_world_size_may_change(model, tmp_path, zero_stage, changes):
    run_on_ranks(2, tmp_path / "store-2", train_whole_and_in_parts, model, tmp_path, zero_stage, changes)
    for world_size, num_steps in [(1, 2), (3, None)]:
        store = tmp_path / f"store-{world_size}"
        run_on_ranks(world_size, store, train_and_stop, model, tmp_path / "changing", zero_stage, num_steps, changes)
    assert torch.equal(curve(tmp_path / "same"), curve(tmp_path / "whole"))
    tolerance = 2e-6
    if changes == BFLOAT16:  # no farther from the run that did not stop than orders of summation and float32 are
        others = [curve(tmp_path / name) - curve(tmp_path / "whole") for name in ("exact", "other-order")]
        tolerance = 2 * max(other.abs().max().item() for other in others)
    torch.testing.assert_close(curve(tmp_path / "changing"), curve(tmp_path / "whole"), atol=tolerance, rtol=0)
    kept = sorted(path.name for path in (tmp_path / "same/checkpoints").iterdir())
    assert kept == ["step_00000008", "step_00000009"], "the newest two, and nothing unfinished"


def stop_and_go_on_in_bfloat16(model: Path, folder: Path) -> None:
    for name, num_steps in (("whole", None), ("same", 4), ("same", None)):
        train_and_stop(model, folder / name, 3, num_steps, BFLOAT16)


def test_in_bfloat16_resume_is_bitwise(model, tmp_path):
    run_on_ranks(2, tmp_path / "store", stop_and_go_on_in_bfloat16, model, tmp_path)
    assert torch.equal(curve(tmp_path / "same"), curve(tmp_path / "whole"))


def resume_past_a_corrupt_checkpoint(model: Path, folder: Path) -> None:
    train_and_stop(model, folder, 3, 4, {"checkpoint_every": 3})
    checkpoints = folder / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_00000003", "step_00000004"]
    if dist.get_rank() == 0:
        shard = next((checkpoints / "step_00000004").glob("*optim_states.pt"))
        shard.write_bytes(shard.read_bytes()[:-7] + b"garbage")
    dist.barrier()
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logging.getLogger("spd_dist.stages.finetune.checkpoints").addHandler(handler)
    resumed = train(model, folder, num_epochs=3, checkpoint_every=1, keep_checkpoints=1, keep_every=3)
    assert [row["step"] for row in resumed.rows] == [4, 5, 6, 7, 8, 9]
    kept = sorted(path.name for path in checkpoints.iterdir())
    assert kept == ["step_00000003", "step_00000006", "step_00000009"], "the newest, and every third for good"
    if dist.get_rank() == 0:
        assert any("step_00000004 is passed over" in line and "optim_states.pt changed" in line for line in heard)
    again = train(model, folder, num_epochs=3, checkpoint_every=3)
    assert again.rows == [], "a finished training is only saved again"
    with pytest.raises(DataError, match=r"made with other settings, weights or completions; delete .*checkpoints"):
        train(model, folder, num_epochs=4)
    with pytest.raises(DataError, match=r"was written with distributed\.zero_stage=3, .* cannot read; set it back"):
        train(model, folder, num_epochs=3, distributed={"zero_stage": 0})


class Runs:
    """Unpickled, it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return Path.touch, (self.target,)


def convert_in_two_attempts(model: Path, folder: Path, zero_stage: int) -> None:
    """The first meets a file where a parameter's folder should be; DeepSpeed's own program converts for comparison."""
    train_and_stop(model, folder, zero_stage, 4, LORA)
    checkpoint, universal = folder / "checkpoints/step_00000004", folder / "universal"
    calls, name = [], "model.model.layers.3.self_attn.v_proj.lora_B.default.weight"  # the last one
    blocked = universal / "zero" / name
    with pytest.MonkeyPatch.context() as patch, data_alone():
        if dist.get_rank() == 0:
            settings = {"keep_temp_folder": False, "strict": True, "inject_missing_state": True}
            folders = {"input_folder": str(checkpoint), "output_folder": str(folder / "expected")}
            ds_to_universal.main(argparse.Namespace(num_extract_workers=1, num_merge_workers=1, **settings, **folders))
            universal.mkdir()
            (universal / "SOURCE").write_text("the same")
            blocked.parent.mkdir()
            blocked.write_text("in the way")
        dist.barrier()
        save = torch.save
        patch.setattr(torch, "save", lambda *args, **kwargs: [calls.append(args[1]), save(*args, **kwargs)])
        with pytest.raises((FileExistsError, RuntimeError), match=r"File exists"):
            convert_to_universal(checkpoint, universal, "the same")
        written = {file: file.stat().st_mtime_ns for file in universal.rglob("zero/*/*.pt")}
        assert min(gather_objects(len(calls))) > 0, "every rank does some of it"
        dist.barrier()
        if dist.get_rank() == 0:
            blocked.unlink()
            stump = universal / "zero/model.lm_head.weight/fp32.pt"  # of what has no optimizer state
            stump.parent.mkdir(exist_ok=True)
            stump.write_bytes(b"cut short by a kill")
        calls.clear()
        convert_to_universal(checkpoint, universal, "the same")
    again = {Path(path).relative_to(universal).as_posix() for part in gather_objects(calls) for path in part}
    left = {path for path in again if not path.startswith(f"zero/{name}/")} - {"zero/model.lm_head.weight/fp32.pt"}
    assert left == {"zero/optimizer_state.pt"}, f"one parameter, what has no optimizer state, and the settings: {left}"
    assert all(file.stat().st_mtime_ns == before for file, before in written.items())
    assert same_tensors(folder / "expected", universal)
    convert_to_universal(checkpoint, universal, "the same")
    assert all(file.stat().st_mtime_ns == before for file, before in written.items()), "it is whole"
    dist.barrier()
    convert_to_universal(checkpoint, universal, "another")
    assert not any(file.stat().st_mtime_ns == before for file, before in written.items()), "it was of something else"


def same_tensors(expected: Path, found: Path) -> bool:
    """Whether all files of one are in the other, with the same values."""
    names = sorted(file.relative_to(expected) for file in expected.rglob("*.pt"))
    assert names == sorted(file.relative_to(found) for file in found.rglob("*.pt"))
    with data_alone():
        both = [(torch.load(expected / name), torch.load(found / name)) for name in names if name.parts[0] == "zero"]
    flat = [[tree_leaves(part) for part in pair] for pair in both]
    return all(
        torch.equal(one, other) for pair in flat for one, other in zip(*pair, strict=True) if torch.is_tensor(one)
    )


@pytest.mark.parametrize("zero_stage", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_a_conversion_is_shared_by_the_ranks_and_goes_on_where_it_stopped(model, tmp_path, zero_stage):
    run_on_ranks(2, tmp_path / "store", convert_in_two_attempts, model, tmp_path / "run", zero_stage)


def resume_from_a_hostile_checkpoint(model: Path, folder: Path, zero_stage: int, kind: str, world_size: int) -> None:
    """Somebody who may write the run folder puts code into a shard, and the right hash of it into the marker."""
    shard = next((folder / "checkpoints").glob(f"step_00000004/*{kind}_states.pt"))
    if dist.get_rank() == 0:
        state = torch.load(shard, weights_only=False)
        torch.save({**state, "more": Runs(folder / "code-ran")}, shard)
        marker = read_json(shard.with_name("COMPLETE.json"))
        write_json(
            shard.with_name("COMPLETE.json"), {**marker, "sha256": {**marker["sha256"], shard.name: sha256_of(shard)}}
        )
    dist.barrier()
    with pytest.raises(
        DataError, match=rf"{shard.name} is not read: .* could run code .*; delete .*step_00000004, and"
    ):
        train(model, folder, num_epochs=3, checkpoint_every=2, distributed={"zero_stage": zero_stage})
    assert gather_objects((folder / "code-ran").exists()) == [False] * world_size


@pytest.mark.parametrize(("zero_stage", "kind", "world_size"), [
    (3, "optim", 2),
    (3, "model", 1),
    pytest.param(2, "optim", 2, marks=pytest.mark.slow),
    pytest.param(0, "model", 2, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_checkpoint_cannot_run_code_at_any_world_size(model, tmp_path, zero_stage, kind, world_size):
    run = tmp_path / "run"
    run_on_ranks(2, tmp_path / "store", train_and_stop, model, run, zero_stage, 4, {})
    store = tmp_path / "store-2"
    run_on_ranks(world_size, store, resume_from_a_hostile_checkpoint, model, run, zero_stage, kind, world_size)


def test_a_corrupt_newest_checkpoint_is_named_and_the_one_before_it_used(model, tmp_path):
    run_on_ranks(2, tmp_path / "store", resume_past_a_corrupt_checkpoint, model, tmp_path / "run")


def fill_the_disk_of_one_rank(model: Path, folder: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def no_more_room() -> bool:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        return False

    work = {"num_epochs": 3, "checkpoint_every": 2, "job": {"should_stop": after(3, no_more_room, rank=1)}}
    with pytest.raises(DataError, match=r"step_00000004.* cannot be written: .*make room .* checkpoints are kept"):
        train(model, folder, **work)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dist.barrier()
    assert read_json(folder / "checkpoints/step_00000002/COMPLETE.json")["step"] == 2
    resumed = train(model, folder, num_epochs=3, checkpoint_every=2)
    assert [row["step"] for row in resumed.rows] == [3, 4, 5, 6, 7, 8, 9]


def test_a_full_disk_stops_all_ranks_and_costs_no_earlier_checkpoint(model, tmp_path):
    run_on_ranks(2, tmp_path / "store", fill_the_disk_of_one_rank, model, tmp_path / "run")


def break_the_weights(model: Path, folder: Path) -> None:
    """A learning rate that blows up: the loss or its gradient is soon not finite."""
    with pytest.raises(DataError, match=r"of step \d is (nan|inf), with the completions sum-\d+/0.*checkpoint is kept"):
        train(model, folder, learning_rate=1e25, checkpoint_every=1, num_epochs=3, mode="full", warmup_epochs=0)
    step = max(int(path.name[5:]) for path in (folder / "checkpoints").iterdir())
    assert step >= 1
    assert (folder / f"checkpoints/step_{step:08d}/COMPLETE.json").exists()


def test_a_loss_that_is_not_finite_stops_all_ranks_and_names_step_and_completions(model, tmp_path):
    run_on_ranks(2, tmp_path / "store", break_the_weights, model, tmp_path / "run")


def lose_a_rank(model: Path, folder: Path) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the test harness ends the other rank at once

    def die() -> bool:
        os.kill(os.getpid(), signal.SIGKILL)
        return True

    try:
        train(model, folder, num_epochs=3, checkpoint_every=2, job={"should_stop": after(5, die, rank=1)})
    except RuntimeError as error:
        (folder / "note.txt").write_text("\n".join(error.__notes__))
        raise


def test_a_killed_rank_is_named_by_the_others_and_the_run_resumes(model, tmp_path):
    with pytest.raises(Exception, match=r"SIGKILL|Connection closed by peer|Connection reset"):
        run_on_ranks(2, tmp_path / "store", lose_a_rank, model, tmp_path / "run")
    lines = (tmp_path / "run/note.txt").read_text().splitlines()
    assert lines[0] == "A rank that failed or lags is the likely cause. Last seen:"
    assert lines[1].startswith("rank 1 on ")
    assert "its process is gone, last at step" in lines[1]
    run_on_ranks(2, tmp_path / "store-2", train_and_stop, model, tmp_path / "run", 3, None, {})
    run_on_ranks(2, tmp_path / "store-3", train_and_stop, model, tmp_path / "whole", 3, None, {})
    rows = read_jsonl(tmp_path / "run/metrics/rank_00000.jsonl")
    last_of_each_step = {row["step"]: row["finetune/loss"] for row in rows if "finetune/loss" in row}
    assert torch.equal(torch.tensor(list(last_of_each_step.values()), dtype=torch.float64), curve(tmp_path / "whole"))


def ask_one_rank_to_stop(model: Path, folder: Path) -> None:
    signals = StopSignals()
    signals.install()
    signals.watch({folder / STOP_FILE: 0})

    def asked() -> bool:
        return signals.reason() is not None

    def signal_itself() -> bool:
        os.kill(os.getpid(), signal.SIGTERM)
        return asked()

    for ask, step in [(after(2, signal_itself, rank=1), 2), (after(3, lambda: put_the_file(folder) and asked()), 5)]:
        with pytest.raises(StopRequested, match=rf"stopped on request after step {step} of 9") as stop:
            train(model, folder, num_epochs=3, job={"should_stop": ask})
        assert stop.value.exit_code == 75
        assert stop.value.is_shared
        assert gather_objects(step) == [step, step]
        signals.received.clear()
    (folder / STOP_FILE).unlink(missing_ok=True)
    assert [row["step"] for row in train(model, folder, num_epochs=3).rows] == [6, 7, 8, 9]


def put_the_file(folder: Path) -> bool:
    (folder / STOP_FILE).touch()
    return True


def test_sigterm_to_one_rank_and_the_preempt_file_stop_all_ranks_at_the_same_step(model, tmp_path):
    run_on_ranks(2, tmp_path / "store", ask_one_rank_to_stop, model, tmp_path / "run")
