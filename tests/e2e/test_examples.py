"""The examples, as they stand: the method at one site, and a task described in YAML."""

import re
from pathlib import Path

import pytest
from launching import BRIEF, launch
from tiny import save_tiny_model

from spd_dist.storage.answers import answers_path, read_answers
from spd_dist.storage.artifacts import read_json


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("policy") / "model")


def printed(script: str, model: Path, folder: Path) -> str:
    """What an example prints, and what libraries say, in a process that has imported torch already."""
    return launch(1, [str(model)], folder / "log", launcher=f"examples/{script}.py")


def test_the_method_at_one_site_loses_no_more_than_its_bound(model, tmp_path):
    output = printed("one_site", model, tmp_path)
    lost, bound = map(float, re.search(r"^\d+ rows in .* at most (\S+), bound (\S+)$", output, re.MULTILINE).groups())
    assert lost <= bound * (1 + 1e-9)
    said = [re.search(rf"^{start}: (.+)$", output, re.MULTILINE)[1] for start in ("as it is", "projected")]
    assert said[0] != said[1]


@pytest.mark.parametrize(("script", "shown"), [
    ("packed_kv", r"^layers\.2\.key model\.layers\.2\.self_attn\.vk_proj .*\nlayers\.2\.value model\..*$"),
    ("plain_generate", r"^answer: .+$"),
])  # fmt: skip
def test_an_example_of_an_extension_shows_what_it_does(model, tmp_path, script, shown):
    assert re.search(shown, printed(script, model, tmp_path), re.MULTILINE)


def test_a_task_in_yaml_is_asked_trained_on_and_judged(model, tmp_path):
    words = [f"model.name={model}", "data.task=examples/task/capitals.yaml", *BRIEF, "evaluate.arms=[base,spd]"]
    words += [f"run_dir={tmp_path / 'run'}"]
    launch(2, words, tmp_path / "log")
    report = read_json(tmp_path / "run" / "report.json")
    assert (report["task"], report["metric"]) == ("capitals", "accuracy")
    answers = read_answers(answers_path(tmp_path / "run" / "evaluate", "spd", "capitals"))
    assert [answer.gold for answer in answers][:2] == ["Paris", "Tokyo"]
