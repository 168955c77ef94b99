"""The sandbox: right programs pass, and nothing that a program does makes a wrong one pass, reach out or stay."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hostile import (
    CHEATS,
    CUNNING,
    GREEDY,
    HONEST,
    OVER_CPU,
    OVER_MEMORY,
    REFUSED,
    STUBBORN,
    TESTS,
    achieves,
    connects,
    reads,
    writes,
)
from sandboxes import ISOLATIONS, usable_sandbox

from spd_dist.errors import ConfigError
from spd_dist.sandbox import Limits, Sandbox, SandboxError, Verdict, open_sandbox
from spd_dist.sandbox.inside.supervisor import held_mib
from spd_dist.sandbox.isolation import Layout, Namespaces, layout

pytestmark = pytest.mark.seconds

PASSED = Verdict(True, "passed")
SHORT = Limits(cpu_seconds=1, wall_seconds=6, memory_mib=1024 + os.getpid() % 1000)
"""Short, and told apart from those of other processes: `processes_left` looks for them."""


@pytest.fixture(scope="module", params=ISOLATIONS, ids=lambda isolation: isolation.name)
def sandbox(request) -> Sandbox:
    return usable_sandbox(SHORT, [request.param])


AT_HAND, OTHER = sorted(ISOLATIONS, key=lambda isolation: isolation.missing() is not None)
HELD_ALIKE = pytest.mark.parametrize(
    "sandbox", [AT_HAND, pytest.param(OTHER, marks=pytest.mark.slow)], ids=lambda one: one.name, indirect=True
)  # fmt: skip
"""Limits of time, memory and processes are held by what is around either isolation: one of them shows it."""


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


def verdicts_on(sandbox: Sandbox, programs: Sequence[str], num_pairs: int) -> list[Verdict]:
    """Of programs that run beside each other, each in a pair with an honest one; nothing is left of them."""
    with ThreadPoolExecutor(2 * num_pairs) as pool:
        pairs = [[pool.submit(sandbox.run, text, TESTS) for text in (program, HONEST)] for program in programs]
        assert [honest.result() for _, honest in pairs] == [PASSED] * len(programs)
        found = [hostile.result() for hostile, _ in pairs]
    assert processes_left() == []
    return found


def check_hostile(sandbox: Sandbox, programs: Mapping[str, str], num_pairs: int = 2) -> dict[str, Verdict]:
    """None of them passes; what is said of each."""
    found = dict(zip(programs, verdicts_on(sandbox, list(programs.values()), num_pairs), strict=True))
    assert {name: verdict for name, verdict in found.items() if verdict.passed} == {}
    return found


@pytest.mark.parametrize(
    ("programs", "num_pairs"),
    [
        pytest.param(CHEATS, 2, id="cheats"),
        pytest.param(CUNNING, 2, id="cunning", marks=pytest.mark.slow),
        pytest.param(STUBBORN | GREEDY | CUNNING, 8, id="eight at once", marks=pytest.mark.slow),
    ],
)
def test_no_hostile_program_passes_stays_or_harms_its_neighbours(sandbox, programs, num_pairs):
    check_hostile(sandbox, programs, num_pairs)


@HELD_ALIKE
def test_no_greedy_program_passes_stays_or_harms_its_neighbours(sandbox):
    assert check_hostile(sandbox, STUBBORN | GREEDY)["sleeps"].reason == "not judged within 6 s"


def test_a_hundred_programs_are_tried():
    kinds = (CHEATS, GREEDY, STUBBORN, CUNNING, OVER_CPU, OVER_MEMORY)
    assert len({program for kind in kinds for program in kind.values()}) + len(REFUSED) >= 100


@HELD_ALIKE
def test_time_and_memory_are_counted_whoever_holds_them(sandbox):
    """Right programs that take too much, each in a way in which it could go unseen, beside one that does not."""
    limited = Sandbox(sandbox.isolation, Limits(cpu_seconds=1, memory_mib=256))
    programs = {**OVER_CPU, **OVER_MEMORY, "honest": HONEST}
    with ThreadPoolExecutor(4) as pool:
        found = dict(
            zip(programs, pool.map(lambda program: limited.run(program, TESTS[:1]), programs.values()), strict=True)
        )
    assert found.pop("honest") == PASSED
    over = "the program exceeded cpu_seconds"
    assert {name: found[name].reason for name in OVER_CPU if over not in found[name].reason} == {}
    assert [name for name, verdict in found.items() if verdict.passed] == []


def test_children_that_end_are_still_children(sandbox):
    """What SIGCHLD does cannot be changed, but a program that tries goes on, and waits for its children as before."""
    program = (
        "import os, signal, subprocess\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\ndef double(x):\n"
        "    child = os.fork()\n    if child == 0: os._exit(x)\n"
        "    return 2 * os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])"
    )
    assert sandbox.run(program, TESTS) == PASSED


def test_signals_without_end_do_not_keep_a_supervisor_busy():
    """It looks at what is used every now and then, and not whenever a program sends it the signal of a child's end."""
    code = (
        "import os, signal, time\nfrom spd_dist.sandbox.inside import supervisor\nlooked = []\n"
        "def usage():\n    looked.append(1)\n    return supervisor.Usage(0, 0, 0, 0)\n"
        "supervisor.usage = usage\nsignal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})\n"
        "began, child = time.monotonic(), os.fork()\nif child == 0:\n    for _ in range(300):\n"
        "        os.kill(os.getppid(), signal.SIGCHLD)\n        time.sleep(0.001)\n    os._exit(0)\n"
        "limits = dict.fromkeys(supervisor.Usage._fields, 1)\nassert supervisor._watch(child, limits, {}) == 0\n"
        "assert len(looked) <= (time.monotonic() - began) / 0.05 + 1, len(looked)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_the_kernel_holds_for_a_program_is_counted(tmp_path):
    with open(tmp_path / "locked", "w") as file, contextlib.ExitStack() as stack:
        for start in range(4000):
            fcntl.lockf(file, fcntl.LOCK_EX, 1, 2 * start)
        for end in [end for _ in range(100) for end in socket.socketpair()]:
            stack.enter_context(end)
        assert held_mib() > 4000 * 250 / 2**20 + 200 * 0.2


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


def test_what_a_program_writes_is_gone_for_the_next_one(sandbox):
    remembers = (
        "import os\ndef double(x):\n    is_first = not os.path.exists('/tmp/was-here')\n"
        "    open('/tmp/was-here', 'w').close()\n    return is_first"
    )
    assert [sandbox.run(remembers, ["assert double(2)"]) for _ in range(2)] == [PASSED, PASSED]


def test_nothing_is_left_when_the_judging_process_is_killed(sandbox):
    code = (
        "from spd_dist.sandbox import *\nfrom spd_dist.sandbox.isolation import *\n"
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


def test_no_home_and_no_workplace_is_shown_whatever_the_interpreter_is_said_to_need(tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh" / "id").write_text("hunter2")
    (home / "lib").mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "lib")
    folders = [str(home), str(tmp_path), "..", ".", "", f"{home}/.ssh/..", str(home / ".ssh" / "nothing")]
    monkeypatch.setenv("LD_LIBRARY_PATH", ":".join(folders))
    assert [path for path in layout(1).shown if home.is_relative_to(path)] == []
    monkeypatch.setattr(sys, "base_prefix", str(tmp_path))
    assert [path for path in layout(1).shown if home.is_relative_to(path)] == []
    sandbox = usable_sandbox(SHORT)
    assert not sandbox.run(reads(str(home / ".ssh" / "id")), ["assert double(2) == 'hunter2'"]).passed


def test_an_isolation_that_shows_a_home_is_refused(sandbox, tmp_path, monkeypatch):
    (tmp_path / "id").write_text("hunter2")
    tmp_path.chmod(0o755)
    monkeypatch.setenv("HOME", str(tmp_path))
    shows_all = Sandbox(sandbox.isolation, SHORT)
    shows_all._layout = dataclasses.replace(
        shows_all._layout, shown=shows_all._layout.shown | {str(tmp_path): str(tmp_path)}
    )
    assert shows_all.inspect() == [f"files of the host can be read: {tmp_path}/id"]
    assert Sandbox(sandbox.isolation, SHORT).inspect() == []


def test_a_program_sees_neither_how_the_host_was_started_nor_its_name(sandbox):
    program = "import socket\ndef double(x):\n    return open('/proc/cmdline').read() + socket.gethostname()"
    assert sandbox.run(program, ["assert double(2) == 'sandbox'"]) == PASSED


@pytest.mark.parametrize(
    "make", [Path.touch, lambda path: path.symlink_to("/tmp"), lambda path: path.mkdir(0o777) or path.chmod(0o777)]
)
def test_locks_in_a_folder_that_others_may_write_are_refused(sandbox, tmp_path, monkeypatch, make):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = tmp_path / f"spd-sandbox-{os.geteuid()}-{os.stat('/proc/self/ns/user').st_ino}"
    make(folder)
    with pytest.raises(ConfigError, match=rf"^{folder}: must be a folder of this user's alone; .* set TMPDIR"):
        sandbox.run(HONEST, TESTS)


def test_a_machine_whose_system_calls_are_not_known_is_named(sandbox, caplog, monkeypatch):
    monkeypatch.setattr("spd_dist.sandbox.trial.can_filter", lambda: False)
    monkeypatch.setattr("spd_dist.sandbox.trial.find_hierarchies", lambda: ())
    with caplog.at_level(logging.WARNING):
        open_sandbox(SHORT, [sandbox.isolation])
    assert f"the system calls of {os.uname().machine} are not known here" in caplog.text


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
@pytest.mark.parametrize("root_of", [(), ("unshare", "--user", "--map-root-user")], ids=["itself", "a container"])
def test_it_holds_for_an_ordinary_user_as_well(root_of):
    """And for one that is root in a container of its own, where there is nobody else to become."""
    usable_sandbox()
    python = interpreter_of_ordinary_users()
    hostile = [STUBBORN["kills everything"], GREEDY["fork bomb of sleepers"], *map(achieves, REFUSED)]
    code = (
        "import os, sys\nfrom concurrent.futures import ThreadPoolExecutor\nfrom spd_dist.sandbox import *\n"
        f"assert bool(os.getuid()) is {not root_of}\n"
        f"sandbox = open_sandbox({SHORT!r})\n"
        f"found = list(ThreadPoolExecutor(4).map(lambda one: sandbox.run(one, {TESTS!r}), {[HONEST, *hostile]!r}))\n"
        "print([one.passed for one in found])"
    )
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree("spd_dist", Path(folder) / "spd_dist")
        subprocess.run(["chmod", "-R", "a+rX", folder], check=True)
        environment = {"PYTHONPATH": folder, "PATH": os.defpath, "PYTHONDONTWRITEBYTECODE": "1"}
        words = [*root_of, python, "-c", code]
        outcome = subprocess.run(
            words, user=ORDINARY_USER, group=ORDINARY_USER, extra_groups=[], env=environment, cwd="/",
            check=False, capture_output=True, text=True,
        )  # fmt: skip
    if "no sandbox holds on this machine" in outcome.stderr:
        pytest.skip(outcome.stderr.splitlines()[-1])
    assert outcome.stdout == f"{[True] + [False] * len(hostile)}\n", outcome.stderr
