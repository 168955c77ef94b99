import dataclasses
import json

import pytest

from spd_dist.analysis.answer_summary import answers_summary, manner, values_by_id
from spd_dist.analysis.intervals import wilson_interval
from spd_dist.errors import DataError
from spd_dist.storage.answers import answers_path, read_answers
from spd_dist.storage.artifacts import JsonlWriter
from spd_dist.storage.keyed_parts import part_path, parts, read_parts, write_merged
from spd_dist.types import Answer

RIGHT = Answer("a", "#### 4", "4", "4", True, "stop", 10, "4", "4", True, True, False)
LENIENT = dataclasses.replace(RIGHT, id="b", strict=None, strict_correct=False, num_tokens=20)
CUT = Answer("c", "4 5 4 5", "5", "4", False, "length", 30, None, "5", False, False, True)
SILENT = Answer("d", "", None, "4", False, "stop", 0, None, None, False, False, False)
ANSWERS = [RIGHT, LENIENT, CUT, SILENT]


def test_answers_come_back_and_parts_go_when_they_are_merged(tmp_path):
    merged = answers_path(tmp_path, "base", "arithmetic")
    for rank, answer in enumerate((LENIENT, RIGHT)):
        with JsonlWriter(part_path(merged, rank, 2)) as part:
            part.write(vars(answer))
    with open(part_path(merged, 0, 2), "a") as part:
        part.write('{"id": "torn')
    assert read_parts(merged, Answer) == {("a", 0): RIGHT, ("b", 0): LENIENT}
    write_merged(merged, [RIGHT, LENIENT])
    assert parts(merged) == []
    assert read_answers(merged) == [RIGHT, LENIENT]
    assert read_parts(merged, Answer) == {("a", 0): RIGHT, ("b", 0): LENIENT}


def test_parts_of_one_task_are_not_those_of_another(tmp_path):
    part = part_path(answers_path(tmp_path, "base", "mmlu"), 0, 1)
    with JsonlWriter(part) as writer:
        writer.write(vars(RIGHT))
    assert read_parts(answers_path(tmp_path, "base", "mmlu_pro"), Answer) == {}


def test_two_answers_of_one_key_that_differ_are_refused_and_the_same_one_twice_is_one(tmp_path):
    merged = answers_path(tmp_path, "base", "arithmetic")
    for rank, answer in enumerate((RIGHT, RIGHT)):
        with JsonlWriter(part_path(merged, rank, 2)) as part:
            part.write(vars(answer))
    assert read_parts(merged, Answer) == {("a", 0): RIGHT}
    with JsonlWriter(part_path(merged, 2, 3)) as part:
        part.write(vars(dataclasses.replace(RIGHT, output="#### 5")))
    with pytest.raises(DataError, match=r"arithmetic.jsonl: two lines of 'a', sample 0, differ.*delete .*base"):
        read_parts(merged, Answer)


def test_a_line_that_is_no_answer_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"id": "a"}\n')
    with pytest.raises(DataError, match=r"x.jsonl, line 1: not an answer \(correct, .* missing or unknown\)"):
        read_answers(tmp_path / "x.jsonl")


def test_an_answer_of_before_a_field_was_added_is_read(tmp_path):
    line = {key: value for key, value in vars(RIGHT).items() if key != "judged_by"}
    (tmp_path / "x.jsonl").write_text(json.dumps(line) + "\n")
    assert read_answers(tmp_path / "x.jsonl") == [RIGHT]


def test_the_summary_shows_what_else_could_explain_a_gain():
    summary = answers_summary(ANSWERS, "accuracy")
    assert summary.value == 0.5
    assert summary.interval == list(wilson_interval(2, 4))
    assert (summary.num_examples, summary.num_correct, summary.num_tokens) == (4, 2, 60)
    assert (summary.strict_accuracy, summary.lenient_accuracy) == (0.25, 0.5)
    assert (summary.strict_extraction_fraction, summary.lenient_extraction_fraction) == (0.25, 0.75)
    assert (summary.ended_fraction, summary.repetition_fraction, summary.mean_tokens) == (0.75, 0.25, 15)


def shares_right(*shares, num_samples=4):
    """Of each example that share of the samples right."""
    return [
        dataclasses.replace(RIGHT, id=f"p{index}", sample=sample, correct=sample < share * num_samples)
        for index, share in enumerate(shares)
        for sample in range(num_samples)
    ]


def test_of_several_samples_the_means_count_and_pass_at_k_is_their_unbiased_estimate():
    answers = shares_right(0.25, 0.5, 1.0, 0.0)
    summary = answers_summary(answers, "accuracy")
    assert values_by_id(answers, "accuracy") == {"p0": 0.25, "p1": 0.5, "p2": 1.0, "p3": 0.0}
    assert (summary.num_examples, summary.num_samples, summary.num_correct) == (4, 4, 7)
    assert summary.value == summary.pass_at_k["1"] == 7 / 16
    assert summary.pass_at_k == pytest.approx({"1": 7 / 16, "2": (0.5 + 5 / 6 + 1) / 4, "4": 3 / 4})
    assert list(answers_summary(shares_right(0.5, 1.0, num_samples=6), "accuracy").pass_at_k) == ["1", "2", "4", "6"]
    assert answers_summary(ANSWERS, "accuracy").pass_at_k == {"1": 0.5}


def test_examples_with_other_numbers_of_samples_have_no_common_denominator():
    with pytest.raises(DataError, match=r"examples with \[3, 4\] answers each have no common denominator"):
        answers_summary(shares_right(0.5, 1.0)[:-1], "accuracy")


def test_parts_hold_every_sample(tmp_path):
    merged = answers_path(tmp_path, "base", "arithmetic")
    with JsonlWriter(part_path(merged, 0, 1)) as part:
        for answer in shares_right(0.5, 1.0):
            part.write(vars(answer))
    assert len(read_parts(merged, Answer)) == 8


def test_how_the_answers_were_drawn_is_put_in_words():
    assert manner(0.0, 1) == "greedy"
    assert manner(0.8, 1) == "1 sample at temperature 0.8"
    assert manner(1.0, 8) == "8 samples at temperature 1"


def test_likelihood_tasks_are_summed_up_by_their_mean():
    answers = [dataclasses.replace(RIGHT, id=str(index), nll=value) for index, value in enumerate((1.0, 2.0, 3.0))]
    summary = answers_summary(answers, "nll")
    assert summary.value == 2.0
    assert summary.interval == pytest.approx([-0.4841, 4.4841], abs=1e-4)
    assert values_by_id(answers, "nll") == {"0": 1.0, "1": 2.0, "2": 3.0}
    assert values_by_id(ANSWERS, "accuracy") == {"a": 1.0, "b": 1.0, "c": 0.0, "d": 0.0}
