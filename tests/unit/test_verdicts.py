"""Outputs that a person judged, kind by kind: `tests/verdicts.jsonl` has lines for `--judge`, with verdicts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spd_dist.data.tasks import find_task
from spd_dist.judging import judge_file

CASES = Path(__file__).parents[1] / "verdicts.jsonl"


@pytest.mark.parametrize("name", ["gsm8k", "svamp", "mmlu", "bbh"])
def test_a_verdict_is_what_a_person_would_say(name, tmp_path):
    cases = [case for case in map(json.loads, CASES.read_text().splitlines()) if case["task"] == name]
    path = tmp_path / "outputs.jsonl"
    path.write_text("".join(f"{json.dumps({key: case[key] for key in ('row', 'output')})}\n" for case in cases))
    found = list(judge_file(str(path), find_task(name)))
    wrong = [
        (case["output"], case["row"], one.extracted)
        for case, one in zip(cases, found, strict=True)
        if one.correct is not case["correct"]
    ]
    assert wrong == []
