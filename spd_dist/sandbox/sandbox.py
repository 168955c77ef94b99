"""Running a model-written program against its tests: the program in one sandbox, the tests in another."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import select
import socket
import subprocess
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spd_dist.sandbox.cgroups import Group, Hierarchy, group_in
from spd_dist.sandbox.inside.wire import MAX_MESSAGE_BYTES, Channel, Ended
from spd_dist.sandbox.isolation import (
    GUEST,
    ISOLATED_PYTHON,
    Isolation,
    interpreter,
    layout,
    packages,
    things_of_the_user,
)
from spd_dist.sandbox.process_tree import how_it_ended, kill, last_words, supervised
from spd_dist.sandbox.turns import STARVED_FRACTION, alone, among_others, waited_seconds

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

    def __init__(
        self, isolation: Isolation, limits: Limits | None = None, hierarchies: Sequence[Hierarchy] = ()
    ) -> None:
        """Use `isolation` and cgroups as they are: `open_sandbox` looks first whether they hold."""
        self.isolation, self.hierarchies = isolation, hierarchies
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
        room = MAX_MESSAGE_BYTES - len(json.dumps([program, *tests, setup])) - 128
        if room < 0:
            if len(json.dumps(program)) < MAX_MESSAGE_BYTES // 2:
                raise SandboxError(f"a program's tests are longer than what is judged, by {-room} bytes")
            return Verdict(False, f"the program is longer than what is judged, by {-room} bytes")
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
            candidate, of_candidate = stack.enter_context(self._started("candidate", [program_to_judge]))
            judge, of_judge = stack.enter_context(self._started("judge", [judge_to_host, judge_to_program]))
            for end in ends:
                end.close()
            if _received(host, START_SECONDS) != {"is_ready": True}:  # said before the program is loaded
                raise SandboxError(f"a sandbox did not start: {last_words(judge, candidate)}")
            for process, group in ((candidate, of_candidate), (judge, of_judge)):
                _enter(group, process)
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
                return Verdict(False, f"{found['reason']}: {how_it_ended(candidate)}")
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
            process, _ = stack.enter_context(
                self._started("inspection", [guest], secrets=[secret, *things_of_the_user(self._layout)])
            )
            guest.close()
            found = _received(host, START_SECONDS)
            if found is None:
                raise SandboxError(f"a sandbox did not start: {last_words(process)}")
            return found

    @contextlib.contextmanager
    def _started(
        self, name: str, sockets: Sequence[socket.socket], **more: Any
    ) -> Generator[tuple[subprocess.Popen[bytes], Group]]:
        """One sandbox at work, and the group for what it will run; both are gone at the end."""
        user = self._next_user() if _may_become_others() else None
        with contextlib.ExitStack() as stack:
            try:
                group = stack.enter_context(group_in(self.hierarchies))
                group.limit(memory_mib=self.limits.memory_mib, num_processes=self.limits.num_processes)
                counters = stack.enter_context(group.counters())
            except OSError as error:
                raise SandboxError(f"a sandbox did not start: no cgroup of its own: {error}") from error
            part = {
                "name": name, "num_sockets": len(sockets), "user": user, "guest": GUEST, "packages": packages(),
                "limits": dataclasses.asdict(self.limits), "counters": counters, **more,
            }  # fmt: skip
            inner = [interpreter(), *ISOLATED_PYTHON, "-c", _BOOT, json.dumps(part)]
            process = stack.enter_context(
                subprocess.Popen(
                    self.isolation.command(self._layout, user, inner),
                    stdin=sockets[0].fileno(),
                    stdout=sockets[1].fileno() if len(sockets) > 1 else subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    env=_environment(),
                    pass_fds=[counter.descriptor for counter in counters.values()],
                    start_new_session=True,  # a share of the processor of its own, and no terminal
                )
            )
            stack.callback(kill, process)
            yield process, group

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


def _enter(group: Group, process: subprocess.Popen[bytes]) -> None:
    """Move what the supervisor started to its group; it has not yet seen the program."""
    workers = supervised(process) if group.folders else []
    try:
        group.take(workers)
    except OSError as error:
        raise SandboxError(f"a sandbox did not start: what runs in it can't be moved to a cgroup: {error}") from error
    if group.folders and not workers:
        raise SandboxError(
            "a sandbox did not start: the kernel does not tell what runs in it (/proc/PID/task/*/children)"
        )


def _received(connection: socket.socket, seconds: float) -> Any:
    """The next message, or None if none came in time or none will come."""
    connection.settimeout(seconds)
    try:
        return Channel(connection).receive()
    except (Ended, TimeoutError):
        return None
