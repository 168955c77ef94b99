"""What a newcomer types wrong is one sentence that names the word, the rule and the remedy, and starts nothing."""

from __future__ import annotations

import logging
import sys

import pytest
from tiny import save_tiny_model

from spd_dist.config import Data, Model
from spd_dist.data.sources import load_rows
from spd_dist.data.tasks import find_task
from spd_dist.data.tasks.description import read_description
from spd_dist.errors import ConfigError, DataError
from spd_dist.hub.repository import subspace_file
from spd_dist.launch import (
    export_policy,
    plan_run,
    push_product,
    run_experiment,
    run_method,
    submit,
    sweep,
    wandb_tools,
)
from spd_dist.models.policy import load_tokenizer
from spd_dist.overrides import load_config


@pytest.mark.parametrize("option", ["--preview-masks", "--preview-scoring"])
@pytest.mark.parametrize("number", ["0", "-1", "three"])
def test_a_preview_of_nothing_starts_no_run(monkeypatch, capsys, tmp_path, option, number):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["spd.py", "--config", "package:quickstart", f"{option}={number}"])
    with pytest.raises(SystemExit) as ended:
        run_method.main()
    assert ended.value.code == 2
    assert f"argument {option}: '{number}' is not valid; it must be 1 or more" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("--nodes", "0", "1 or more"),
        ("--gpus-per-node", "0", "1 or more"),
        ("--gpu-memory", "-5", "1 or more"),
        ("--host-memory", "-1", "0 or more"),
    ],
)
def test_a_cluster_of_nothing_is_refused(capsys, option, value, rule):
    assert plan_run.main(["--config", "package:quickstart", f"{option}={value}"]) == 2
    assert f"error: {option}: {value} is not valid; it must be {rule}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (submit.main, ["fused", "--ranks-per-node=0"]),
        (submit.main, ["fused", "--max-requeues=many"]),
        (wandb_tools.sync, ["runs", "--timeout=nan"]),
        (wandb_tools.sync, ["runs", "--settled=-1"]),
        (push_product.main, ["runs/a", "adapter", "o/n", "--attempts=0"]),
        (plan_run.main, ["--test-prompts=-3"]),
        (run_experiment.main, ["--task=-1"]),
        (run_experiment.main, ["--power=inf"]),
        (sweep.main, ["words", "plan.json", "-1"]),
    ],
)
def test_a_number_that_is_none_or_too_small_is_refused(monkeypatch, capsys, tmp_path, main, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert f"'{words[-1].rpartition('=')[2]}' is not valid; it must be " in capsys.readouterr().err


def test_a_base_that_is_no_model_is_refused_before_anything_is_read(monkeypatch, capsys, tmp_path):
    words = ["export.py", str(tmp_path / "run"), "--base", str(tmp_path / "nope"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    assert export_policy.main() == 3
    assert (
        f"error: --base {tmp_path / 'nope'}: no folder of a model, for it has no config.json" in capsys.readouterr().err
    )


def test_a_folder_that_is_not_here_and_not_on_the_hub_is_said_so(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"^runs/nope: no such folder here \(from .*\), and of the hub: "):
        subspace_file("runs/nope")


def test_a_config_that_is_a_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=rf"^--config {tmp_path}: is a folder; name a YAML file in it"):
        load_config([tmp_path])


def test_a_task_that_is_not_there_and_a_key_that_is_spelled_wrong(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.task: nope\.yaml: no such file \(from .*\); correct the path"):
        read_description("nope.yaml")
    file = tmp_path / "task.yaml"
    file.write_text("name: a\nprompt: '{question}'\nextracton: x\n")
    with pytest.raises(ConfigError, match=r"; extracton is none of them, the nearest is extraction"):
        read_description(str(file))


def test_a_model_that_is_a_path_is_not_asked_of_the_hub():
    with pytest.raises(DataError, match=r"^model\.name: /tmp/nope: no such folder or file .* correct the path"):
        load_tokenizer(Model("/tmp/nope"))


def test_a_model_below_the_home_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_tiny_model(tmp_path / "model")
    assert load_tokenizer(Model("~/model")).eos_token_id is not None


@pytest.mark.parametrize("split", ["train", "calibration"])
def test_rows_that_are_not_there_are_named_by_the_key_that_was_set(split):
    with pytest.raises(DataError, match=r"^data\.train: nope\.jsonl: no such file"):
        load_rows(find_task("gsm8k"), split, Data(task="gsm8k", train="nope.jsonl", test="nope.jsonl", leaks="report"))


def test_deepspeed_does_not_say_at_every_command_that_there_is_no_accelerator(caplog):
    import spd_dist.distributed  # noqa: F401

    logger = logging.getLogger("DeepSpeed")
    for message in ("Setting accelerator to CPU. If you have GPU", "something else"):
        record = logger.makeRecord("DeepSpeed", logging.WARNING, "", 0, message, (), None)
        assert bool(logger.filter(record)) == (message == "something else")
