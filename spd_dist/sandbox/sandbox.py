"""Running a model-written program against its tests: the program in one sandbox, the tests in another."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import select
import signal
import socket
import subprocess
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spd_dist.errors import ConfigError
from spd_dist.sandbox.inside.confine import can_filter
from spd_dist.sandbox.inside.supervisor import EXIT_CODES
from spd_dist.sandbox.inside.wire import Channel, Ended
from spd_dist.sandbox.isolation import (
    GUEST,
    ISOLATED_PYTHON,
    Bubblewrap,
    Isolation,
    Namespaces,
    interpreter,
    layout,
    packages,
    things_of_the_user,
)
from spd_dist.sandbox.turns import STARVED_FRACTION, alone, among_others, waited_seconds

log = logging.getLogger(__name__)

FIRST_USER = 1879048192
"""The first of 2 ** 28 user numbers that no system hands out (systemd's table of ranges)."""

_BOOT = f"import sys; sys.path.insert(0, {GUEST!r}); from spd_dist.sandbox.inside.main import main; main()"
START_SECONDS = 60.0
PATIENCE = 20
"""Times the wall clock's limit, for a program that is judged alone and has to wait for what others use."""


@dataclass(frozen=True)
class Limits:
    """What one program may use, all of its processes together."""

    cpu_seconds: int = 10
    wall_seconds: int = 30
    memory_mib: int = 1024
    num_processes: int = 16
    """Threads count."""
    file_mib: int = 16
    """The largest file, and the size of each of the two folders that can be written to."""
    num_files: int = 4096
    """In these folders: an empty file takes memory, too."""


@dataclass(frozen=True)
class Verdict:
    """Whether a program passed its tests."""

    passed: bool
    reason: str
    """`passed`, or what went wrong first."""

    @property
    def kind(self) -> str:
        """The reason in a word, to be counted by: `passed`, `failed`, or the limit: `time`, `memory`, `processes`."""
        limits = {
            "cpu_seconds": "time",
            "not judged within": "time",
            "memory_mib": "memory",
            "num_files": "memory",
            "num_proc": "processes",
        }
        return "passed" if self.passed else next((limits[part] for part in limits if part in self.reason), "failed")


class SandboxError(RuntimeError):
    """A sandbox did not start: this says nothing about the program."""


class Sandbox:
    """Runs programs, several at once if it is called from several threads. It keeps nothing between two programs."""

    def __init__(self, isolation: Isolation, limits: Limits | None = None) -> None:
        """Use `isolation` as it is: `open_sandbox` looks first whether it holds."""
        self.isolation = isolation
        self.limits = limits or Limits()
        self._layout = layout(self.limits.file_mib)
        self._counter = itertools.count()

    def run(self, program: str, tests: Sequence[str], setup: str = "") -> Verdict:
        """Judge a program. Nothing of it is left when this returns or raises.

        A verdict does not depend on what else runs: a program that had to wait for a processor when the wall clock
        ended it is judged again, alone.

        Raises:
            SandboxError: the sandbox did not start; or even alone the program had to wait for what others use.
        """
        with among_others():
            verdict = self._run(program, tests, setup, patience=1)
        if verdict is None:
            with alone():
                verdict = self._run(program, tests, setup, patience=PATIENCE)
        if verdict is None:
            raise SandboxError(
                f"a program was not judged within {PATIENCE * self.limits.wall_seconds} s, since it waited for a "
                "processor, though no other program was judged: other work keeps this machine busy; start the same "
                "command again when it has ended"
            )
        return verdict

    def _run(self, program: str, tests: Sequence[str], setup: str, patience: int) -> Verdict | None:
        """The verdict; None if the time for which it could run was not yet over after `patience` times the limit."""
        host, judge_to_host = socket.socketpair()
        judge_to_program, program_to_judge = socket.socketpair()
        ends = (judge_to_host, judge_to_program, program_to_judge)
        with contextlib.ExitStack() as stack:
            for end in (host, *ends):
                stack.enter_context(end)
            candidate = stack.enter_context(self._started("candidate", [program_to_judge]))
            judge = stack.enter_context(self._started("judge", [judge_to_host, judge_to_program]))
            for end in ends:
                end.close()
            if _received(host, START_SECONDS) != {"is_ready": True}:  # said before the program is loaded
                raise SandboxError(f"a sandbox did not start: {_last_words(judge, candidate)}")
            Channel(host).send({"program": program, "tests": list(tests), "setup": setup})
            limit, spent, waited = self.limits.wall_seconds, 0.0, 0.0
            answer = select.poll()  # `select` refuses descriptors from 1024 on, and a rank may hold many
            answer.register(host, select.POLLIN)
            while not answer.poll(1000 * (left := limit + waited - spent)):
                spent += left
                waited = waited_seconds(candidate.pid, judge.pid, otherwise=spent)
                if waited - (spent - limit) <= STARVED_FRACTION * limit:  # it had its time
                    return Verdict(False, f"not judged within {limit} s")
                if spent >= patience * limit:
                    return None
            found = _received(host, limit)
            if found is None:
                return Verdict(False, "the judge ended")
            if found["has_ended"]:
                return Verdict(False, f"{found['reason']}: {_how_it_ended(candidate)}")
            return Verdict(found["passed"] is True, found["reason"])

    def inspect(self) -> list[str]:
        """What the isolation fails to keep from a program, found by looking around from inside.

        Raises:
            SandboxError: the sandbox did not start.
        """
        host, guest = socket.socketpair()
        with contextlib.ExitStack() as stack:
            secret = stack.enter_context(tempfile.NamedTemporaryFile(prefix="spd-secret-")).name
            for end in (host, guest):
                stack.enter_context(end)
            process = stack.enter_context(
                self._started("inspection", [guest], secrets=[secret, *things_of_the_user(self._layout)])
            )
            guest.close()
            found = _received(host, START_SECONDS)
            if found is None:
                raise SandboxError(f"a sandbox did not start: {_last_words(process)}")
            return found

    @contextlib.contextmanager
    def _started(self, name: str, sockets: Sequence[socket.socket], **more: Any) -> Generator[subprocess.Popen[bytes]]:
        """One sandbox at work; it and all that is in it are dead at the end."""
        user = self._next_user() if _may_become_others() else None
        part = {
            "name": name, "num_sockets": len(sockets), "user": user, "guest": GUEST, "packages": packages(),
            "limits": dataclasses.asdict(self.limits), **more,
        }  # fmt: skip
        inner = [interpreter(), *ISOLATED_PYTHON, "-c", _BOOT, json.dumps(part)]
        process = subprocess.Popen(
            self.isolation.command(self._layout, user, inner),
            stdin=sockets[0].fileno(),
            stdout=sockets[1].fileno() if len(sockets) > 1 else subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=_environment(),
            start_new_session=True,  # a share of the processor of its own, and no terminal
        )
        with process:
            try:
                yield process
            finally:
                _kill(process)

    def _next_user(self) -> int:
        """A user of this sandbox's own, so that the kernel counts its processes apart; 64 at once for any process."""
        return FIRST_USER + ((os.getpid() % 2**22) << 6 | next(self._counter) % 64)


def _may_become_others() -> bool:
    """Whether we are root, and not only in a container that has no other users."""
    if os.geteuid() != 0:
        return False
    ranges = [tuple(map(int, line.split())) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    return any(first <= FIRST_USER and first + count >= FIRST_USER + 2**28 for first, _, count in ranges)


def _environment() -> dict[str, str]:
    """No variable of ours but the one that the interpreter may need to start."""
    own = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    same_sets = {"PYTHONHASHSEED": "0"}  # the order of a set, and so a verdict, does not change from run to run
    return {"HOME": "/tmp", "LANG": "C.UTF-8", "PATH": "/usr/bin:/bin", "OPENBLAS_NUM_THREADS": "1"} | own | same_sets


def _received(connection: socket.socket, seconds: float) -> Any:
    """The next message, or None if none came in time or none will come."""
    connection.settimeout(seconds)
    try:
        return Channel(connection).receive()
    except (Ended, TimeoutError):
        return None


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the first process inside and wait for the one outside, which ends when all the others have."""
    if process.poll() is not None:
        return
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    inner = children.read_text().split() if children.exists() else []
    for child in inner:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(child), signal.SIGKILL)
    try:
        process.wait(10 if inner else 0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _how_it_ended(candidate: subprocess.Popen[bytes]) -> str:
    try:
        code = candidate.wait(1)
    except subprocess.TimeoutExpired:
        return "the program closed its connection"
    limits = [name for name, limit_code in EXIT_CODES.items() if limit_code == code]
    if limits:
        return f"the program exceeded {limits[0]}"
    return f"the program was ended by signal {code - 128}" if code > 128 else "the program ended by itself"


def _last_words(*processes: subprocess.Popen[bytes]) -> str:
    for process in processes:
        _kill(process)
    said = [process.stderr.read().decode(errors="replace").split("\n") for process in processes if process.stderr]
    last = [lines[-1] for lines in ([line for line in text if line.strip()] for text in said) if lines]
    return "; ".join(dict.fromkeys(last)) or f"exit codes {', '.join(str(one.returncode) for one in processes)}"


def open_sandbox(
    limits: Limits | None = None, isolations: Sequence[Isolation] = (Bubblewrap(), Namespaces())
) -> Sandbox:
    """A sandbox that holds on this machine: of bubblewrap, else of namespaces; each is tried before it is trusted.

    Raises:
        ConfigError: neither holds; it says why.
    """
    faults = []
    for isolation in isolations:
        sandbox = Sandbox(isolation, limits)
        fault = isolation.missing() or _fault_of(sandbox)
        if fault is None:
            log.info(
                "model-written code runs in a sandbox of %s%s", isolation.name, "".join(f"; {one}" for one in faults)
            )
            if not can_filter():
                log.warning(
                    "the system calls of %s are not known here: the sandbox does not filter them, and its limits on "
                    "CPU time and memory hold only for programs that do not work around them",
                    os.uname().machine,
                )
            return sandbox
        faults.append(f"{isolation.name}: {fault}")
    raise ConfigError(
        f"evaluate.allow_code_execution: true, but no sandbox holds on this machine ({'; '.join(faults)}); install "
        "bubblewrap, allow unprivileged user namespaces, or evaluate a task that runs no code"
    )


def _fault_of(sandbox: Sandbox) -> str | None:
    """What is wrong with a sandbox, found by trying it; None if it holds and works."""
    try:
        found = sandbox.inspect()
        trial = sandbox.run(
            "import fractions\ndef half(x):\n    return fractions.Fraction(x, 2)", ["assert half(4) == 2"]
        )
    except SandboxError as error:
        return str(error)
    return ", ".join(found) or (None if trial.passed else f"a right program is judged wrong: {trial.reason}")
