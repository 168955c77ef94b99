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


def started(*words: str) -> str:
    """What an example prints."""
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    command = [sys.executable, *words]
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def test_the_method_at_one_site_loses_no_more_than_its_bound(model):
    first, before, after = started("examples/one_site.py", str(model)).splitlines()
    lost, bound = map(float, re.fullmatch(r".* at most (\S+), bound (\S+)", first).groups())
    assert lost <= bound * (1 + 1e-9)
    assert before.removeprefix("as it is") != after.removeprefix("projected")


def test_an_example_of_an_extension_shows_what_it_does(model):
    sites = started("examples/packed_kv.py").splitlines()
    assert [line.split()[0] for line in sites] == ["layers.2.key", "layers.2.value"]
    assert started("examples/plain_generate.py", str(model)).strip("\n")


def test_a_task_in_yaml_is_asked_trained_on_and_judged(model, tmp_path):
    words = [f"model.name={model}", "data.task=examples/task/capitals.yaml", *SMALL, f"run_dir={tmp_path / 'run'}"]
    launch(2, words, tmp_path / "log")
    report = read_json(tmp_path / "run" / "report.json")
    assert (report["task"], report["metric"]) == ("capitals", "accuracy")
    answers = read_answers(answers_path(tmp_path / "run" / "evaluate", "spd", "capitals"))
    assert [answer.gold for answer in answers][:2] == ["Paris", "Tokyo"]
