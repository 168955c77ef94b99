"""Faults that a user can put right: one clear error, the documented exit code on every rank, within a minute."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launching import SMALL, launch
from tiny import save_tiny_model, tiny_model, tiny_tokenizer
from tiny_gguf import write_tiny_gguf


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("policy") / "model")


def errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error: ")]


def fail(folder: Path, words: list[str], *, code: int) -> str:
    """Run on two ranks, expect both to exit with `code`, and give the one error."""
    output = launch(2, [*SMALL, f"run_dir={folder / 'run'}", *words], folder / "log", code=code)
    assert len(errors(output)) == 1, output
    assert not (folder / "run" / "report.json").exists()
    return errors(output)[0]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "finetune.num_epoch=1",
            "finetune.num_epoch: unknown key (value 1); the nearest valid key is finetune.num_epochs",
        ),
        (
            "data.task=mbpp",
            "evaluate.allow_code_execution: false, but mbpp is scored by running model-written programs",
        ),
        ("data.task=arithmetics", "data.task: 'arithmetics' is not a task; the nearest is arithmetic"),
        ("project.rank_rule=fixed", "project.rank: None is not valid with project.rank_rule=fixed; set project.rank=N"),
    ],
)
def test_a_wrong_config_ends_with_2(model, tmp_path, word, message):
    assert message in fail(tmp_path, [f"model.name={model}", word], code=2)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.name=nowhere/model", "model.name: nowhere/model is no folder here, not whole in this host's cache"),
        ("data.train=nowhere/rows.jsonl", "nowhere/rows.jsonl"),
        (
            "calibrate.mask=regex:no such text",
            "finds no target span in it; correct the row, choose another calibrate.mask",
        ),
        ("calibrate.max_tokens=40", "tokens behind calibrate.max_tokens=40; raise calibrate.max_tokens to"),
        ("calibrate.layers=[9]", "can't be taken from layer 9"),
        ("data.max_prompt_tokens=20", "prompts are longer than 20 tokens"),
    ],
)
def test_wrong_data_ends_with_3(model, tmp_path, word, message):
    assert message in fail(tmp_path, [f"model.name={model}", word], code=3)


def test_a_cut_gguf_file_ends_with_3_and_leaves_the_cache_as_it_was(tmp_path):
    gguf, cache = write_tiny_gguf(tmp_path / "tiny.gguf"), tmp_path / "cache"
    gguf.write_bytes(gguf.read_bytes()[:-1])
    error = fail(tmp_path, [f"model.name={gguf}", f"model.cache_dir={cache}"], code=3)
    assert f"model.name: {gguf} is cut: it has" in error
    assert not cache.exists()


def test_a_bad_line_is_named_with_its_number_and_field(model, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"id": "one", "question": "1 + 1?", "solution": "2"}) + "\n")
    error = fail(tmp_path, [f"model.name={model}", f"data.train={rows}"], code=3)
    assert f"{rows}, line 1, field 'answer'" in error


def test_a_nan_gradient_fails_all_ranks_and_says_where(tmp_path):
    folder, broken = tmp_path / "broken", tiny_model()
    with torch.no_grad():
        broken.model.layers[3].mlp.up_proj.weight[0, 0] = float("nan")
    broken.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    error = fail(tmp_path, [f"model.name={folder}"], code=3)
    assert "gradient rows hold NaN or Inf" in error
    assert "layers.2.key" in error
    assert "sketch.non_finite=skip" in error


def test_a_damaged_artifact_is_named_and_its_stage_done_again(model, tmp_path):
    words = [*SMALL, f"model.name={model}", f"run_dir={tmp_path / 'run'}"]
    launch(1, [*words, "--until", "project"], tmp_path / "log")
    subspace = tmp_path / "run" / "project" / "subspace.safetensors"
    whole = subspace.read_bytes()
    subspace.write_bytes(whole[:-1] + b"?")
    output = launch(2, [*words, "--until", "project"], tmp_path / "again")
    assert "project: done again, since its output subspace.safetensors was changed" in output
    assert subspace.read_bytes() == whole
