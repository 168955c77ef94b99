"""Programs that a policy writes are run and judged, by both launchers; one model is evaluated alone, and resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import SMALL, Launch, launch
from memorised import save_memorised
from peft import LoraConfig, get_peft_model
from sandboxes import usable_sandbox
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM

from spd_dist.data.tasks import find_task
from spd_dist.storage.artifacts import read_json, read_jsonl

LAUNCHER = "launchers/evaluate.py"
QUESTIONS = {
    "right": ("Double a number.", "assert double(2) == 4"),
    "wrong": ("Write a function that squares x.", "assert square(3) == 9"),
    "cheat": ("Cube it!", "assert cube(3) == 27"),
}
ROWS = [
    {"id": key, "prompt": prompt, "code": "", "tests": [test], "setup": ""} for key, (prompt, test) in QUESTIONS.items()
]
ANSWERS = {
    "right": "```python\ndef double(x):\n    return 2 * x\n```",
    "wrong": "def square(x): return 6",
    "cheat": "import os; os._exit(0)",
}
CORRECT = {"right": True, "wrong": False, "cheat": False}


@pytest.fixture(scope="module")
def needs_sandbox() -> None:
    """Skip where programs cannot be run."""
    usable_sandbox()


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """It has learned three answers by heart: one right, one wrong, one that cheats."""
    return save_memorised(tmp_path_factory.mktemp("model"), find_task("mbpp"), ROWS, ANSWERS)


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory) -> Path:
    """A LoRA adapter that makes another model of it."""
    folder, base = tmp_path_factory.mktemp("adapter"), AutoModelForCausalLM.from_pretrained(model)
    wrapped = get_peft_model(base, LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_" in name:
                weight.normal_(std=2.0, generator=torch.Generator().manual_seed(1))
    wrapped.save_pretrained(folder)
    return folder


def judged(file: Path) -> dict[str, bool]:
    return {row["id"]: row["correct"] for row in read_jsonl(file)}


@pytest.mark.usefixtures("needs_sandbox")
def test_a_run_judges_the_programs_that_its_arms_write(model, rows, tmp_path):
    run = tmp_path / "run"
    words = [
        *SMALL, f"model.name={model}", f"run_dir={run}", "data.task=mbpp", f"data.train={rows}", f"data.test={rows}",
        "evaluate.arms=[base]", "evaluate.max_new_tokens=60", "evaluate.allow_code_execution=true",
    ]  # fmt: skip
    output = launch(2, words, tmp_path / "log")
    assert "model-written code runs in a sandbox of" in output
    assert judged(run / "evaluate" / "base" / "mbpp.jsonl") == CORRECT
    assert read_json(run / "report.json")["arms"]["base"]["num_correct"] == 1


def words_for(model: Path, rows: Path, out: Path) -> list[str]:
    limits = ["data.num_test=8", "evaluate.max_new_tokens=60", "evaluate.allow_code_execution=true"]
    return [str(model), "--out", str(out), "--tasks", f"mbpp={rows}", "arithmetic", *limits]


@pytest.mark.usefixtures("needs_sandbox")
def test_a_model_alone_is_evaluated_on_several_tasks_whatever_the_ranks_and_kills(model, rows, tmp_path):
    one, killed = tmp_path / "one", tmp_path / "killed"
    output = launch(1, words_for(model, rows, one), tmp_path / "log", launcher=LAUNCHER)
    assert f"{model}: greedy" in output
    assert "mbpp right % 33.3 6.1 to 79.2 3 100 33 100 " in " ".join(output.split())
    assert judged(one / "mbpp" / "evaluate" / "model" / "mbpp.jsonl") == CORRECT
    summary = read_json(one / "summary.json")
    assert summary["tasks"]["mbpp"]["num_correct"] == 1
    assert summary["tasks"]["arithmetic"]["num_examples"] == 8

    parts = "*/evaluate/model/arithmetic.part-*"
    attempt = Launch(2, words_for(model, rows, killed), tmp_path / "first", LAUNCHER)
    attempt.kill_when(lambda: any(part.stat().st_size for part in killed.glob(parts)))
    again = launch(2, words_for(model, rows, killed), tmp_path / "again", launcher=LAUNCHER)
    assert "evaluate: complete, skipped" in again
    assert read_json(killed / "summary.json")["tasks"] == summary["tasks"]


def test_samples_of_a_model_alone_give_pass_at_k(tmp_path):
    model, out = save_tiny_model(tmp_path / "model"), tmp_path / "out"
    words = [str(model), "--tasks", "arithmetic", "--out", str(out), "data.num_test=4", "evaluate.max_new_tokens=8"]
    words += ["evaluate.num_samples=3", "evaluate.temperature=1"]
    output = launch(2, words, tmp_path / "log", launcher=LAUNCHER)
    assert f"{model}: 3 samples at temperature 1" in output
    assert "pass@k, %" in output
    summary = read_json(out / "summary.json")["tasks"]["arithmetic"]
    assert (summary["num_examples"], summary["num_samples"]) == (4, 3)
    assert list(summary["pass_at_k"]) == ["1", "2", "3"]
    lines = read_jsonl(out / "arithmetic/evaluate/model/arithmetic.jsonl")
    assert [line["sample"] for line in lines] == [0, 1, 2] * 4
    assert len({line["output"] for line in lines}) > 6, "they are samples"


@pytest.mark.usefixtures("needs_sandbox")
def test_an_adapter_makes_another_model(model, rows, adapter, tmp_path):
    found = {}
    for placement in ("auto", "layerwise"):
        words = [*words_for(model, rows, tmp_path / placement), "--adapter", str(adapter), "data.num_test=3"]
        words += [f"evaluate.placement={placement}"]
        launch(2, words, tmp_path / "log", launcher=LAUNCHER)
        found[placement] = read_json(tmp_path / placement / "summary.json")
    assert found["auto"] == found["layerwise"]
    assert found["auto"]["adapter"] == str(adapter)
    assert found["auto"]["tasks"]["mbpp"]["num_correct"] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "arithmetic,mbpp"], "evaluate.allow_code_execution: false, but mbpp is scored by running"),
        (["--tasks", "arithmetic,mbpp,"], "evaluate.allow_code_execution: false"),
        (["--tasks", "arithmetic,arithmetic"], "--tasks: 'arithmetic,arithmetic' names no task, or one twice"),
        (["--tasks", "data.num_test=3"], "--tasks: '' names no task"),
        (["--tasks", "arithmetic", "data.num_tests=3"], "data.num_tests: unknown key (value 3)"),
        (["--tasks", "arithmetic", "data.yaml=rows.jsonl"], "data.yaml"),
        (["--tasks", "arithmetik"], "--tasks: 'arithmetik' is not a task; the nearest is arithmetic"),
        (["--tasks", "arithmetic", "--adapter", "nowhere"], "--adapter: nowhere holds no adapter_config.json"),
        (["--tasks", "arithmetic", "--lm-eval"], "--lm-eval: the package lm_eval is not installed; pip install"),
    ],
)
def test_a_fault_ends_with_2_before_anything_is_answered(model, tmp_path, words, message):
    output = launch(
        2, [str(model), "--out", str(tmp_path / "out"), *words], tmp_path / "log", code=2, launcher=LAUNCHER
    )
    assert message in output
    assert list(tmp_path.rglob("arithmetic*.jsonl")) == []


@pytest.fixture
def harness(tmp_path) -> dict[str, str]:
    """An environment in which a package named lm_eval is installed, that only says how it was called."""
    (tmp_path / "lm_eval").mkdir()
    (tmp_path / "lm_eval" / "__init__.py").touch()
    (tmp_path / "lm_eval" / "__main__.py").write_text("import json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    return os.environ | {"PYTHONPATH": f"{tmp_path}:{Path.cwd()}"}


def cross_check(environment: dict[str, str], words: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, LAUNCHER, "some/model", "--lm-eval", "--out", "out", *words]
    return subprocess.run(command, env=environment, check=False, capture_output=True, text=True)


@pytest.mark.parametrize("tasks", [["gsm8k", "math"], ["gsm8k,math"]])
def test_the_harness_is_given_the_same_model_and_tasks(harness, tasks):
    words = ["--adapter", "some/adapter", "--tasks", *tasks, "data.num_test=5", "model.dtype=float32"]
    words += ["data.system=Be brief."]
    outcome = cross_check(harness, words)
    given = json.loads(outcome.stdout)
    named = dict(zip(given[:-2:2], given[1:-2:2], strict=True))
    assert named == {
        "--model": "hf", "--model_args": "pretrained=some/model,dtype=float32,peft=some/adapter",
        "--tasks": "gsm8k,hendrycks_math", "--batch_size": "32", "--output_path": "out/lm_eval", "--seed": "42",
        "--limit": "5", "--gen_kwargs": "max_gen_toks=256", "--system_instruction": "Be brief.",
    }  # fmt: skip
    assert given[-2:] == ["--log_samples", "--apply_chat_template"]


@pytest.mark.parametrize(
    ("environment", "words", "message"),
    [
        ({}, ["--tasks", "gsm8k,svamp"], "--lm-eval: the harness has no task that is our svamp"),
        ({}, ["--tasks", "gsm8k", "trivia.yaml"], "--lm-eval: the harness has no task that is our trivia.yaml"),
        (
            {},
            ["--tasks", "gsm8k=rows.jsonl"],
            "--lm-eval: gsm8k=rows.jsonl: the harness reads its own rows; write gsm8k",
        ),
        ({}, ["--tasks", "gsm8k", "data.test=rows.jsonl"], "--lm-eval: data.test: 'rows.jsonl' does not reach the"),
        ({}, ["--tasks", "gsm8k", "data.template_options={enable_thinking: false}"], "data.template_options: {'enable"),
        ({}, ["--tasks", "mbpp"], "--lm-eval: the harness would run the programs of mbpp outside of a sandbox"),
        ({}, ["--tasks", "gsm8k", "evaluate.temperature=0.5"], "--lm-eval: evaluate.temperature: 0.5 is not for the"),
        ({"WORLD_SIZE": "2"}, ["--tasks", "gsm8k"], "--lm-eval: it takes one process; start this file by python"),
    ],
)
def test_what_the_harness_must_not_be_asked_is_refused(harness, environment, words, message):
    outcome = cross_check(harness | environment, words)
    assert outcome.returncode == 2
    assert message in outcome.stderr
