"""Two emulated hosts with a real SLURM on them, and what can happen to them: by the scripts in tests/cluster."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent / "cluster"
STATE = Path("/run/spd-cluster")
DONE = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}
ENVIRONMENT = {
    "SLURM_CONF": str(STATE / "slurm.conf"), "SPD_VENV": sys.prefix, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path.cwd()),
    "SLURM_CPU_BIND": "none",  # the nodes say that they have more CPUs than the machine has
    "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}",
}  # fmt: skip
SBATCH = ("--ntasks-per-node=1", "--cpus-per-task=2", "--gpus-per-node=1", "--time=30")


def run_on(host: str, *words: str | Path, check: bool = True, seconds: float = 300, **variables: str) -> str:
    """What a command prints on a host; it must end with 0 if `check`."""
    done = start_on(host, *words, **variables)
    try:
        output, _ = done.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        done.kill()
        output, _ = done.communicate()
        raise AssertionError(f"{words} still ran on {host} after {seconds} s\n{output}") from None
    assert not check or done.returncode == 0, f"{words} ended with {done.returncode} on {host}\n{output}"
    return output


def start_on(host: str, *words: str | Path, **variables: str) -> subprocess.Popen:
    """A command that goes on running on a host."""
    command = [str(HERE / "on.sh"), host, *map(str, words)]
    environment = {**os.environ, **ENVIRONMENT, **variables}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def sbatch(*words: str | Path, **variables: str) -> str:
    """Submit; the job's id."""
    return run_on("node0", "sbatch", "--parsable", *words, **variables).strip()


@dataclass(frozen=True)
class Run:
    """One run folder and the jobs that work in it."""

    folder: Path
    words: tuple[str, ...]

    def arguments(self, *more: str) -> list[str]:
        """The words of spd.py."""
        return [*self.words, f"run_dir={self.folder}", *more]

    def submit(
        self, *options: str, script: str = "slurm/spd.sbatch", more: Sequence[str] = (), **variables: str
    ) -> str:
        """Submit a batch script for it; the job's id."""
        log = f"--output={self.folder.parent}/%x.out"
        return sbatch(*SBATCH, log, *options, script, *self.arguments(*more), **variables)

    def log(self) -> str:
        """What its jobs printed."""
        return "\n".join(file.read_text(errors="replace") for file in sorted(self.folder.parent.glob("*.out")))

    def place(self) -> str:
        """Where its ranks were last seen."""
        beats = self.folder.glob("heartbeat/**/*.json")
        return " | ".join(sorted(json.loads(file.read_text())["place"] for file in beats))

    def metrics(self) -> str:
        """What rank 0 has logged."""
        file = self.folder / "metrics" / "rank_00000.jsonl"
        return file.read_text() if file.exists() else ""

    def has_completions(self) -> bool:
        """Whether a rank has written one."""
        return any(part.stat().st_size for part in self.folder.glob("generate/completions/part-*.jsonl"))

    def checkpoints(self) -> set[Path]:
        """Those of the student that are whole."""
        return {file.parent for file in self.folder.glob("finetune/checkpoints/step_????????/COMPLETE.json")}

    def freeze_when(self, happened: Callable[[], object], seconds: float = 120) -> list[int]:
        """Stop all ranks in the middle of what they do, as soon as something is seen; their pids, for `thaw`."""
        return freeze_when(happened, self.ranks, lambda: f"{self.place()}\n{self.log()}", seconds)

    def ranks(self) -> list[int]:
        """The pids of its ranks, on whichever host, as this machine sees them."""
        return [pid for pid, words in processes() if words[1:3] == ["-u", "launchers/spd.py"] and self._is_mine(words)]

    def _is_mine(self, words: list[str]) -> bool:
        return f"run_dir={self.folder}" in words


def processes() -> list[tuple[int, list[str]]]:
    """Every process and its command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found.append((int(folder.name), (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")))
        except OSError:
            continue  # it has ended meanwhile
    return found


def freeze_when(
    happened: Callable[[], object], ranks: Callable[[], list[int]], told: Callable[[], str], seconds: float = 120
) -> list[int]:
    """Stop these ranks in the middle of what they do, as soon as something is seen; their pids."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, told()
        time.sleep(0.002)
    pids = ranks()
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    assert pids, told()
    return pids


def thaw(pids: Sequence[int]) -> None:
    """Let frozen ranks go on."""
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def states(job: str) -> set[str]:
    """What SLURM says of a job: RUNNING, COMPLETED, ...; of all tasks, if it is an array."""
    return set(re.findall(r"JobState=(\S+)", run_on("node0", "scontrol", "-o", "show", "job", job)))


def described(job: str) -> dict[str, str]:
    """All that SLURM says of a job."""
    words = run_on("node0", "scontrol", "-o", "show", "job", job).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def wait_for(happened: Callable[[], bool], seconds: float, told: Callable[[], str] = str) -> None:
    """Poll until it is true."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, told()
        time.sleep(0.3)


def ended(job: str, expected: str, run: Run, seconds: float = 240) -> None:
    """Wait until a job has ended, and as it should."""
    wait_for(lambda: states(job) <= DONE, seconds, lambda: f"{described(job)}\n{run.log()}")
    assert states(job) == {expected}, f"{described(job)}\n{run.log()}"


def cancel_all() -> None:
    """End every job, so that none is in the way of the next test."""
    run_on("node0", "scancel", "--user=root", check=False)
    wait_for(lambda: not run_on("node0", "squeue", "--noheader", check=False).strip(), 60)


def link(host: str, up: bool) -> None:
    """Plug a host's cable in, or out."""
    run_on(host, "ip", "link", "set", "eth0", "up" if up else "down")
