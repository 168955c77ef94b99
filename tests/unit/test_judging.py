"""Outputs that are there already, judged by the launcher without a model."""

import json
import os
import subprocess
import sys

import pytest
from sandboxes import usable_sandbox
from tiny import tiny_tokenizer

from spd_dist.config import Data
from spd_dist.data.readers import Located
from spd_dist.data.scoring.programs import called_by, program_in, python_blocks, unfenced
from spd_dist.data.sources import load_rows, normalised_row
from spd_dist.data.tasks import find_task
from spd_dist.data.tasks.code_tasks import MBPP
from spd_dist.errors import DataError
from spd_dist.judging import judge_file, preview_scoring, write_judgements
from spd_dist.overrides import load_config

GSM8K = {"question": "Half of 10?", "answer": "10/2 = <<10/2=5>>5\n#### 5"}
MMLU = {"question": "Which?", "choices": ["red", "blue"], "answer": 1}
BBH = {"input": "Sort: b a", "target": "a b"}
MATH = {"problem": "Half of 1?", "solution": r"It is \boxed{\frac{1}{2}}."}
MBPP_ROW = {"task_id": 1, "text": "Double.", "code": "def f(x): return 2 * x", "test_list": ["assert f(2) == 4"]}
LINES = {
    "gsm8k": [
        (GSM8K, "#### 5", (True, True, "5", "right")),
        (GSM8K, "so it is 5 apples", (True, False, "5", "right")),
        (GSM8K, "#### .5", (False, False, ".5", "other value")),
        (GSM8K, "#### 5</think>", (False, False, None, "no answer")),
        (GSM8K, "<think>#### 5", (False, False, None, "unfinished")),
    ],
    "svamp": [({"question": "?", "answer": "5.0"}, "5", (True, False, "5", "right"))],
    "mmlu": [
        (MMLU, "Answer: b", (True, True, "B", "right")),
        (MMLU | {"answer": "A"}, "A or B", (False, False, None, "no answer")),
    ],
    "bbh": [(BBH, "a\nb", (True, True, "a b", "right"))],
    "math": [(MATH, r"\boxed{.5}", (True, True, ".5", "right"))],
}


def written(tmp_path, lines):
    file = tmp_path / "outputs.jsonl"
    file.write_text("".join(json.dumps({"row": row, "output": output}) + "\n" for row, output, *_ in lines))
    return file


def judged(file, task, *more):
    command = [sys.executable, "launchers/evaluate.py", "--judge", str(file), "--task", task, *more]
    clean = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}  # as a stranger's shell
    return subprocess.run(command, capture_output=True, text=True, check=False, env=clean)


@pytest.mark.parametrize("task", LINES)
def test_every_line_is_judged_in_its_order(tmp_path, task):
    file, out = written(tmp_path, LINES[task]), tmp_path / "out" / "judged.jsonl"
    write_judgements(judge_file(str(file), find_task(task)), out)
    found = [tuple(json.loads(line).values()) for line in out.read_text().splitlines()]
    assert found == [expected for _, _, expected in LINES[task]]


def test_the_launcher_prints_one_line_a_row_and_needs_no_model(tmp_path):
    done = judged(written(tmp_path, LINES["gsm8k"]), "gsm8k")
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [tuple(one.values()) for one in found] == [expected for _, _, expected in LINES["gsm8k"]]
    assert list(found[0]) == ["correct", "strict", "extracted", "reason"]


def test_programs_are_run_only_when_that_was_allowed(tmp_path):
    refused = judged(written(tmp_path, [(MBPP_ROW, "def f(x): return 2 * x")]), "mbpp")
    assert refused.returncode == 2
    assert "set evaluate.allow_code_execution=true" in refused.stderr


def test_programs_are_run_in_the_sandbox_where_that_was_allowed(tmp_path):
    usable_sandbox()
    lines = [
        (MBPP_ROW, "```python\ndef f(x: List[int]): return 2 * x\n```", (True, True, "right")),
        (MBPP_ROW, "<think>doubling</think>\nf = lambda x: math.floor(2 * x)", (True, False, "right")),
        (MBPP_ROW, "def f(x): return x", (False, False, "failed")),
        (MBPP_ROW, "I cannot.", (False, False, "no answer")),
    ]
    done = judged(written(tmp_path, lines), "mbpp", "evaluate.allow_code_execution=true")
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(one["correct"], one["strict"], one["reason"]) for one in found] == [expected for *_, expected in lines]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--judge", "outputs.jsonl"], "--judge takes one --task NAME, and no --tasks"),
        (
            ["--judge", "outputs.jsonl", "--task", "gsm8k", "--out", "x"],
            "--judge starts no model: leave --adapter, --out",
        ),
        (["model", "--tasks", "gsm8k", "--json", "x"], "--task and --json go with --judge"),
        (["--tasks", "gsm8k"], "required: MODEL, --tasks (or --judge FILE --task NAME)"),
        (["--judge", "nowhere.jsonl", "--task", "gsm8k"], "nowhere.jsonl: no such file"),
    ],
)
def test_words_that_do_not_go_together_are_named(words, message):
    command = [sys.executable, "launchers/evaluate.py", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (2, 3)
    assert message in done.stderr


def test_one_process_judges(tmp_path):
    file, environment = written(tmp_path, LINES["gsm8k"]), {**os.environ, "WORLD_SIZE": "2"}
    command = [sys.executable, "launchers/evaluate.py", "--judge", str(file), "--task", "gsm8k"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--judge: it takes one process" in done.stderr


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"row": GSM8K}, ("--judge", "line 1", "output")),
        ({"row": MATH | {"solution": "none"}, "output": "5"}, ("line 1", "'math'", "no answer")),
        ({"row": {"question": "?"}, "output": "5"}, ("line 1", "'answer'", "gsm8k")),
    ],
)
def test_a_line_without_row_or_output_is_named(tmp_path, line, words):
    file = tmp_path / "outputs.jsonl"
    file.write_text(json.dumps(line) + "\n")
    with pytest.raises(DataError) as fault:
        list(judge_file(str(file), find_task("math" if "solution" in line["row"] else "gsm8k")))
    assert all(word in str(fault.value) for word in words), fault.value


TESTS = ["assert f(2) == 4"]
GOOD = "def f(x):\n    return 2 * x\n"


@pytest.mark.parametrize(
    "output",
    [
        f"```python\n{GOOD}```",
        f"{GOOD}```\nThat is it.",
        f"For example\n```\nf(2)\n```\nso\n```python\n{GOOD}```",
        f"```bash\npip install x\n```\n```python\n{GOOD}```",
        f"```python\ndef f(x):\n    return x\n```\nThat is wrong:\n```python\n{GOOD}```",
        "```python\n    def f(x):\n        return 2 * x\n```",
        "1. Do this:\n   ```python\n   def f(x):\n       return 2 * x\n   ```",
        "f = lambda x: 2 * x",
        "```python\nf = lambda x: 2 * x\n```",
        f"Sure.\n{GOOD}\nIt doubles.",
    ],
)
def test_the_program_is_found_wherever_it_stands(output):
    program = program_in(python_blocks(output), called_by(TESTS)) or program_in(unfenced(output), called_by(TESTS))
    namespace: dict = {}
    exec(program, namespace)
    assert namespace["f"](2) == 4


def test_rows_of_humaneval_are_refused():
    row = MBPP_ROW | {"test_list": ["def check(candidate):\n    assert candidate(2) == 4"]}
    with pytest.raises(ValueError, match=r"mbpp row 1: .* check\(candidate\) .* give MBPP's own rows"):
        MBPP.normalise(row, "")


def test_kept_answers_of_a_run_are_judged_again_by_their_ids(tmp_path):
    rows, answers = tmp_path / "rows.jsonl", tmp_path / "gsm8k.jsonl"
    rows.write_text("".join(f"{json.dumps({'question': '?', 'answer': f'#### {n}'})}\n" for n in (4, 5)))
    kept = [{"id": f"rows/{n}", "output": "#### 5", "correct": False, "gold": "?"} for n in (2, 1)]
    answers.write_text("".join(f"{json.dumps(one)}\n" for one in kept))
    data = Data(task="gsm8k", test=str(rows))
    assert [one.correct for one in judge_file(str(answers), find_task("gsm8k"), data)] == [True, False]
    answers.write_text(json.dumps({"id": "rows/9", "output": "#### 5"}))
    with pytest.raises(DataError, match=r"without a row, the id of one of data\.test"):
        list(judge_file(str(answers), find_task("gsm8k"), data))


def shown(task, rows, **changes):
    config = load_config(overrides=[f"{key}={value}" for key, value in changes.items()])
    return [text.plain for text in preview_scoring(rows, task, tiny_tokenizer(), config)]


def test_the_preview_judges_each_rows_own_reference():
    rows = load_rows(find_task("arithmetic"), "test", Data())[:2]
    first, _, last = shown(find_task("arithmetic"), rows)
    assert find_task("arithmetic").prompt(rows[0]) in first
    answer = rows[0]["answer"]
    assert f"\nsupervised: ['{answer}']\n" in first
    assert f"\nextracted: {answer}\ngold: {answer}\ncounted: right, in the form that is asked for\n" in first
    assert last == "2 of 2 references are right by their own task"


def test_the_preview_shows_a_task_that_cannot_be_right(tmp_path):
    path = tmp_path / "task.yaml"
    path.write_text('name: t\nprompt: "{q}"\nanswer: "It is {a}."\nmetric: exact\ngold: "{a}"\n')
    first, last = shown(find_task(str(path)), [{"id": "r", "q": "?", "a": "7"}])
    assert "\nextracted: It is 7.\ngold: 7\ncounted: wrong (other value)\n" in first
    assert last == "0 of 1 references are right by their own task"


def test_the_preview_runs_no_program_without_permission():
    row = normalised_row(MBPP, Located("r", "", {"id": "1", **MBPP_ROW}), "data.test")
    first, _ = shown(MBPP, [row])
    assert "counted: wrong (not run, as evaluate.allow_code_execution=false)" in first
    assert "def f(x): return 2 * x" in first


def test_the_preview_says_that_a_likelihood_is_measured():
    task = find_task("messages")
    turns = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    [only] = shown(task, [{"id": "1", "messages": turns}])
    assert "\nsupervised: ['Hello.']\nreference: Hello.\nmeasured: the likelihood" in only
