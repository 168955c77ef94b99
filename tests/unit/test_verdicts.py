"""Outputs that a person judged, kind by kind: `tests/verdicts.jsonl` has lines for `--judge`, with verdicts."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from sandboxes import usable_sandbox

from spd_dist.data.tasks import find_task, runs_code, with_execution
from spd_dist.judging import judge_file

CASES = Path(__file__).parents[1] / "verdicts.jsonl"


@pytest.mark.parametrize("name", ["gsm8k", "svamp", "math", "mmlu", "bbh", "mbpp"])
def test_a_verdict_is_what_a_person_would_say(name, tmp_path):
    cases = [case for case in map(json.loads, CASES.read_text().splitlines()) if case["task"] == name]
    path = tmp_path / "outputs.jsonl"
    path.write_text("".join(f"{json.dumps({key: case[key] for key in ('row', 'output')})}\n" for case in cases))
    task = find_task(name)
    task = with_execution(task, usable_sandbox().run) if runs_code(task) else task
    found = list(judge_file(str(path), task))
    wrong = [
        (case["output"], case["row"], one.extracted)
        for case, one in zip(cases, found, strict=True)
        if one.correct is not case["correct"]
    ]
    assert wrong == []


def test_every_disagreement_with_the_fields_functions_is_decided_and_in_the_table():
    spec = importlib.util.spec_from_file_location("agreement", "docs/agreement.py")
    agreement = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(agreement)
    heads, found = agreement.read_list()
    assert {one["decision"] for one in found} <= {"ours", "theirs"}
    assert all(one["why"] for one in found)
    assert sum(head["outputs"] - head["agree"] for head in heads) == len(found)
    assert agreement.table() in Path("docs/scoring.md").read_text()


SAME = (lambda text: f"\n {text}\n\n", lambda text: f"**{text}**" if "\n" not in text else text)
"""What changes nothing: white space around it, and bold print."""
SECOND = {"gsm8k": "#### 987", "svamp": "#### 987", "mmlu": "Answer: D", "math": r"\boxed{987}"}
"""One more answer, another one."""


@pytest.mark.parametrize("name", SECOND)
def test_a_second_answer_never_helps_and_space_and_bold_print_never_matter(name, tmp_path):
    cases = [case for case in map(json.loads, CASES.read_text().splitlines()) if case["task"] == name]
    stops = ("think", "<|", "</s>", "Question:", "Q:")  # nothing behind these is read
    cases = [case for case in cases if case["correct"] and not any(stop in case["output"] for stop in stops)]
    cases = [case for case in cases if case["row"].get("answer") != 3]  # D is the second answer of mmlu
    outputs = [[*(change(one["output"]) for change in SAME), f"{one['output']}\n{SECOND[name]}"] for one in cases]
    lines = [{"row": one["row"], "output": text} for one, texts in zip(cases, outputs, strict=True) for text in texts]
    path = tmp_path / "outputs.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    verdicts = [one.correct for one in judge_file(str(path), find_task(name))]
    changed = [line["output"] for line, right in zip(lines[::3], verdicts[::3], strict=True) if not right]
    changed += [line["output"] for line, right in zip(lines[1::3], verdicts[1::3], strict=True) if not right]
    helped = [line["output"] for line, right in zip(lines[2::3], verdicts[2::3], strict=True) if right]
    assert (changed, helped) == ([], [])
