"""Tasks described in YAML: every metric as docs/adding_a_task.md shows it, and what a file or row may not say."""

import json
import re
from pathlib import Path

import pytest
from sandboxes import usable_sandbox

from spd_dist.config import Data
from spd_dist.data.patterns import compiled
from spd_dist.data.readers import Located
from spd_dist.data.sources import load_rows, normalised_row
from spd_dist.data.tasks import find_task, runs_code, with_execution
from spd_dist.errors import ConfigError, DataError

GUIDE = Path("docs/adding_a_task.md").read_text()
EXAMPLES = re.findall(r"^`(\w+)`:.*?```yaml\n(.*?)^```\n```json\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)


def described(tmp_path, **keys):
    path = tmp_path / "task.yaml"
    path.write_text(json.dumps({"name": "t", "prompt": "{q}", "gold": "{a}"} | keys))
    return find_task(str(path))


def read(task, **row):
    return normalised_row(task, Located("rows.jsonl", "line 7", {"id": "r", **row}), "data.train")


def test_the_guide_shows_every_metric():
    shown = ["exact", "numeric", "math", "choice", "likelihood", "tests", "regex"]
    assert [metric for metric, _, _ in EXAMPLES] == shown


@pytest.mark.parametrize(("metric", "text", "lines"), EXAMPLES, ids=[example[0] for example in EXAMPLES])
def test_the_examples_of_the_guide_are_judged_as_it_says(tmp_path, metric, text, lines):
    (tmp_path / "task.yaml").write_text(text)
    task = find_task(str(tmp_path / "task.yaml"))
    assert runs_code(task) == (metric == "tests")
    task = with_execution(task, usable_sandbox().run) if runs_code(task) else task
    for number, line in enumerate(map(json.loads, lines.splitlines()), 1):
        row = normalised_row(task, Located("guide", f"line {number}", {"id": str(number), **line["row"]}), "--judge")
        assert task.score(row, line["output"]).correct == line["correct"], (metric, line)
        assert task.score(row, task.answer(row)).correct, "the reference is right"
        assert task.target_spans(row)


CHOICES = {"choices": ["red", "green", 3, "blue sky", "e", "f", "g", "h", "i", "j", "k", "l"]}


def test_choices_are_lettered_lines_as_many_as_there_are(tmp_path):
    task = described(tmp_path, prompt="{q}\n{choices}\nNot {choices[1]}, {set} or {}:", metric="choice")
    row = read(task, q="Which?", a="L", set=1, **CHOICES)
    assert task.prompt(row).startswith("Which?\nA. red\nB. green\nC. 3\nD. blue sky\n")
    assert task.prompt(row).endswith("\nL. l\nNot green, 1 or {}:")
    assert task.score(row, "L").correct
    assert not task.score(row, "K").correct


@pytest.mark.parametrize(
    ("gold", "letter"), [("D", "D"), ("Blue sky", "D"), (3, "C"), ("1", "B"), (11, "L"), ("e", "E")]
)
def test_a_gold_is_a_letter_a_text_or_a_number(tmp_path, gold, letter):
    task = described(tmp_path, prompt="{q}", metric="choice")
    assert task.gold(read(task, q="?", a=gold, **CHOICES)) == letter


def test_a_choice_is_an_alternative_to_every_other(tmp_path):
    task = described(tmp_path, answer=" {letter}: {choice}", metric="choice")
    row = read(task, q="?", a=1, choices=["red", "green", "blue"])
    assert task.answer(row) == " B: green"
    assert [task.answer(one) for one in task.alternatives(row)] == [" A: red", " B: green", " C: blue"]
    with pytest.raises(ConfigError, match=r"choices\.scoring: likelihood .* needs the place of the choice in"):
        described(tmp_path, answer=" {a}", metric="choice").alternatives(row)
    assert not hasattr(described(tmp_path), "alternatives")


ROW_FAULTS = [
    ({"metric": "numeric"}, {"a": "9 (apples)"}, r"gold: '9 \(apples\)' is no number; correct the row"),
    ({}, {"a": None}, r"field \{a\}: None is no text"),
    ({}, {"a": True}, r"field \{a\}: True is no text"),
    ({}, {"a": {"b": 1}}, r"field \{a\}: \{'b': 1\} is no text"),
    ({}, {"a": [[1]]}, r"field \{a\}: \[\[1\]\] must be 1 to 26 texts"),
    ({}, {"a": ["x"] * 27}, r".*must be 1 to 26 texts"),
    ({}, {"a": " "}, r"gold: '\{a\}' gives no text"),
    ({}, {}, r"field 'a': missing, the row has id, q"),
    ({"fields": {"a": "b.c"}}, {"b": {"d": 1}}, r"field 'b\.c': missing"),
    ({"gold": "{a[2]}"}, {"a": ["x"]}, r"field \{a\[2\]\}: \['x'\] has nothing at \[2\]"),
    ({"metric": "choice"}, {"a": "M", **CHOICES}, r"gold: 'M' names no choice of"),
    ({"metric": "choice"}, {"a": 12, **CHOICES}, r"gold: '12' names no choice of"),
    ({"metric": "choice"}, {"a": "x", "choices": ["x", "X."]}, r"gold: 'x' names more than one choice"),
    ({"metric": "choice"}, {"a": "A", "choices": "red"}, r"field \{choices\}: 'red' is no list"),
    ({"metric": "regex"}, {"a": "("}, r"gold: '\(' is not a regular expression"),
    ({"metric": "regex"}, {"a": "(a|aa)+$"}, r"gold: '\(a\|aa\)\+\$' takes exponential time"),
    ({"metric": "tests", "code": {"tests": "a"}}, {"a": 3}, r"field a: 3 must be a text or a list of texts"),
    ({"metric": "tests", "code": {"tests": "{a}"}}, {"a": "def check(f): pass"}, r".*set code\.entry_point"),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "row", "message"), ROW_FAULTS, ids=range(len(ROW_FAULTS)))
def test_a_row_that_a_task_cannot_use_is_refused_where_it_stands(tmp_path, keys, row, message):
    with pytest.raises(DataError, match=rf"^rows\.jsonl, line 7[:,] {message}") as caught:
        read(described(tmp_path, **keys), q="?", **row)
    assert "data.train" in str(caught.value)


NAMES = ["../../../evil", "a\0b", "a/b", "..", ".hidden", "-x", "", "a..b", "a b", "n\u00e4me", "a\n"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_no_file_name_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=r"task\.yaml, name: .* must be letters, digits"):
        described(tmp_path, name=name)


def test_names_may_have_dots_and_dashes(tmp_path):
    assert described(tmp_path, name="trivia_qa-v1.5").name == "trivia_qa-v1.5"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"metric": "tests"}, r"code: \{\} must be a mapping of entry_point, tests, setup, tests at least"),
        ({"code": {"test": "x"}}, r"code: \{'test': 'x'\} must be a mapping"),
        ({"sources": {"train": 3}}, r"sources\.train: 3 must be text"),
        ({"metric": "choice", "choices": "choices"}, r"choices: 'choices' must be the place of a list"),
        ({"extraction": "regex:(a|aa)+$"}, r"extraction: '\(a\|aa\)\+\$' takes exponential time, .* in one way"),
    ],
)
def test_a_wrong_key_is_named(tmp_path, keys, message):
    with pytest.raises(ConfigError, match=message):
        described(tmp_path, **keys)


def test_a_deep_file_is_one_sentence(tmp_path):
    (tmp_path / "task.yaml").write_text("[" * 5000)
    with pytest.raises(ConfigError, match=r"task\.yaml cannot be read as YAML: ") as caught:
        find_task(str(tmp_path / "task.yaml"))
    assert "\n" not in str(caught.value)


def test_patterns_that_re_takes_for_ever_end(tmp_path):
    task = described(tmp_path, extraction="regex:(a+)+$")
    assert task.score({"q": "?", "a": "a"}, "a" * 200 + "!").reason == "no answer"
    assert compiled(r"x{e}", "key").last("x x{e}") == "x{e}", "as re reads it, not as fuzzy matching"
    assert compiled(r"<(\w+)>|y", "key").spans("<ab>y") == [(1, 3)]


def test_a_search_without_end_is_a_verdict(tmp_path, monkeypatch):
    monkeypatch.setattr("spd_dist.data.patterns.SECONDS", 0.1)
    task = described(tmp_path, extraction="regex:(qz|qzqz)+$")
    score = task.score({"q": "?", "a": "a"}, "qz" * 60 + "!")
    assert (score.correct, score.reason) == (False, "time")


def test_numbers_of_the_row_are_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"q": 5, "a": 7.0}))
    task = described(tmp_path, prompt="{q}?")
    [row] = load_rows(task, "train", Data(train=str(path)))
    assert (task.prompt(row), task.gold(row)) == ("5?", "7")
