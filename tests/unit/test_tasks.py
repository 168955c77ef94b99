"""What tasks ask, which characters count, and how outputs are judged."""

import json
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from spd_dist.config import Data
from spd_dist.data import tasks
from spd_dist.data.scoring.expressions import same_expression
from spd_dist.data.sources import load_rows
from spd_dist.data.tasks import TASKS, find_task, with_execution
from spd_dist.data.tasks.bbh import SUBTASKS
from spd_dist.errors import ConfigError
from spd_dist.sandbox import Verdict

REAL_ROWS = Path("../shared/data")
ROWS = {
    "arithmetic": {"question": "Tom has 3 apples and buys 5 more. How many?", "solution": "3 + 5 = 8", "answer": "8"},
    "gsm8k": {"question": "Half of 48?", "solution": "It is 48/2 = <<48/2=24>>24.", "answer": "24"},
    "svamp": {"question": "8 cups less 7 cups?", "solution": "( 8.0 - 7.0 )", "answer": "1"},
    "math": {"problem": "Half of 1?", "solution": r"It is $\boxed{\frac{1}{2}}$.", "answer": r"\frac{1}{2}"},
    "mbpp": {
        "prompt": "Double it.",
        "code": "def f(x):\r\n    return 2 * x",
        "tests": ["assert f(1) == 2", "assert f(2) == 4 "],
        "setup": "",
    },
    "mmlu": {"subject": "sums", "question": "1 + 1?", "choices": ["1", "2", "3", "4"], "answer": "B"},
    "bbh": {"task": "navigate", "input": "Are you back?", "target": "Yes"},
    "messages": {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]},
    "codealpaca": {"instruction": "Print 1.", "input": "", "output": "print(1)"},
}  # fmt: skip
ROWS["mbpp_sanitized"] = ROWS["mbpp"]
ROWS["mbpp_plus"] = ROWS["mbpp"] | {"more_tests": "assert f(3) == 6"}
ROWS["humaneval"] = ROWS["humaneval_plus"] = {
    "prompt": "def f(x):\n    # doubles\n",
    "solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(1) == 2",
    "entry_point": "f",
}


def ran(passed):
    """What a sandbox would say."""
    return Verdict(passed, "passed" if passed else "test 1 of 1")


def marked(task, row):
    text = task.prompt(row) + task.answer(row)
    return [text[start:stop] for start, stop in task.target_spans(row)]


HALF = r"\frac{1}{2}"
ASK = "Give the final answer after '#### '."


@pytest.mark.parametrize(
    ("name", "prompt", "answer", "kept"),
    [
        ("arithmetic", f"Tom has 3 apples and buys 5 more. How many?\n{ASK}", "\n3 + 5 = 8\n#### 8", ["8"]),
        ("gsm8k", f"Half of 48?\n{ASK}", "\nIt is 48/2 = 24.\n#### 24", ["24"]),
        ("svamp", f"8 cups less 7 cups?\n{ASK}", "\n8 - 7 = 1\n#### 1", ["1"]),
        ("math", "Half of 1?\nPut the final answer in \\boxed{}.", "\nIt is $\\boxed{\\frac{1}{2}}$.", [HALF]),
        (
            "mmlu",
            "Give the letter of the right answer.\nQuestion: 1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:",
            " B",
            [" B"],
        ),
        (
            "bbh",
            "Give only the answer, without an explanation.\nAre you back?\nAnswer:",
            " Yes",
            [" Yes"],
        ),
        ("codealpaca", "Instruction: Print 1.\nCode:", " print(1)", [" print(1)"]),
        (
            "mbpp",
            "Instruction: Double it.\nYour code should pass these tests:\nassert f(1) == 2\nassert f(2) == 4\nCode:",
            "\ndef f(x):\n    return 2 * x",
            ["assert f(1) == 2", "assert f(2) == 4"],
        ),
    ],
)  # fmt: skip
def test_prompt_answer_and_spans(name, prompt, answer, kept):
    task, row = find_task(name), ROWS[name]
    assert (task.prompt(row), task.answer(row), marked(task, row)) == (prompt, answer, kept)


@pytest.mark.parametrize("name", TASKS)
def test_the_reference_answer_is_correct_and_silence_is_not(name):
    task = with_execution(find_task(name), lambda code, tests, setup: ran("2 * x" in code))
    row = ROWS[name]
    score = task.score(row, task.answer(row))
    assert score.correct
    assert score.lenient_correct
    assert score.extracted is not None
    silent = task.score(row, "")
    assert (silent.correct, silent.extracted, silent.strict, silent.lenient) == (False, None, None, None)
    assert silent.gold == score.gold


def test_strict_and_lenient_extraction_are_both_kept():
    task = find_task("arithmetic")
    in_form = task.score(ROWS["arithmetic"], "So\n#### 8\nI took 3 minutes.")
    assert (in_form.correct, in_form.strict, in_form.lenient) == (True, "8", "3")
    assert (in_form.strict_correct, in_form.lenient_correct) == (True, False)
    loose = task.score(ROWS["arithmetic"], "Tom has $8.00.")
    assert (loose.correct, loose.strict, loose.extracted) == (True, None, "$8.00")
    assert not loose.strict_correct


@pytest.mark.parametrize(
    ("output", "strict", "lenient"),
    [
        ("B", "B", "B"),
        (" B.", "B", "B"),
        ("(B) two", "B", "B"),
        ("**B**", "B", "B"),
        ("B: it is two", "B", "B"),
        ("The answer is B.", "B", "B"),
        ("A man has it. Answer: (B)", "B", "B"),
        ("A man has it", None, None),
        ("Because two", None, None),
        ("E", None, None),
    ],
)
def test_letters_are_read_as_people_write_them(output, strict, lenient):
    score = find_task("mmlu").score(ROWS["mmlu"], output)
    assert (score.strict, score.lenient) == (strict, lenient)


@pytest.mark.parametrize(
    ("target", "output", "correct", "lenient_correct"),
    [
        ("Yes", "yes.", True, True),
        ("Yes", "The answer is Yes", True, True),
        ("Yes", "I turn left, so no. Then yes", False, False),
        ("(A)", "(A) the first", True, True),
        ("(A)", "A", True, True),
        ("(A)", "A dog is it", False, False),
        ("(A)", "It is (B), no, (A)", True, True),
        ("24", "24", True, True),
        ("24", "12 * 2\n= 24", True, True),
        ("] )", "] )", True, True),
        ("] )", "])", True, True),
        ("apple bear cat", "apple, bear, cat", True, True),
        ("apple bear cat", "bear apple cat", False, False),
        ("invalid", "valid", False, False),
    ],
)
def test_big_bench_answers_are_normalised(target, output, correct, lenient_correct):
    score = find_task("bbh").score({"task": "any", "input": "?", "target": target}, output)
    assert (score.correct, score.lenient_correct) == (correct, lenient_correct)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (r"\dfrac{1}{2}", r"\frac{1}{2}"), (r"\frac12", "1/2"), ("5.0", "5"), (r"x=5", "5"), (r"1,000", "1000"),
        (r"\$5", "5"),
        (r"90^\circ", "90"), (r"\left( 1, 2 \right)", "(1,2)"), (r"\text{yes}", "yes"), (r"50\%", "50"),
    ],
)  # fmt: skip
def test_expressions_are_equal_up_to_notation(left, right):
    assert same_expression(left, right)
    assert not same_expression(left, right + "+1")


def test_code_is_run_only_when_it_was_allowed():
    with pytest.raises(
        ConfigError,
        match=r"evaluate\.allow_code_execution: false, but mbpp is scored by running .* set evaluate\.allow",
    ):
        find_task("mbpp").score(ROWS["mbpp"], "def f(x): return 2 * x")


def test_the_program_is_the_fenced_block_or_what_parses():
    given = []

    def execute(code, tests, setup):
        given.append((code, tests, setup))
        return ran(True)

    task = with_execution(find_task("mbpp"), execute)
    fenced = task.score(ROWS["mbpp"], "Sure:\n```python\ndef f(x): return 2 * x\n```\nDone.")
    assert fenced.strict_correct
    raw = task.score(ROWS["mbpp"], "Sure, here it is:\nimport math\ndef f(x):\n    return 2 * x\n\nThis doubles it.")
    assert (raw.strict, raw.strict_correct, raw.lenient_correct) == (None, False, True)
    assert given[0][1:] == (ROWS["mbpp"]["tests"], "")
    assert given[0][0].endswith("from typing import *\ndef f(x): return 2 * x\n")
    assert given[1][0].endswith("import *\nimport math\ndef f(x):\n    return 2 * x\n")
    assert not task.score(ROWS["mbpp"], "I cannot.").correct
    assert len(given) == 2


def test_other_tasks_need_no_execution():
    assert with_execution(find_task("gsm8k"), lambda code, tests, setup: ran(True)) is find_task("gsm8k")


HUB_ROWS = {
    "gsm8k": {"id": "1", "question": "Half of 2,000?", "answer": "It is <<2000/2=1000>>1000.\n#### 1,000"},
    "svamp": {"id": "1", "ID": "chal-1", "Body": "8.", "Question": "Less 7?", "Equation": "( 8 )", "Answer": 1},
    "mbpp": {"id": "1", "task_id": 7, "text": "2x", "code": "", "test_list": ["assert 1"], "test_setup_code": ""},
    "mbpp_sanitized": {"task_id": 7, "prompt": "2x", "code": "", "test_list": ["assert 1"], "test_imports": ["import"]},
    "mmlu": {"id": "1", "question": "1 + 1?", "choices": ["1", "2"], "answer": 1},
    "bbh": {"id": "1", "input": "?", "target": "Yes"},
    "codealpaca": {"id": "1", "instruction": "Print.", "output": "print(1)"},
    "math": {"id": "1", "problem": "?", "solution": r"\boxed{3}"},
}  # fmt: skip


@pytest.mark.parametrize("name", HUB_ROWS)
def test_published_rows_become_rows_of_ours(name):
    task = find_task(name)
    row = task.normalise(HUB_ROWS[name], "a_subset")
    assert all(isinstance(row[field], kind) for field, kind in task.fields.items())
    assert task.target_spans(row)
    assert task.problem(row)


def test_published_answers_are_cut_out_of_their_texts():
    assert find_task("gsm8k").normalise(HUB_ROWS["gsm8k"], "")["answer"] == "1000"
    assert find_task("svamp").normalise(HUB_ROWS["svamp"], "")["id"] == "chal-1"
    assert find_task("mbpp").normalise(HUB_ROWS["mbpp"], "")["id"] == "mbpp/7"
    assert find_task("mbpp_sanitized").normalise(HUB_ROWS["mbpp_sanitized"], "")["setup"] == "import"
    assert find_task("mmlu").normalise(HUB_ROWS["mmlu"], "")["answer"] == "B"
    assert find_task("bbh").normalise(HUB_ROWS["bbh"], "navigate")["task"] == "navigate"
    assert find_task("math").normalise({"solution": "no box"}, "") is None
    assert find_task("codealpaca").normalise({"output": " "}, "") is None


def test_big_bench_has_27_tasks():
    assert len(set(SUBTASKS)) == len(find_task("bbh").sources["test"].split(",")) == 27


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(
        ConfigError, match=r"data\.task: 'gsm8' is not a task; the nearest is gsm8k; known are arithmetic, "
    ):
        find_task("gsm8")


def test_a_plug_in_is_found_by_its_entry_point(monkeypatch):
    point = EntryPoint("mine", "spd_dist.data.tasks.mmlu:MMLU", "spd_dist.tasks")
    monkeypatch.setattr(tasks, "entry_points", lambda group, name=None: [point] if name in (None, "mine") else [])
    assert find_task("mine") is TASKS["mmlu"]


DESCRIPTION = """
name: trivia
fields: {question: q, answer: a}
prompt: "Question: {question}\\nAnswer in \\\\boxed{}:"
answer: " {answer}"
extraction: number
metric: numeric
sources: {train: trivia.jsonl}
"""


def test_a_task_needs_no_code(tmp_path):
    path = tmp_path / "trivia.yaml"
    path.write_text(DESCRIPTION)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"q": "Half of 4?", "a": 2}))
    task = find_task(str(path))
    [row] = load_rows(task, "train", Data(train=str(tmp_path / "rows.jsonl")))
    assert (task.name, task.metric, task.sources) == ("trivia", "accuracy", {"train": "trivia.jsonl"})
    assert task.prompt(row) == "Question: Half of 4?\nAnswer in \\boxed{}:"
    assert marked(task, row) == [" 2"]
    assert task.score(row, "It is 2.0").correct
    assert not task.score(row, "It is 3").correct
    assert task.problem(row) == task.prompt(row)


@pytest.mark.parametrize(
    ("extraction", "gold", "output"),
    [
        ("letter", "B", "The answer is B."),
        ("boxed", "7", r"\boxed{7}"),
        ("text", "Paris", " paris.\nYes"),
        (r"regex:<(\w+)>", "x", "<y> <x>"),
    ],
)
def test_a_described_task_extracts_as_it_says(tmp_path, extraction, gold, output):
    path = tmp_path / "task.yaml"
    path.write_text(
        json.dumps({"name": "t", "prompt": "{q}", "gold": "{a}", "extraction": extraction, "metric": "exact"})
    )
    score = find_task(str(path)).score({"q": "?", "a": gold}, output)
    assert (score.correct, score.gold) == (True, gold)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"promt": "x"}, r"has the keys name, prompt, promt; it needs name and prompt \(or messages\), of name"),
        ({"prompt": 3}, r"prompt: 3 must be text"),
        ({"fields": "q"}, r"fields: 'q' must be a mapping"),
        (
            {"metric": "bleu"},
            r"metric: 'bleu' must be one of exact, numeric, math, choice, likelihood, tests, regex, nll",
        ),
        ({"sources": {"dev": "x"}}, r"sources: \['dev'\] must be train, calibration or test"),
        ({"extraction": "words"}, r"extraction: 'words' must be one of number, letter, boxed, text, whole, or regex"),
        ({"extraction": "regex:("}, r"extraction: '\(' is not a regular expression"),
        ({"mask": "half"}, r"calibrate\.mask: 'half' is not a mask"),
    ],
)
def test_a_wrong_description_names_the_key(tmp_path, change, message):
    path = tmp_path / "task.yml"
    path.write_text(json.dumps({"name": "t", "prompt": "{q}"} | change))
    with pytest.raises(ConfigError, match=message):
        find_task(str(path))


@pytest.mark.parametrize("content", ["[1", "- a list"])
def test_a_file_that_describes_nothing_is_refused(tmp_path, content):
    path = tmp_path / "task.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"data\.task: .*task\.yaml (cannot be read as YAML|has the keys)"):
        find_task(str(path))
    with pytest.raises(ConfigError, match=r"data\.task: .*nowhere\.yaml: no such file"):
        find_task(str(tmp_path / "nowhere.yaml"))


REAL = {
    "gsm8k": ("gsm8k/test", 1319), "svamp": ("svamp/test", 300), "mbpp": ("mbpp/test", 500),
    "mbpp_sanitized": ("mbpp_sanitized/test", 257), "mmlu": ("mmlu/test", 14042), "bbh": ("bbh/test", 6511),
    "codealpaca": ("codealpaca_2k/train", 2015),
}  # fmt: skip


@pytest.mark.data
@pytest.mark.skipif(not REAL_ROWS.is_dir(), reason=f"the benchmark rows are not at {REAL_ROWS}")
@pytest.mark.parametrize("share", ["300 of them", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", REAL)
def test_every_real_row_has_its_span_and_accepts_its_reference(name, share):
    file, count = REAL[name]
    task = with_execution(find_task(name), lambda code, tests, setup: ran(True))
    rows = load_rows(task, "test", Data(task=name, test=f"{REAL_ROWS}/{file}.jsonl"))
    assert len(rows) == count
    assert task.test_size == (None if name == "codealpaca" else count)
    for row in rows if share == "all" else rows[:: max(1, count // 300)]:
        assert task.target_spans(row), row["id"]
        assert task.metric == "nll" or task.score(row, task.answer(row)).correct, row["id"]
