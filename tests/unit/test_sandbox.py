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

from spd_dist.errors import ConfigError
from spd_dist.sandbox import Limits, Sandbox, SandboxError, Verdict, open_sandbox
from spd_dist.sandbox.isolation import Layout, Namespaces

PASSED = Verdict(True, "passed")
SHORT = Limits(cpu_seconds=1, wall_seconds=6, memory_mib=1024 + os.getpid() % 1000)
"""Short, and told apart from those of other processes: `processes_left` looks for them."""


@pytest.fixture(scope="module", params=ISOLATIONS, ids=lambda isolation: isolation.name)
def sandbox(request) -> Sandbox:
    return usable_sandbox(SHORT, [request.param])


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
        pairs = [[pool.submit(sandbox.run, text, TESTS) for text in (program, HONEST)] for program in programs]
        assert [honest.result() for _, honest in pairs] == [PASSED] * len(programs)
        found = [hostile.result() for hostile, _ in pairs]
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
        "import os, sys\nfrom concurrent.futures import ThreadPoolExecutor\nfrom spd_dist.sandbox import *\n"
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
