"""Tasks of other domains: what each arm answered to them, and whether one lost."""

from __future__ import annotations

import json

import pytest
from answering_samples import answer

from spd_dist.analysis.side_comparisons import forgetting_notes, other_tasks
from spd_dist.config import Config, Data
from spd_dist.errors import ConfigError
from spd_dist.judging import other_test
from spd_dist.overrides import load_config


def arm(num_right, num=40):
    return [answer(str(number), 0, "1", number < num_right) for number in range(num)]


def test_an_arm_that_lost_is_named_and_one_that_did_not_is_not():
    found = other_tasks({"mmlu": {"base": arm(30), "spd": arm(10), "psr": arm(30)}}, {"mmlu": "accuracy"}, seed=0)
    assert [(one.arm, one.value, one.difference) for one in found] == [
        ("base", 0.75, None), ("spd", 0.25, -0.5), ("psr", 0.75, 0.0),
    ]  # fmt: skip
    (note,) = forgetting_notes(found)
    assert note.startswith("SPD lost on mmlu: -50.0 points (95 % interval -")
    assert forgetting_notes([one for one in found if one.arm != "spd"]) == ["No arm is shown to have lost on mmlu."]
    assert forgetting_notes([]) == []


def test_a_task_comes_with_its_rows_from_where_the_word_says(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"question": "?", "choices": ["a", "b"], "answer": 1, "subject": ""}))
    task, found = other_test(f"mmlu={rows}", Config(data=Data(task="gsm8k", test="elsewhere.jsonl")))
    assert (task.name, [row["answer"] for row in found]) == ("mmlu", ["B"])


def test_a_task_that_is_answered_twice_is_refused():
    with pytest.raises(ConfigError, match=r"evaluate\.also: \['mmlu=a.jsonl', 'mmlu'\] is not valid; 'mmlu' is"):
        load_config([], ["evaluate.also=['mmlu=a.jsonl',mmlu]"])
