"""What only a GPU shows says so where there is none, and its code runs on a CPU as far as it can."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

SCRIPTS = ("tests/gpu.py", "benchmarks/_gpu.py")


def started(script: str, *words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": "tests:."}
    command = [sys.executable, script, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False, env=environment)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.seconds
def test_without_a_gpu_there_is_one_sentence(script, tmp_path):
    ended = started(script, "--json", str(tmp_path / "found.json"))
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert "error: torch sees no GPU here, so nothing was" in ended.stderr
    assert not (tmp_path / "found.json").exists()


@pytest.mark.slow
def test_what_a_gpu_is_to_show_is_tried_on_a_cpu(tmp_path):
    file = tmp_path / "found.json"
    ended = started("tests/gpu.py", "--device", "cpu", "--smoke", "--json", str(file))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    outcomes = [case["outcome"] for case in json.loads(file.read_text())["cases"]]
    assert outcomes == ["left out: no GPU", "passed", "passed", "passed"]


@pytest.mark.slow
def test_what_a_gpu_is_to_measure_is_measured_on_a_cpu(tmp_path):
    file = tmp_path / "found.json"
    words = ("--device", "cpu", "--smoke", "--only", "capture", "finetune", "--json", str(file))
    ended = started("benchmarks/_gpu.py", *words)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(file.read_text())
    assert found["finetune_flops_fraction"] is None, "a CPU is no card that is known"
    assert {row["side"] for row in found["finetune"]["rows"]} == {"ours", "ours packed"}
