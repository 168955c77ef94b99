"""A policy that thinks before it answers, through the whole method on two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import BRIEF, launch
from memorised import save_memorised
from tiny import CHAT_TEMPLATE, save_tiny_model, tiny_tokenizer

from spd_dist.data.tasks import find_task
from spd_dist.storage.artifacts import read_json, read_jsonl

ROWS = [{"id": str(a), "q": f"{a} + 1?", "a": f"<think>one more than {a}</think>{a + 1}"} for a in range(1, 5)]
TASK = """name: sums
fields: {question: q, answer: a}
prompt: "{question}"
answer: "{answer}"
mask: after_thought
extraction: number
metric: numeric
gold: "{sum}"
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("sums")
    (folder / "sums.yaml").write_text(TASK)
    rows = [row | {"sum": row["a"].rpartition(">")[2]} for row in ROWS]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = find_task(str(folder / "sums.yaml"))
    named = [task.normalise(row, "") for row in rows]
    model = save_memorised(folder / "model", task, named, {row["id"]: row["a"] for row in rows})
    return [f"model.name={model}", f"data.task={folder / 'sums.yaml'}", f"data.train={folder / 'rows.jsonl'}",
            f"data.test={folder / 'rows.jsonl'}", "evaluate.arms=[base,psr]", "generate.temperature=0",
            "calibrate.num_examples=4", "generate.max_new_tokens=48", "evaluate.max_new_tokens=48",
            "finetune.loss_on=completion", "finetune.num_epochs=1", "finetune.global_batch_size=2"]  # fmt: skip


def test_a_student_learns_the_answers_without_the_thoughts(words, tmp_path: Path):
    targets = {}
    for how in ("keep", "drop"):
        run = tmp_path / how
        launch(2, [*words, f"data.thinking={how}", f"run_dir={run}"], tmp_path / f"{how}.log")
        targets[how] = read_json(run / "arms/psr/finetune/summary.json")["num_targets"]
        answers = read_jsonl(run / "evaluate/base/sums.jsonl")
        assert [answer["correct"] for answer in answers] == [True] * 4
        assert all("one more than" in answer["output"] for answer in answers)
    completions = read_jsonl(tmp_path / "drop" / "arms/psr/generate/completions/completions.jsonl")
    assert {one["text"] for one in completions} == {row["a"] for row in ROWS}
    assert targets == {"keep": sum(len(one["tokens"]) for one in completions), "drop": 4 * len("2\0")}


def test_a_thought_that_is_cut_is_an_error_where_too_many_are(words, tmp_path: Path):
    short = [*words, "generate.max_new_tokens=12", "generate.max_unfinished_rate=0.5", f"run_dir={tmp_path / 'run'}"]
    output = launch(2, short, tmp_path / "log", code=3)
    assert "the rate of unfinished thoughts is 1.000, above generate.max_unfinished_rate=0.5" in output
    kept = tmp_path / "run" / "arms/psr/generate/completions/completions.jsonl"
    before = kept.stat().st_mtime_ns
    launch(2, [*short, "generate.max_unfinished_rate=1"], tmp_path / "again.log")
    assert kept.stat().st_mtime_ns == before


def test_every_thought_ends_at_its_budget_on_both_ranks(tmp_path: Path):
    model = save_tiny_model(tmp_path / "model", vocab_size=320)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<think>", "</think>"]})
    tokenizer.chat_template = CHAT_TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")
    tokenizer.save_pretrained(model)
    words = [f"model.name={model}", *BRIEF, "evaluate.arms=[base,spd]", "generate.max_thought_tokens=4",
             "evaluate.max_thought_tokens=2"]  # fmt: skip
    launch(2, [*words, f"run_dir={tmp_path / 'run'}"], tmp_path / "log")
    closing = tokenizer.convert_tokens_to_ids("</think>")
    completions = read_jsonl(tmp_path / "run/generate/completions/completions.jsonl")
    assert len(completions) == 10
    assert all(closing in one["tokens"][:5] for one in completions if len(one["tokens"]) > 4)
    answers = [one for arm in ("base", "spd") for one in read_jsonl(tmp_path / f"run/evaluate/{arm}/arithmetic.jsonl")]
    assert {one["reason"] for one in answers if one["num_tokens"] > 2} <= {"no answer", "other value", "right"}
