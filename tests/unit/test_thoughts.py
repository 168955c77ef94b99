"""What a model thinks is no answer: marks that are special tokens, that the prompt opens, or that the user names."""

from __future__ import annotations

import json

import pytest
from tiny import tiny_tokenizer

from spd_dist.config import Data
from spd_dist.data.prompts import judged_text
from spd_dist.data.scoring.thoughts import with_known_marks, without_thoughts
from spd_dist.data.tasks import find_task
from spd_dist.errors import ConfigError
from spd_dist.judging import judge_file
from spd_dist.overrides import load_config

ROW = {"id": "1", "question": "?", "solution": "", "answer": "5"}


@pytest.fixture(scope="module")
def tokenizer():
    found = tiny_tokenizer()
    found.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "[THINK]", "[/THINK]", "<muse>", "</muse>"]}
    )
    return found


@pytest.mark.parametrize(
    ("prompt", "output", "marks", "right", "reason"),
    [
        ("?", "[THINK]#### 5[/THINK]#### 6", (), False, "other value"),
        ("?", "[THINK]#### 6[/THINK]#### 5<|im_end|>", (), True, "right"),
        ("?", "[THINK]#### 5", (), False, "unfinished"),
        ("?<think>\n", "it is #### 5", (), False, "unfinished"),
        ("?<think>\n", "is it #### 6?\n</think>\n#### 5", (), True, "right"),
        ("?<think>\n\n</think>\n", "#### 5", (), True, "right"),
        ("?", "maybe #### 6, no.</think> #### 5", (), True, "right"),
        ("?", "#### 5 </think> I can't tell", (), False, "no answer"),
        ("?", "<muse>#### 6</muse>#### 5", ("<muse>", "</muse>"), True, "right"),
        ("?", "<muse>#### 5", ("<muse>", "</muse>"), False, "unfinished"),
        ("?<muse>", "#### 5", ("<muse>", "</muse>"), False, "unfinished"),
    ],
)
def test_only_what_is_said_after_the_thought_is_judged(tokenizer, prompt, output, marks, right, reason):
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, output)]
    score = find_task("gsm8k").score(ROW, judged_text(tokenizer, *tokens, marks))
    assert (score.correct, score.reason) == (right, reason)


def test_marks_of_ones_own_are_known_to_judge_too(tmp_path):
    path, data = tmp_path / "outputs.jsonl", Data(thinking_marks=("<muse>", "</muse>"))
    row = {"question": "?", "answer": "#### 5"}
    path.write_text(json.dumps({"row": row, "output": "<muse>#### 6</muse>#### 5"}))
    assert [one.correct for one in judge_file(str(path), find_task("gsm8k"), data)] == [True]
    assert without_thoughts(with_known_marks("<muse>a", ("<muse>", "</muse>"))).is_unfinished


def test_one_mark_alone_is_refused():
    with pytest.raises(ConfigError, match=r"data\.thinking_marks: \['<a>'\] is not valid; give the two marks"):
        load_config([], ["data.thinking_marks=['<a>']"])
