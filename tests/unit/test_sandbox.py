"""The sandbox: right programs pass, and nothing that a program does makes a wrong one pass, reach out or stay."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hostile import CHEATS, GREEDY, HONEST, REFUSED, STUBBORN, TESTS, achieves, connects, reads, writes
from sandboxes import ISOLATIONS, usable_sandbox

from spd_dist.data.tasks import find_task, with_execution
from spd_dist.errors import ConfigError
from spd_dist.runtime.sandbox import Limits, Sandbox, SandboxError, Verdict, open_sandbox
from spd_dist.runtime.sandbox.isolation import Namespaces
from spd_dist.runtime.sandbox.layout import Layout

PASSED = Verdict(True, "passed")
SHORT = Limits(cpu_seconds=1, wall_seconds=6, memory_mib=1024 + os.getpid() % 1000)
"""Short, and told apart from those of other processes: `processes_left` looks for them."""


@pytest.fixture(scope="module", params=ISOLATIONS, ids=lambda isolation: isolation.name)
def sandbox(request) -> Sandbox:
    return usable_sandbox(SHORT, [request.param])


@pytest.fixture(scope="module")
def any_sandbox() -> Sandbox:
    """What holds does not matter for what a program means."""
    return usable_sandbox(SHORT)


def processes_left() -> list[str]:
    """Processes of our sandboxes that still are."""
    mark = f'"memory_mib": {SHORT.memory_mib}'.encode()
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if mark in words:
            found.append(file.parent.name)
    return found


def verdicts_on(sandbox: Sandbox, programs: Sequence[str]) -> list[Verdict]:
    """Of programs that run beside each other, in pairs with an honest one; nothing is left of them."""
    with ThreadPoolExecutor(4) as pool:
        wrong = [pool.submit(sandbox.run, program, TESTS) for program in programs]
        right = [pool.submit(sandbox.run, HONEST, TESTS) for _ in programs]
        assert [one.result() for one in right] == [PASSED] * len(programs)
        found = [one.result() for one in wrong]
    assert processes_left() == []
    return found


@pytest.mark.parametrize("programs", [CHEATS, STUBBORN | GREEDY], ids=["cheats", "greedy"])
def test_no_hostile_program_passes_stays_or_harms_its_neighbours(sandbox, programs):
    found = dict(zip(programs, verdicts_on(sandbox, list(programs.values())), strict=True))
    assert {name: verdict for name, verdict in found.items() if verdict.passed} == {}
    assert "sleeps" not in found or found["sleeps"].reason == "not judged within 6 s"


def test_programs_reach_neither_files_nor_network_nor_kernel(sandbox, tmp_path):
    secret, target = tmp_path / "secret", tmp_path / "target"
    secret.write_text("hunter2")
    system = f"/usr/written-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        network = connects(server.getsockname()[1])
        programs = [writes(str(target)), writes(system), network, *map(achieves, REFUSED), achieves("0")]
        with ThreadPoolExecutor(4) as pool:
            *refused, control = pool.map(lambda program: sandbox.run(program, TESTS), programs)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert [program for program, verdict in zip(programs, refused, strict=False) if verdict.passed] == []
    assert control == PASSED
    assert not target.exists()
    assert not Path(system).exists()
    for path in (secret, Path("~/.bash_history").expanduser(), Path("/etc/passwd"), Path(__file__)):
        assert sandbox.run(reads(str(path)), ["assert len(double(2)) >= 0"]) == Verdict(
            False, "test 1 of 1: FileNotFoundError No such file or directory"
        )


def test_a_verdict_does_not_depend_on_the_order_of_a_set(any_sandbox):
    first = 'def double(x): return next(iter({"a", "b", "c", "d", "e", "f"}))'
    one = any_sandbox.run(first, ["assert double(2) == 'a'"])
    assert [any_sandbox.run(first, ["assert double(2) == 'a'"]) for _ in range(4)] == [one] * 4


def test_what_a_program_writes_is_gone_for_the_next_one(sandbox):
    remembers = (
        "import os\ndef double(x):\n    is_first = not os.path.exists('/tmp/was-here')\n"
        "    open('/tmp/was-here', 'w').close()\n    return is_first"
    )
    assert [sandbox.run(remembers, ["assert double(2)"]) for _ in range(2)] == [PASSED, PASSED]


def test_nothing_is_left_when_the_judging_process_is_killed(sandbox):
    code = (
        "from spd_dist.runtime.sandbox import *\nfrom spd_dist.runtime.sandbox.isolation import *\n"
        f"Sandbox({type(sandbox.isolation).__name__}(), {SHORT!r}).run({STUBBORN['catches every signal']!r}, {TESTS!r})"
    )
    judging = subprocess.Popen([sys.executable, "-c", code])
    while len(processes_left()) < 4:  # two sandboxes, each with a supervisor and what it watches
        assert judging.poll() is None
        time.sleep(0.01)
    judging.send_signal(signal.SIGKILL)
    judging.wait()
    deadline = time.monotonic() + 20
    while processes_left():
        assert time.monotonic() < deadline
        time.sleep(0.01)


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
    r"loading the program: the program ended by itself": ("import os; os._exit(0)", TESTS),
    r"test 1 of 2: the program was ended by signal 9": ("import os\ndef double(x): os.kill(os.getpid(), 9)", TESTS),
    r"test 1 of 2: the program exceeded cpu_seconds": ("def double(x):\n    while True: pass", TESTS),
    r"test 1 of 2: the program exceeded memory_mib": (GREEDY["10 GB in many processes"], TESTS),
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


@dataclasses.dataclass(frozen=True)
class Leaky:
    """Namespaces that allow too much."""

    name: str = "leaky"

    def missing(self) -> str | None:
        return None

    def command(self, layout: Layout, user: int | None, inner: Sequence[str]) -> list[str]:
        return Namespaces().command(dataclasses.replace(layout, writable=layout.writable | {"/etc": 1}), user, inner)


@dataclasses.dataclass(frozen=True)
class Broken:
    """Does not start."""

    words: tuple[str, ...] = ("sh", "-c", "echo no such thing >&2; exit 3")
    name: str = "broken"
    lacks: str | None = None

    def missing(self) -> str | None:
        return self.lacks

    def command(self, layout: Layout, user: int | None, inner: Sequence[str]) -> list[str]:
        return list(self.words)


def test_what_does_not_hold_is_refused_with_every_reason():
    usable_sandbox(SHORT, [Namespaces()])
    isolations = [Broken(lacks="it is not installed"), Broken(), Leaky()]
    with pytest.raises(
        ConfigError,
        match=r"allow_code_execution: true, but no sandbox holds on this machine \(broken: it is not installed; "
        r"broken: a sandbox did not start: no such thing; leaky: the system can be written to: /etc\); install",
    ):
        open_sandbox(SHORT, isolations)


def test_the_log_says_which_isolation_is_used_and_why_not_another(sandbox, caplog):
    with caplog.at_level(logging.INFO):
        open_sandbox(SHORT, [Broken(lacks="it is not installed"), sandbox.isolation])
    assert f"runs in a sandbox of {sandbox.isolation.name}; broken: it is not installed" in caplog.text


def test_a_sandbox_that_does_not_start_says_nothing_about_the_program():
    sandbox = Sandbox(Broken(("false",)), SHORT)
    with pytest.raises(SandboxError, match=r"^a sandbox did not start: exit codes 1, 1"):
        sandbox.run(HONEST, TESTS)
    with pytest.raises(SandboxError, match=r"^a sandbox did not start: exit codes 1"):
        sandbox.inspect()


ORDINARY_USER = 65534


def interpreter_of_ordinary_users() -> str:
    """One that another user than root can start."""
    for path in filter(
        os.path.exists, ("/usr/bin/python3", "/usr/local/bin/python3", os.path.realpath(sys.executable))
    ):
        code = "import sys; sys.exit(sys.version_info < (3, 11))"
        if subprocess.run([path, "-c", code], user=ORDINARY_USER, check=False, capture_output=True).returncode == 0:
            return path
    return pytest.skip("no Python 3.11 or newer that an ordinary user can start")


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests run as an ordinary user already")
def test_it_holds_for_an_ordinary_user_as_well():
    usable_sandbox()
    python = interpreter_of_ordinary_users()
    hostile = [STUBBORN["kills everything"], GREEDY["fork bomb of sleepers"], *map(achieves, REFUSED)]
    code = (
        "import os, sys\nfrom concurrent.futures import ThreadPoolExecutor\nfrom spd_dist.runtime.sandbox import *\n"
        "assert os.getuid()\n"
        f"sandbox = open_sandbox({SHORT!r})\n"
        f"found = list(ThreadPoolExecutor(4).map(lambda one: sandbox.run(one, {TESTS!r}), {[HONEST, *hostile]!r}))\n"
        "print([one.passed for one in found])"
    )
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree("spd_dist", Path(folder) / "spd_dist")
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
        environment = {"PYTHONPATH": folder, "PATH": os.defpath, "PYTHONDONTWRITEBYTECODE": "1"}
        outcome = subprocess.run(
            [python, "-c", code], user=ORDINARY_USER, group=ORDINARY_USER, extra_groups=[], env=environment, cwd="/",
            check=False, capture_output=True, text=True,
        )  # fmt: skip
    if "no sandbox holds on this machine" in outcome.stderr:
        pytest.skip(outcome.stderr.splitlines()[-1])
    assert outcome.stdout == f"{[True] + [False] * len(hostile)}\n", outcome.stderr


def test_mbpp_is_scored_in_the_sandbox(any_sandbox):
    task = with_execution(find_task("mbpp"), any_sandbox.passes)
    row = {"id": "1", "prompt": "Double.", "code": HONEST, "tests": TESTS, "setup": ""}
    assert task.score(row, f"Sure:\n```python\n{HONEST}\n```").correct
    assert not task.score(row, "```python\ndef double(x): return 4\n```").correct
