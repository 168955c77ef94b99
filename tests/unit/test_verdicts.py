"""Outputs that a person judged, kind by kind: `tests/verdicts.jsonl` has lines for `--judge`, with verdicts."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sandboxes import usable_sandbox

from spd_dist.data.scoring.numbers import plain
from spd_dist.data.scoring.statements import stated_answers
from spd_dist.data.scoring.thoughts import TURNED, until_next_question, without_thoughts
from spd_dist.data.tasks import Score, Task, find_task, runs_code, with_execution
from spd_dist.data.tasks.bbh import WORDS
from spd_dist.judging import judge_file

CASES = Path(__file__).parents[1] / "verdicts.jsonl"


TASKS = {
    task if task.isidentifier() else task.partition("metric: ")[2].partition("\n")[0] or "exact": task
    for task in (json.loads(line)["task"] for line in CASES.read_text().splitlines())
}
"""Name, or the metric of a described task -> what the cases call it: of a described task, the text of its file."""
IN_SANDBOX = ("mbpp", "mbpp_plus", "humaneval", "humaneval_plus", "tests")


@pytest.mark.parametrize(
    ("name", "every"),
    [
        *((name, 1) for name in TASKS if name not in (*IN_SANDBOX, "math")),
        pytest.param("math", 1, marks=pytest.mark.seconds),
        *(pytest.param(name, 4, marks=pytest.mark.seconds) for name in IN_SANDBOX),
        *(pytest.param(name, 1, marks=pytest.mark.slow) for name in IN_SANDBOX),
    ],
)
def test_a_verdict_is_what_a_person_would_say(name, every, tmp_path):
    """Of programs every fourth, and all of them among the slow tests."""
    cases = [case for case in map(json.loads, CASES.read_text().splitlines()) if case["task"] == TASKS[name]][::every]
    path, file = tmp_path / "outputs.jsonl", tmp_path / "task.yaml"
    path.write_text("".join(f"{json.dumps({key: case[key] for key in ('row', 'output')})}\n" for case in cases))
    file.write_text(TASKS[name])
    task = find_task(name if name == TASKS[name] else str(file))
    task = with_execution(task, usable_sandbox().run) if runs_code(task) else task
    found = list(judge_file(str(path), task))
    wrong = [
        (case["output"], case["row"], one.extracted)
        for case, one in zip(cases, found, strict=True)
        if one.correct is not case["correct"]
    ]
    assert wrong == []


DEGENERATE = (
    "1,000", "\n", "\t ", "* ", "(", "'", "#", "**", "```\n", "The answer is A. ", "Answer: A\n", "not 5 ", "1\n",
    "5% ", "<b>", "~~5~~ ", "Step 1 ", "so the ",
)  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.seconds
@pytest.mark.parametrize("name", ["gsm8k", "mmlu", "bbh"])
def test_no_output_of_a_model_that_cannot_stop_takes_for_ever(name, tmp_path):
    """Patterns that try again from each place of it took minutes, and a line of 40 marks hours."""
    row = next(case["row"] for case in map(json.loads, CASES.read_text().splitlines()) if case["task"] == name)
    outputs = [
        before + unit * (6_000 // len(unit)) + "x" for unit in DEGENERATE for before in ("", "\n", "The answer is ")
    ]
    path = tmp_path / "outputs.jsonl"
    path.write_text("".join(f"{json.dumps({'row': row, 'output': output})}\n" for output in outputs))
    assert len(list(judge_file(str(path), find_task(name)))) == len(outputs)


def test_every_disagreement_with_the_fields_functions_is_decided_and_in_the_table():
    spec = importlib.util.spec_from_file_location("agreement", "docs/agreement.py")
    agreement = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(agreement)
    heads, found = agreement.read_list()
    assert {one["decision"] for one in found} <= {"ours", "theirs"}
    assert all(one["why"] for one in found)
    assert sum(head["outputs"] - head["agree"] for head in heads) == len(found)
    assert agreement.table() in Path("docs/scoring.md").read_text()


LIGHT = ("gsm8k", "svamp", "mmlu", "bbh")
"""Tasks whose verdicts take no process."""
STOPS = ("<|im_end|>", "<|endoftext|>", "</s>", "<|eot_id|>", "\n\nQuestion: ", "\n\nQ: ", "\n\nHuman: ")
"""Behind these nothing is read."""
WRAPPED = ("{}", "**{}**", "*{}*", "`{}`", "__{}__")
SPACES = st.text(" \n\t\u00a0\u200b", max_size=4)


def judged(*names: str) -> list[tuple[dict, Task, dict, Score]]:
    """The cases of these tasks that are read to their end, each with its task, its row and its score."""
    found = []
    for number, case in enumerate(map(json.loads, CASES.read_text().splitlines())):
        if case["task"] in names:
            task = find_task(case["task"])
            row = task.normalise({"id": str(number), **case["row"]}, "test")
            spoken = without_thoughts(case["output"])
            if (
                row
                and spoken.text == case["output"]
                and f".\n{spoken.text}" == until_next_question(f".\n{spoken.text}")
            ):
                found.append((case, task, row, task.score(row, case["output"])))
    return found


def an_answer(task: str, row: dict, *, is_right: bool) -> str:
    """The right answer, or another one, as the task asks for it."""
    gold = row.get("target", row["answer"] if task != "bbh" else "")
    if task in ("gsm8k", "svamp"):
        return f"#### {gold if is_right else 987}"
    if task == "math":
        return rf"\boxed{{{gold if is_right else 987}}}"
    if task == "mmlu":
        return f"Answer: {gold if is_right else 'D' if gold != 'D' else 'A'}"
    opposite = {"yes": "no", "no": "yes", "true": "false", "false": "true", "valid": "invalid", "invalid": "valid"}
    other = opposite.get(gold.casefold(), "(Z)" if gold.startswith("(") else "987")
    return f"So the answer is {gold if is_right else other}."


def is_committed(case: dict, task: Task, row: dict, score: Score) -> bool:
    """Whether the output says that this is its answer, in whatever form."""
    gold = row.get("target", "")
    is_read_as_a_choice = gold.startswith("(") or gold.casefold() in WORDS
    has_form = score.strict is not None and (case["task"] != "bbh" or is_read_as_a_choice)
    return has_form or bool(stated_answers(plain(case["output"])))


CASES_OF_LIGHT = judged(*LIGHT)
RIGHT = [one for one in CASES_OF_LIGHT if one[3].correct]
OTHER = [one for one in CASES_OF_LIGHT if one[3].reason == "other value" and is_committed(*one)]
"""Outputs that say another answer than the right one: what merely stands last in a working is none."""


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(RIGHT),
    SPACES,
    SPACES,
    st.sampled_from(WRAPPED),
    st.sampled_from(("", *STOPS)),
    st.text(max_size=30),
)
def test_space_markdown_and_what_follows_a_stop_change_no_verdict(one, before, after, wrap, stop, tail):
    case, task, row, _ = one
    is_bare = "\n" not in case["output"] and not set(case["output"]) & set("*_`>|")
    output = before + (wrap if is_bare else "{}").format(case["output"]) + after
    assert task.score(row, output + stop + tail * bool(stop)).correct


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(RIGHT), st.sampled_from(("\n", "\n\n", " ")), st.booleans())
def test_a_second_other_answer_never_stays_right(one, between, is_first):
    case, task, row, _ = one
    more = an_answer(case["task"], row, is_right=False)
    both = (more, case["output"]) if is_first and between != " " else (case["output"], more)
    assert TURNED.search(between.join(both)) or not task.score(row, between.join(both)).correct


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(OTHER), st.sampled_from(("\n", "\n\n")), st.booleans())
def test_the_right_answer_beside_another_one_never_makes_it_right(one, between, is_first):
    case, task, row, _ = one
    more = an_answer(case["task"], row, is_right=True)
    both = (more, case["output"]) if is_first else (case["output"], more)
    assert TURNED.search(between.join(both)) or not task.score(row, between.join(both)).correct


@pytest.mark.seconds
def test_of_expressions_too_a_second_answer_never_helps_and_space_and_bold_print_never_matter():
    for case, task, row, score in judged("math")[::4]:  # each takes three comparisons of Math-Verify
        if score.correct:
            bold = case["output"] if "\n" in case["output"] else f"**{case['output']}**"
            assert task.score(row, f"\n {bold}\n\n").correct
            assert not task.score(row, f"{case['output']}\n{an_answer('math', row, is_right=False)}").correct
