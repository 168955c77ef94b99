"""Tasks whose answers are programs, judged in a real sandbox: HumanEval, HumanEval+, MBPP+ beside MBPP."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from sandboxes import usable_sandbox
from tiny import tiny_tokenizer

from spd_dist.config import Calibrate, Data
from spd_dist.data.masking import mask_row
from spd_dist.data.readers import Located
from spd_dist.data.sources import normalised_row
from spd_dist.data.spans import merged
from spd_dist.data.tasks import Row, Task, find_task, with_execution
from spd_dist.errors import DataError
from spd_dist.sandbox import Limits

HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": "from typing import List\n\ndef halved(x: int) -> int:\n    return x // 2\n\n\n"
    'def close(numbers: List[float], threshold: float) -> bool:\n    """ Are any two closer?\n    >>> close([1.0], 1)\n'
    '    False\n    """\n',
    "canonical_solution": "    return any(abs(a - b) < threshold for i, a in enumerate(numbers) for b in numbers[:i])\n",  # noqa: E501
    "test": "\n\nMETADATA = {'author': 'x'}\n\n\ndef check(candidate):\n"
    "    assert candidate([1.0, 2.0, 3.9], 0.3) == False\n    assert candidate([1.0, 1.1], 0.3) == True\n",
    "entry_point": "close",
}
EVALPLUS = (
    "import numpy as np\n\ndef is_floats(x) -> bool:\n    return isinstance(x, float)\n\n\n"
    "def assertion(out, exp, atol):\n    if atol == 0 and is_floats(exp):\n        atol = 1e-6\n"
    "    if atol != 0 and is_floats(exp):\n        assert np.allclose(out, exp, rtol=1e-07, atol=atol)\n"
    "    else:\n        assert out == exp, f'out: {out}, exp: {exp}'\n\n\n"
)
HUMANEVAL_PLUS = {
    **HUMANEVAL,
    "test": EVALPLUS
    + "def check(candidate):\n    inputs = [[[1.0, 2.0], 0.3], [[1.0, 1.1], 0.3]]\n    results = [False, True]\n"
    "    for i, (inp, exp) in enumerate(zip(inputs, results)):\n        assertion(candidate(*inp), exp, 0)\n",
}
MBPP = {
    "task_id": 2,
    "prompt": "Half of a number.",
    "code": "def half(x):\n    return x / 2",
    "test_imports": [],
    "test_list": ["assert half(4) == 2"],
}
MBPP_PLUS = {
    **MBPP,
    "test": EVALPLUS + "inputs = [[3], [5]]\nresults = [1.5, 2.5]\n"
    "for i, (inp, exp) in enumerate(zip(inputs, results)):\n    assertion(half(*inp), exp, 0)\n",
}
RAW = {"humaneval": HUMANEVAL, "humaneval_plus": HUMANEVAL_PLUS, "mbpp": MBPP, "mbpp_plus": MBPP_PLUS}
BODY = HUMANEVAL["canonical_solution"]
WHOLE = f"{HUMANEVAL['prompt']}{BODY}"
ANSWERS = {
    "a body alone": BODY,
    "a body without its first indent": BODY.strip(),
    "a body and what the model went on with": f"{BODY}\n\nThat is it, thank you.",
    "the whole program in a fence": f"Sure!\n```python\n{WHOLE}```\nDone.",
    "without the imports above it": "```python\n" + WHOLE.partition("\n\n\n")[2] + "```",
    "an example after it": f"```python\n{WHOLE}```\nUse it:\n```python\nprint(close([1.0], 1))\n```",
    "a helper in a fence of its own": "```python\ndef near(a, b, t):\n    return abs(a - b) < t\n```\nand\n```python\n"
    "def close(n, t):\n    return any(near(a, b, t) for i, a in enumerate(n) for b in n[:i])\n```",
    "with the helper of the prompt": "```python\ndef close(n, t):\n    n = [x for x in n if halved(4) == 2]\n"
    "    return any(abs(a - b) < t for i, a in enumerate(n) for b in n[:i])\n```",
    "under a sketch": f"```\ndef close(n, t):\n    pass\n```\nBetter:\n```python\n{WHOLE}```",
}
WRONG = {
    "another result": "    return True\n",
    "another name": "```python\ndef closer(numbers, threshold):\n    return False\n```",
    "a test of its own": f"```python\n{HUMANEVAL['prompt']}    return None\n\ndef check(candidate):\n    pass\n```",
    "nothing": "",
}


@pytest.fixture(scope="module")
def execute():
    """A real sandbox's."""
    return usable_sandbox(Limits(cpu_seconds=2, wall_seconds=30)).run


def given(name: str, raw: Row, execute) -> tuple[Task, Row]:
    task = with_execution(find_task(name), execute)
    return task, normalised_row(task, Located("rows", "line 1", {"id": "1", **raw}), "--judge")


@pytest.mark.parametrize("name", ["humaneval", "humaneval_plus"])
@pytest.mark.seconds
def test_a_function_is_completed_in_whatever_form(name, execute):
    task, row = given(name, RAW[name], execute)
    with ThreadPoolExecutor(2) as pool:
        right = dict(zip(ANSWERS, pool.map(lambda output: task.score(row, output), ANSWERS.values()), strict=True))
        wrong = dict(zip(WRONG, pool.map(lambda output: task.score(row, output), WRONG.values()), strict=True))
    assert {form: score.reason for form, score in right.items() if not score.correct} == {}
    assert {form for form, score in wrong.items() if score.correct} == set()


def test_an_answer_has_no_say_in_what_the_prompt_defines(execute):
    """As in HumanEval's `decode_cyclic`, whose test takes the prompt's `encode_cyclic`."""
    prompt = 'def encode(s):\n    return s[::-1]\n\n\ndef decode(s):\n    """ Undo encode. """\n'
    test = "def check(candidate):\n    assert candidate(encode('ab')) == 'ab'\n"
    solution = "    return s[::-1]\n"
    raw = {**HUMANEVAL, "prompt": prompt, "canonical_solution": solution, "test": test, "entry_point": "decode"}
    task, row = given("humaneval", raw, execute)
    same = "```python\ndef encode(s):\n    return s\n\ndef decode(s):\n    return s\n```"
    found = [
        task.score(row, output).correct
        for output in (solution, same, same.replace("return s\n`", f"{solution.strip()}\n`"))
    ]
    assert found == [True, False, True]


@pytest.mark.parametrize("name", RAW)
def test_the_reference_passes_and_its_prompt_shows_the_problem(name, execute):
    task, row = given(name, RAW[name], execute)
    assert task.score(row, task.answer(row)).correct
    text = task.prompt(row) + task.answer(row)
    assert [text[start:stop] for start, stop in task.target_spans(row)]
    masked = mask_row(row, task, tiny_tokenizer(), Data(template="plain"), Calibrate())
    assert [masked.text[start:stop] for start, stop in masked.spans] == [
        text[start:stop] for start, stop in merged(task.target_spans(row))
    ]


@pytest.mark.seconds
def test_more_inputs_decide_than_are_shown(execute):
    rounded = "```python\ndef half(x):\n    return x // 2\n```"
    assert given("mbpp", MBPP, execute)[0].score(given("mbpp", MBPP, execute)[1], rounded).correct
    task, row = given("mbpp_plus", MBPP_PLUS, execute)
    assert task.score(row, rounded).reason == "failed"
    assert task.score(row, "```python\ndef half(x):\n    while True: pass\n```").reason == "time"


@pytest.mark.parametrize(
    ("name", "other", "remedy"),
    [("mbpp", "humaneval", "task humaneval"), ("mbpp_plus", "humaneval_plus", "task humaneval"),
     ("humaneval", "mbpp", "task mbpp"), ("humaneval_plus", "mbpp_plus", "task mbpp")],
)  # fmt: skip
def test_rows_of_another_benchmark_are_refused(name, other, remedy, execute):
    with pytest.raises(DataError, match=remedy):
        given(name, RAW[other], execute)


@pytest.mark.slow
def test_a_verdict_does_not_depend_on_the_load():
    """More work at once than the wall clock's limit allows: who had to wait is judged again, alone."""
    sandbox = usable_sandbox(Limits(cpu_seconds=1, wall_seconds=3))
    busy = "import time\ndef f(x):\n    while time.process_time() < 0.5: pass\n    return x"
    endless = "def f(x):\n    while True: pass"
    with ThreadPoolExecutor(16) as pool:
        verdicts = list(pool.map(lambda program: sandbox.run(program, ["assert f(1) == 1"]), [busy, endless] * 8))
    assert [verdict.passed for verdict in verdicts] == [True, False] * 8
    assert {verdict.kind for verdict in verdicts[1::2]} == {"time"}
