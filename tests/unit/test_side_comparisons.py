"""Tasks of other domains: what each arm answered to them, and whether one lost."""

from __future__ import annotations

import dataclasses
import json

import pytest
from answering_samples import answer

from spd_dist.analysis.side_comparisons import AT, decode_controls, forgetting_notes, other_tasks
from spd_dist.config import Config, Data
from spd_dist.errors import ConfigError
from spd_dist.judging import other_test
from spd_dist.overrides import load_config


def arm(num_right, num=40):
    return [answer(str(number), 0, "1", number < num_right) for number in range(num)]


def nine_of(tasks):
    """Base, an arm that lost 6 of 40 (p 0.031 alone), and seven that lost nothing, on each task."""
    return {task: {"base": arm(30), "spd": arm(24), **{f"same{n}": arm(30) for n in range(7)}} for task in tasks}


def test_an_arm_that_lost_is_named_and_one_that_did_not_is_not():
    found = other_tasks({"mmlu": {"base": arm(30), "spd": arm(10), "psr": arm(30)}}, {"mmlu": "accuracy"}, seed=0)
    assert [(one.arm, one.value, one.difference) for one in found] == [
        ("base", 0.75, None), ("spd", 0.25, -0.5), ("psr", 0.75, 0.0),
    ]  # fmt: skip
    (note,) = forgetting_notes(found)
    assert note.startswith("SPD lost on mmlu: -50.0 points (95 % interval -")
    assert forgetting_notes([one for one in found if one.arm != "spd"]) == ["No arm is shown to have lost on mmlu."]
    assert forgetting_notes([]) == []


def test_a_loss_is_claimed_only_if_it_survives_the_correction_for_all_arms_and_tasks():
    (alone,) = forgetting_notes(other_tasks({"mmlu": {"base": arm(30), "spd": arm(24)}}, {"mmlu": "accuracy"}, seed=0))
    assert alone.startswith("SPD lost on mmlu: -15.0 points")
    tasks = ("mmlu", "gsm8k")
    found = other_tasks(nine_of(tasks), dict.fromkeys(tasks, "accuracy"), seed=0)
    p_values = {(one.task, one.arm): (one.p_value, one.p_holm) for one in found}
    assert p_values["mmlu", "base"] == (None, None)
    assert p_values["mmlu", "spd"] == (pytest.approx(2 / 2**6), pytest.approx(16 * 2 / 2**6))
    first, second, none = forgetting_notes(found)
    assert first.startswith("SPD on mmlu: -15.0 points (95 % interval ")
    assert first.endswith(", which does not survive the correction for 16 comparisons.")
    assert second.startswith("SPD on gsm8k: ")
    assert none == "No arm is shown to have lost on mmlu, gsm8k."


def test_what_was_lost_in_nats_is_said_in_thousandths():
    rows = {shift: [dataclasses.replace(row, nll=2 + shift + 0.001 * i) for i, row in enumerate(arm(0))] for shift in
            (0, 0.02)}  # fmt: skip
    rows[0.02][0] = dataclasses.replace(rows[0.02][0], nll=2.03)
    (note,) = forgetting_notes(other_tasks({"code": {"base": rows[0], "spd": rows[0.02]}}, {"code": "nll"}, seed=0))
    assert note.startswith("SPD lost on code: +0.020 nats (95 % interval +0.02")


def test_students_against_the_best_temperature_are_corrected_for_their_number():
    """6 of 40 gained are beyond chance for one student (p 0.031), and not for one of four."""
    base = {"base": arm(10), f"base{AT}0.2": arm(20)}
    (alone,) = decode_controls({**base, "spd": arm(26)}, "accuracy", seed=0)
    assert (alone.p_value, alone.p_holm) == (pytest.approx(2 / 2**6), pytest.approx(2 / 2**6))
    assert alone.sentence.endswith("n 40): a difference beyond chance over examples.")
    others = {f"same{n}": arm(20) for n in range(2)}
    spd, gained, *same = decode_controls({**base, "spd": arm(26), "psr": arm(40), **others}, "accuracy", seed=0)
    assert spd.p_holm == pytest.approx(3 * 2 / 2**6)
    assert spd.sentence.endswith("n 40), which does not survive the correction for 4 comparisons.")
    assert gained.sentence.endswith("a difference beyond chance over examples.")
    assert all(one.sentence.endswith("no difference is shown.") for one in same)


def test_a_task_comes_with_its_rows_from_where_the_word_says(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"question": "?", "choices": ["a", "b"], "answer": 1, "subject": ""}))
    task, found = other_test(f"mmlu={rows}", Config(data=Data(task="gsm8k", test="elsewhere.jsonl")))
    assert (task.name, [row["answer"] for row in found]) == ("mmlu", ["B"])


def test_a_task_that_is_answered_twice_is_refused():
    with pytest.raises(ConfigError, match=r"evaluate\.also: \['mmlu=a.jsonl', 'mmlu'\] is not valid; 'mmlu' is"):
        load_config([], ["evaluate.also=['mmlu=a.jsonl',mmlu]"])
