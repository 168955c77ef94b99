"""The examples, as they stand: the method at one site, and a task described in YAML."""

import re
from pathlib import Path

import pytest
from launching import SMALL, launch
from tiny import save_tiny_model

from spd_dist.storage.answers import answers_path, read_answers
from spd_dist.storage.artifacts import read_json


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("policy") / "model")


def printed(script: str, model: Path, folder: Path) -> list[str]:
    """What an example prints, in a process that has imported torch already."""
    output = launch(1, [str(model)], folder / "log", launcher=f"examples/{script}.py")
    return [line for line in output.splitlines() if not line.startswith("Loading weights")]


def test_the_method_at_one_site_loses_no_more_than_its_bound(model, tmp_path):
    first, before, after = printed("one_site", model, tmp_path)
    lost, bound = map(float, re.fullmatch(r".* at most (\S+), bound (\S+)", first).groups())
    assert lost <= bound * (1 + 1e-9)
    assert before.removeprefix("as it is") != after.removeprefix("projected")


@pytest.mark.parametrize(("script", "shown"), [
    ("packed_kv", r"layers\.2\.key model\.layers\.2\.self_attn\.vk_proj .*\nlayers\.2\.value model\..*"),
    ("plain_generate", r"(?s).+"),
])  # fmt: skip
def test_an_example_of_an_extension_shows_what_it_does(model, tmp_path, script, shown):
    assert re.fullmatch(shown, "\n".join(printed(script, model, tmp_path)))


def test_a_task_in_yaml_is_asked_trained_on_and_judged(model, tmp_path):
    words = [f"model.name={model}", "data.task=examples/task/capitals.yaml", *SMALL, f"run_dir={tmp_path / 'run'}"]
    launch(2, words, tmp_path / "log")
    report = read_json(tmp_path / "run" / "report.json")
    assert (report["task"], report["metric"]) == ("capitals", "accuracy")
    answers = read_answers(answers_path(tmp_path / "run" / "evaluate", "spd", "capitals"))
    assert [answer.gold for answer in answers][:2] == ["Paris", "Tokyo"]
