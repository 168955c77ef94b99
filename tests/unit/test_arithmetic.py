"""The built-in problems: right, many, and in one split each."""

import re
from collections import Counter

import pytest

from spd_dist.data.arithmetic import SPLIT_SIZES, TEMPLATES, generate_rows

SPLITS = tuple(SPLIT_SIZES)
ROWS = {split: generate_rows(split, 42) for split in SPLITS}


def numbers(text):
    return [int(number) for number in re.findall(r"\d+", text)]


def test_there_are_thousands_of_problems_each_in_one_split():
    ids = [row["id"] for rows in ROWS.values() for row in rows]
    questions = [row["question"] for rows in ROWS.values() for row in rows]
    assert len(ids) == len(set(ids)) == len(set(questions)) == sum(SPLIT_SIZES.values()) >= 2000
    assert {split: len(rows) for split, rows in ROWS.items()} == SPLIT_SIZES
    assert SPLIT_SIZES["test"] >= 500


def test_the_same_story_with_the_same_numbers_is_never_in_two_splits():
    stories = [re.sub(r"[A-Z][a-z]+|[a-z]+s\b", "_", row["question"]) for rows in ROWS.values() for row in rows]
    assert len(stories) == len(set(stories))


@pytest.mark.parametrize("split", SPLITS)
def test_the_solution_computes_the_answer_from_the_numbers_of_the_question(split):
    for row in ROWS[split]:
        equation, result = row["solution"].split(" = ")
        assert eval(equation) == int(row["answer"]) == int(result)
        assert sorted(numbers(row["question"])) == sorted(numbers(equation))
        assert int(row["answer"]) > 0


def test_every_operation_and_template_has_its_share():
    kinds = Counter(row["id"].split("/")[1] for rows in ROWS.values() for row in rows)
    assert len(kinds) == sum(map(len, TEMPLATES.values()))
    assert len(set(kinds.values())) == 1
    assert len({row["id"].split("/")[1].split("-")[0] for row in ROWS["test"][:50]}) == 4


def test_the_seed_decides_the_splits():
    assert generate_rows("test", 42) == ROWS["test"]
    other = generate_rows("test", 43)
    assert [row["id"] for row in other] != [row["id"] for row in ROWS["test"]]
    known = {row["id"]: row for rows in ROWS.values() for row in rows}
    assert all(row == known[row["id"]] for row in other if row["id"] in known)


def test_questions_are_whole_sentences():
    for row in ROWS["train"]:
        assert re.match(r"[A-Z0-9]", row["question"])
        assert row["question"].endswith("?")
        assert "{" not in row["question"]
