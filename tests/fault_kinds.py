"""The faults that `faults.py` tries: each prepares a place for a run, strikes it, and puts things right again."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import failing_disk
import slow_link
from fake_wandb import FakeWandb
from fault_launcher import Preparation
from launching import Launch

TIMEOUT_SECONDS = 60
SHORT_TIMEOUT = ["distributed.timeout_seconds=20"]
"""Where only the time of a collective can tell what happened."""
STALE_SECONDS = 3.0
CGROUP = Path("/sys/fs/cgroup/memory")


@dataclass(frozen=True)
class Plan:
    """A fault that is ready to strike."""

    strike: Callable[[Launch, int], object]
    """Given the run, and the rank that is to be hit."""
    undo: Callable[[], object] = lambda: None
    """Before the run is started again."""
    words: Sequence[str] = ()
    preparation: Preparation | None = None
    folder: str = "run"
    """Where the run is, below the case's place."""


@dataclass(frozen=True)
class Kind:
    """What is known of a fault before it is tried."""

    open: Callable[[Path, random.Random], AbstractContextManager[Plan]]
    codes: frozenset[int] = frozenset()
    """The documented exit codes of ranks, where there are any beside those of another rank's loss."""
    goes_on: bool = False
    """The run must take it without an end."""
    lacks: Callable[[], str] = lambda: ""
    """Why it can't be tried here; empty if it can."""
    is_launched: bool = False
    """By a launcher of its own, which is hit."""


def of_signal(strike: Callable[[Launch, int], object], *words: str) -> Kind:
    """One that needs nothing prepared."""

    @contextmanager
    def opened(place: Path, chance: random.Random) -> Generator[Plan]:
        yield Plan(strike, words=words)

    return Kind(opened)


def send(number: int) -> Callable[[Launch, int], None]:
    """That signal, to the rank that is hit."""
    return lambda run, hit: os.kill(run.ranks[hit].pid, number)


def terminate_and_kill(run: Launch, hit: int) -> None:
    """As a machine that is taken away: asked to end, and gone a second later."""
    for rank in run.ranks:
        os.kill(rank.pid, signal.SIGTERM)
    time.sleep(1)
    run.kill()


@contextmanager
def full_disk(place: Path, chance: random.Random) -> Generator[Plan]:
    """No byte is left."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place], check=True)
    filler = place / "filler"

    def fill(run: Launch, hit: int) -> None:
        with open(filler, "wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(2**20))
                file.flush()

    try:
        yield Plan(fill, filler.unlink)
    finally:
        subprocess.run(["umount", "-l", place], check=False)


def of_disk(strike: Callable[[failing_disk.FailingDisk, random.Random], object], **more: object) -> Kind:
    """One of the file system that the run folder lies on."""

    @contextmanager
    def opened(place: Path, chance: random.Random) -> Generator[Plan]:
        with failing_disk.FailingDisk(place / "backing", place / "disk") as disk:
            yield Plan(lambda run, hit: strike(disk, chance), disk.work, folder="disk/run")

    return Kind(opened, lacks=failing_disk.is_there, **more)


@contextmanager
def stale_lists(place: Path, chance: random.Random) -> Generator[Plan]:
    """Each rank sees the run folder through a mount of its own, and what others make in it seconds late."""
    with contextlib.ExitStack() as stack:
        folders = [place / "disk", place / "other", place / "third"]
        for folder in folders:
            stack.enter_context(failing_disk.FailingDisk(place / "backing", folder, STALE_SECONDS))
        preparation = Preparation(disks=[str(folder) for folder in folders])
        yield Plan(lambda run, hit: None, preparation=preparation, folder="disk/run")


def of_cable(strike: Callable[[slow_link.SlowLink], object], *words: str, goes_on: bool = False) -> Kind:
    """One of the network between two hosts."""

    @contextmanager
    def opened(place: Path, chance: random.Random) -> Generator[Plan]:
        with slow_link.SlowLink() as link:
            all_words = [f"distributed.interface={slow_link.INTERFACE}", *words]
            yield Plan(lambda run, hit: strike(link), link.work, all_words, Preparation(spaces=link.spaces))

    return Kind(opened, lacks=slow_link.is_there, goes_on=goes_on)


def of_wandb(strike: Callable[[FakeWandb], object]) -> Kind:
    """One of the W&B server."""

    @contextmanager
    def opened(place: Path, chance: random.Random) -> Generator[Plan]:
        server = FakeWandb()
        with contextlib.suppress(OSError), server:
            variables = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40}
            yield Plan(
                lambda run, hit: strike(server), words=["metrics.wandb=online"], preparation=Preparation(variables)
            )

    return Kind(opened, goes_on=True)


def is_ill(server: FakeWandb) -> None:
    """It answers everything by 500."""
    server.failing["*"] = 10**9


def is_slow(server: FakeWandb) -> None:
    """Each answer takes longer than any run."""
    server.delay_seconds = 600.0


def of_clock(seconds: int) -> Kind:
    """The time of day jumps; that of collectives, which no clock sets, goes on."""

    @contextmanager
    def opened(place: Path, chance: random.Random) -> Generator[Plan]:
        clock = place / "clock"
        clock.write_bytes(bytes(8))
        preparation = Preparation({"FAULT_CLOCK": str(clock)})

        def step(run: Launch, hit: int) -> None:
            with open(clock, "r+b", buffering=0) as file:  # the same file, since it is mapped
                file.write(seconds.to_bytes(8, sys.byteorder, signed=True))

        yield Plan(step, preparation=preparation)

    return Kind(opened, goes_on=True, lacks=lacks_compiler)


CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
static long later(void) {
  static volatile long *seconds;
  if (!seconds) {
    const char *path = getenv("FAULT_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return 0;
    void *mapped = mmap(0, sizeof(long), PROT_READ, MAP_SHARED, file, 0);
    if (mapped == MAP_FAILED) return 0;
    seconds = mapped;
  }
  return *seconds;
}
int clock_gettime(clockid_t clock, struct timespec *now) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int code = real(clock, now);
  if (!code && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += later();
  return code;
}
int gettimeofday(struct timeval *now, void *zone) {
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  now->tv_sec = t.tv_sec; now->tv_usec = t.tv_nsec / 1000;
  return 0;
}
time_t time(time_t *now) {
  struct timespec t;
  clock_gettime(CLOCK_REALTIME, &t);
  if (now) *now = t.tv_sec;
  return t.tv_sec;
}
"""
"""Between a process and its time of day, by `FAULT_CLOCK`; libfaketime makes every `time.sleep` of Python 3.11 fail."""


@contextmanager
def settable_clocks(folder: Path) -> Generator[None]:
    """What is started within can have its clock set, where there is a C compiler."""
    if not lacks_compiler():
        library = folder / "clock.so"
        (folder / "clock.c").write_text(CLOCK)
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, folder / "clock.c", "-ldl"], check=True)
        os.environ["LD_PRELOAD"] = str(library)
    yield
    os.environ.pop("LD_PRELOAD", None)


def lacks_compiler() -> str:
    """Why no clock can be set."""
    return "" if shutil.which("cc") else "needs a C compiler"


@contextmanager
def out_of_memory(place: Path, chance: random.Random) -> Generator[Plan]:
    """The kernel kills the rank that its group has no page left for."""
    group = CGROUP / f"spd-faults-{os.getpid()}-{place.name}"
    group.mkdir()

    def cap(run: Launch, hit: int) -> None:
        with contextlib.suppress(OSError):  # a newer kernel moves no charge: what is taken from now on counts alone
            (group / "memory.move_charge_at_immigrate").write_text("1")
        (group / "cgroup.procs").write_text(str(run.ranks[hit].pid))
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and run.ranks[hit].is_alive():
            with contextlib.suppress(OSError):  # busy: the kernel could not take pages back so fast
                (group / "memory.limit_in_bytes").write_text(str(2**20))
            time.sleep(0.05)

    try:
        yield Plan(cap)
    finally:
        deadline = time.monotonic() + 10
        while group.exists() and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                group.rmdir()
            time.sleep(0.05)


def lacks_cgroup() -> str:
    """Why no memory group can be made."""
    group = CGROUP / f"spd-faults-{os.getpid()}-trial"
    try:
        group.mkdir()
        has_limit = (group / "memory.limit_in_bytes").exists()
        group.rmdir()
    except OSError as error:
        return f"needs a memory cgroup of version 1 ({os.strerror(error.errno or errno.EIO)})"
    return "" if has_limit else "needs a memory cgroup of version 1"


def cap_address_space(run: Launch, hit: int) -> None:
    """It gets no more memory than it has."""
    pid = run.ranks[hit].pid
    with contextlib.suppress(OSError):  # it has ended
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        resource.prlimit(pid, resource.RLIMIT_AS, (pages * resource.getpagesize(),) * 2)


@contextmanager
def killed_launcher(place: Path, chance: random.Random) -> Generator[Plan]:
    """The process that started the ranks is gone, and nobody tells them."""
    preparation = Preparation(pids=str(place / "pids"))
    yield Plan(lambda run, hit: run.ranks[0].kill(), preparation=preparation)


def needs_root() -> str:
    """Why nothing can be mounted."""
    return "" if os.geteuid() == 0 else "needs root"


def at_own_rename(disk: failing_disk.FailingDisk, chance: random.Random) -> None:
    """Whoever makes a file whole is killed in front of it."""
    disk.kill("RENAME", "RENAME2", after=chance.randrange(4))


def at_own_write(disk: failing_disk.FailingDisk, chance: random.Random) -> None:
    """Whoever writes is killed in front of it."""
    disk.kill("WRITE", after=chance.randrange(12))


KILLS: dict[str, Kind] = {
    "SIGKILL of one rank": of_signal(lambda run, hit: run.ranks[hit].kill()),
    "SIGKILL of all ranks": of_signal(lambda run, hit: run.kill()),
    "SIGKILL of the launcher": Kind(killed_launcher, is_launched=True),
    "SIGKILL at a rename": of_disk(at_own_rename),
    "SIGKILL at a write": of_disk(at_own_write),
}
OTHERS: dict[str, Kind] = {
    "SIGTERM to one rank": Kind(of_signal(send(signal.SIGTERM)).open, frozenset({75})),
    "SIGSTOP of one rank": of_signal(send(signal.SIGSTOP), *SHORT_TIMEOUT),
    "SIGTERM to all, SIGKILL 1 s later": of_signal(terminate_and_kill),
    "disk full": Kind(full_disk, frozenset({3}), lacks=needs_root),
    "EIO of writes": of_disk(lambda disk, _: disk.fail("EIO", "WRITE", "FSYNC"), codes=frozenset({3})),
    "EIO of a rename": of_disk(
        lambda disk, chance: disk.fail("EIO", "RENAME", "RENAME2", after=chance.randrange(3)), codes=frozenset({3})
    ),
    "ESTALE of all": of_disk(lambda disk, _: disk.fail("ESTALE"), codes=frozenset({1, 3})),
    "disk read-only": of_disk(lambda disk, _: disk.fail("EROFS", *failing_disk.CHANGES), codes=frozenset({3})),
    "stale lists of folders": Kind(stale_lists, goes_on=True, lacks=failing_disk.is_there),
    "clock a day ahead": of_clock(86400),
    "clock an hour back": of_clock(-3600),
    "host cut off": of_cable(lambda link: link.cut(), *SHORT_TIMEOUT),
    "host slow by 200 ms": of_cable(lambda link: link.delay(0.1), goes_on=True),
    "connections reset": of_cable(lambda link: link.reset(), *SHORT_TIMEOUT),
    "W&B down": of_wandb(FakeWandb.refuse),
    "W&B slow": of_wandb(is_slow),
    "W&B answers 500": of_wandb(is_ill),
    "memory of a rank at its end": Kind(out_of_memory, lacks=functools.cache(lacks_cgroup)),
    "no more address space": of_signal(cap_address_space),
}
