"""The examples, as they stand: the method at one site, and a task described in YAML."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launching import SMALL, launch
from tiny import save_tiny_model

from spd_dist.storage.answers import answers_path, read_answers
from spd_dist.storage.artifacts import read_json


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("policy") / "model")


def test_the_method_at_one_site_loses_no_more_than_its_bound(model):
    done = subprocess.run(
        [sys.executable, "examples/one_site.py", str(model)], env=os.environ | {"DS_ACCELERATOR": "cpu"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    first, before, after = done.stdout.splitlines()
    lost, bound = map(float, re.fullmatch(r".* at most (\S+), bound (\S+)", first).groups())
    assert lost <= bound * (1 + 1e-9)
    assert before.removeprefix("as it is") != after.removeprefix("projected")


def test_a_task_in_yaml_is_asked_trained_on_and_judged(model, tmp_path):
    words = [f"model.name={model}", "data.task=examples/task/capitals.yaml", *SMALL, f"run_dir={tmp_path / 'run'}"]
    launch(2, words, tmp_path / "log")
    report = read_json(tmp_path / "run" / "report.json")
    assert (report["task"], report["metric"]) == ("capitals", "accuracy")
    answers = read_answers(answers_path(tmp_path / "run" / "evaluate", "spd", "capitals"))
    assert [answer.gold for answer in answers][:2] == ["Paris", "Tokyo"]
