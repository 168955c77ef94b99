"""The verdicts of the sandbox: right programs pass whatever they work with, and a wrong one is told why it is wrong."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
from hostile import GREEDY, HONEST, TESTS
from sandboxes import usable_sandbox

from spd_dist.config import Data
from spd_dist.data.sources import load_rows
from spd_dist.data.tasks import find_task, with_execution
from spd_dist.sandbox import Limits, Sandbox, SandboxError, Verdict

pytestmark = pytest.mark.seconds

REAL_ROWS = Path("../shared/data")
PASSED = Verdict(True, "passed")


@pytest.fixture(scope="module")
def any_sandbox() -> Sandbox:
    """What keeps a program apart does not matter for what it means."""
    return usable_sandbox(Limits(cpu_seconds=1, wall_seconds=6))


RIGHT = {
    "sets and bytes": ("def f(x): return {x, b'1', frozenset((2.5,))}", "assert f(1) == {b'1', 1, frozenset({2.5})}"),
    "dicts and None": ("def f(x): return {x: None, (1, 'a'): [True]}", "assert f(1) == {1: None, (1, 'a'): [True]}"),
    "huge integers": ("import math\ndef f(x): return math.factorial(x)", "assert f(3000) // f(2999) == 3000"),
    "rare floats": ("def f(x): return [float('inf'), -0.0, x]", "assert f(.1) == [float('inf'), 0, .1]"),
    "named arguments": ("def f(*a, k=1): return (a, k)", "assert f(1, 2, k=3) == ((1, 2), 3)"),
    "generators": ("def f(x): yield from range(x)", "assert list(f(3)) == [0, 1, 2] and sorted(f(2)) == [0, 1]"),
    "ranges and complex": ("def f(x): return range(x), 1j", "assert f(3) == (range(3), 1j)"),
    "collections": (
        "from collections import *\ndef f(x): return Counter(x), deque(x), OrderedDict({1: 2}), defaultdict(int)",
        "assert f('aa')[0] == {'a': 2} and list(f('ab')[1]) == ['a', 'b'] and f('')[2:] == ({1: 2}, {})",
    ),
    "exact numbers": (
        "from fractions import *\nfrom decimal import *\ndef f(x): return Fraction(x, 3), Decimal('0.1')",
        "assert f(6)[0] == 2 and str(f(1)[1]) == '0.1'",
    ),
    "dates": ("from datetime import *\ndef f(x): return date(x, 1, 2), timedelta(1)", "assert f(2020)[0].day == 2"),
    "objects": (
        "class Pair:\n    def __init__(self, a): self.a = a\n    def __len__(self): return 3\n"
        "    def __getitem__(self, key): return key\n    __setitem__ = lambda *a: None\n"
        "def f(pairs): return [pair.a for pair in pairs]",
        "assert f([Pair(2), Pair(3)]) == [2, 3] and Pair(1).a == 1 and len(Pair(1)) == 3 and Pair(1)[7] == 7",
    ),
    "the same object": ("class A: pass\na = A()\ndef f(x): return a", "assert f(1) is f(2) and f(1) == a"),
    "a name of a builtin": ("def sum(a, b): return a * b", "assert sum(10, 15) == 150"),
    "its own module": (
        "import dataclasses\n@dataclasses.dataclass\nclass A:\n    a: 'int' = 1\ndef f(x): return A().a\n"
        "if __name__ == '__main__': f = None",
        "assert f(1) == 1",
    ),
    "errors": (
        "def f(x): raise ValueError('no')",
        "try: f(1)\nexcept ValueError as error: assert str(error) == 'no'",
    ),
    "threads": (
        "import threading\ndef f(x):\n    found = []\n    one = threading.Thread(target=found.append, args=(x,))\n"
        "    one.start()\n    one.join()\n    return found",
        "assert f(1) == [1]",
    ),
    "packages": ("import numpy\ndef f(x): return numpy.int64(x) + 1, numpy.bool_(1)", "assert f(1) == (2, True)"),
    "arrays": (
        "import numpy\ndef f(x): return numpy.array([x, 2.0])",
        "import numpy as np\nassert np.allclose(f(1), [1, 2]) and f.__name__ == 'f'",
    ),
    "nothing, where nothing is right": ("def f(x): return []", "import numpy\nassert numpy.allclose(f(1), [])"),
    "much talk": (
        "import sys\nprint('x' * 10**6)\ndef f(x):\n    print(x, file=sys.stderr)\n    return x",
        "assert f(1)",
    ),
    "input that ends": (
        "def f(x):\n    try: return input()\n    except EOFError: return 'nothing'",
        "assert f(1) == 'nothing'",
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_programs_pass(any_sandbox, name):
    program, test = RIGHT[name]
    assert any_sandbox.run(program, [test]) == PASSED


def test_a_setup_may_make_objects_of_the_program_and_import_for_it(any_sandbox):
    program = (
        "class Node:\n    def __init__(self, value): self.value, self.left = value, None\n"
        "def depth(node): return 0 if node is None else 1 + depth(node.left)\n"
        "def root_of(x): return math.sqrt(x)"
    )
    setup = "import math\r\nroot = Node(1) \r\nroot.left = Node(2)\r\nroot.left.left = Node(3)"
    tests = ["assert (depth(root)) == 3", "assert root.left.value == 2", "assert math.isclose(root_of(4), 2)"]
    assert any_sandbox.run(program, tests, setup) == PASSED


WRONG = {
    r"test 2 of 2: AssertionError": ("def double(x): return 4", TESTS),
    r"loading the program: SyntaxError .*": ("def double(x) return 4", TESTS),
    r"loading the program: ModuleNotFoundError No module named 'nowhere'": ("import nowhere", TESTS),
    r"looking for the program's double: KeyError double": ("def twice(x): return 2 * x", TESTS),
    r"test 1 of 2: ProgramError Odd: what": ("class Odd(Exception): pass\ndef double(x): raise Odd('what')", TESTS),
    r"test 1 of 1: TypeError a test may give the program plain data .*, not function": (
        HONEST, ["assert double((lambda: 2)) == 4"],
    ),
    r"the setup or a test is not Python: ValueError no assertion": (HONEST, ["double(2) == 4"]),
    r"the setup or a test is not Python: SyntaxError .*": (HONEST, ["assert double(2) = 4"]),
    r"an assertion was not reached": (HONEST, ["if double(2) == 5:\n    assert False"]),
    r"test 1 of 1: AssertionError": ("class math:\n    isclose = lambda *a: True\ndef f(x): return 7", [
        "assert math.isclose(f(1), 2)"
    ]),
    r"test 1 of 1: AssertionError nothing is compared with something": (
        "def f(x): return []", ["import numpy as np\nassert np.allclose(f(1), 3.5)"],
    ),
    r"test 1 of 1: TypeError .*Remote.*": (
        "class A: __array_interface__ = {'shape': (1,), 'typestr': '<f8', 'version': 3, 'data': (1, True)}\n"
        "def f(x): return A()", ["import numpy as np\nassert np.allclose(f(1), 3.5)"],
    ),
    r"the program is longer than what is judged, by \d+ bytes": (f"{HONEST}\n#{'x' * 9 * 2**20}", TESTS),
    r"loading the program: the program ended by itself": ("import os; os._exit(0)", TESTS),
    r"test 1 of 2: the program was ended by signal 9": ("import os\ndef double(x): os.kill(os.getpid(), 9)", TESTS),
    r"test 1 of 2: the program exceeded cpu_seconds": ("def double(x):\n    while True: pass", TESTS),
    # On a busy machine its many processes may use up their processor time before they have grown.
    r"test 1 of 2: the program exceeded (memory_mib|cpu_seconds)": (GREEDY["10 GB in many processes"], TESTS),
    r"test 1 of 2: the program (closed its connection|ended by itself)": (
        "import os, time\ndef double(x):\n    os.closerange(0, 64)\n    time.sleep(2)\n    os._exit(0)", TESTS,
    ),
}  # fmt: skip


def test_the_reason_says_what_went_wrong(any_sandbox):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda wrong: any_sandbox.run(*wrong), WRONG.values()))
    for verdict, reason in zip(found, WRONG, strict=True):
        assert not verdict.passed
        with pytest.raises(ValueError, match=f"^{reason}$"):
            raise ValueError(verdict.reason)


def test_tests_that_are_too_long_say_nothing_of_a_program(any_sandbox):
    with pytest.raises(SandboxError, match=r"a program's tests are longer than what is judged, by \d+ bytes"):
        any_sandbox.run(HONEST, [f"assert double(2) == 4\n#{'x' * 9 * 2**20}"])


def test_a_verdict_does_not_depend_on_the_order_of_a_set(any_sandbox):
    first = 'def double(x): return next(iter({"a", "b", "c", "d", "e", "f"}))'
    one = any_sandbox.run(first, ["assert double(2) == 'a'"])
    assert [any_sandbox.run(first, ["assert double(2) == 'a'"]) for _ in range(4)] == [one] * 4


def test_mbpp_is_scored_in_the_sandbox(any_sandbox):
    task = with_execution(find_task("mbpp"), any_sandbox.run)
    row = {"id": "1", "prompt": "Double.", "code": HONEST, "tests": TESTS, "setup": ""}
    assert task.score(row, f"Sure:\n```python\n{HONEST}\n```").correct
    assert not task.score(row, "```python\ndef double(x): return 4\n```").correct


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.skipif(not REAL_ROWS.is_dir(), reason=f"the benchmark rows are not at {REAL_ROWS}")
@pytest.mark.parametrize(("name", "count"), [("mbpp", 500), ("mbpp_sanitized", 257)])
def test_every_reference_passes_and_fails_the_tests_of_another_problem(name, count):
    task, sandbox = find_task(name), usable_sandbox()
    rows = load_rows(task, "test", Data(task=name, test=f"{REAL_ROWS}/{name}/test.jsonl"))
    with ThreadPoolExecutor(2) as pool:
        right = list(pool.map(lambda row: sandbox.run(row["code"], row["tests"], row["setup"]).passed, rows))
        wrong = list(pool.map(lambda pair: sandbox.run(pair[0]["code"], pair[1]["tests"], "").passed, pairwise(rows)))
    assert len(rows) == count
    assert [row["id"] for row, passed in zip(rows, right, strict=True) if not passed] == []
    assert not any(wrong)
