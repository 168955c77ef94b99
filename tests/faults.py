"""Faults tried for real: `python tests/faults.py --kills 10 --seed 1`; the table of what came of them is its output.

A case is a run of a tiny model that a fault hits at a moment that the seed says, and that is then started again on
another number of ranks. It must end as an undisturbed run does, and what the fault ended must have ended in bounded
time, with a documented exit code or killed. Cases that are done are kept in `--state`, so that a long series goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from launching import SMALL, Launch, results
from tiny import save_tiny_model

STAGES = ("start", "calibrate", "generate", "finetune", "evaluate")
KILLS = ("SIGKILL of one rank", "SIGKILL of all ranks")
OTHERS = ("SIGTERM to one rank", "SIGSTOP of one rank", "disk full")
BOUND_SECONDS = 150.0
"""By then all ranks have ended, or the case counts as a hang; a collective may take `TIMEOUT_SECONDS` of it."""
TIMEOUT_SECONDS = 60
RELATIVE = 1e-5
"""Of losses and of what follows from them, where the number of ranks changed."""
DOCUMENTED = {"SIGTERM to one rank": {75}, "disk full": {3}}


@dataclass(frozen=True)
class Case:
    """What became of one fault."""

    index: int
    fault: str
    stage: str
    num_ranks: tuple[int, int]
    """Before and after."""
    seconds: float
    """From the fault until all ranks had ended."""
    names_rank: bool
    """Whether the ranks that were left named the one that was hit."""
    codes: tuple[int, ...]
    outcome: str
    """`same`, or what is wrong; `too late` where the run had ended before the fault."""


def main() -> int:
    """Try the cases that are not done yet; 1 if one of all did not end as it must."""
    arguments = parse_arguments()
    done = [Case(**row) for row in read_state(arguments.state)]
    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        folder = Path(name)
        series = Series(folder, arguments.seed)
        for index in range(arguments.kills + arguments.others):
            if index in {case.index for case in done}:
                continue
            done.append(series.case(index, KILLS if index < arguments.kills else OTHERS))
            if arguments.state:
                with open(arguments.state, "a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(done[-1])) + "\n")
            say(f"{index + 1} of {arguments.kills + arguments.others}: {done[-1]}")
    text = table(done)
    say(text)
    if arguments.out:
        arguments.out.write_text(replaced(arguments.out.read_text(encoding="utf-8"), text), encoding="utf-8")
    return int(any(case.outcome not in ("same", "too late") for case in done))


def say(text: str) -> None:
    """On standard output, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3, help="cases of SIGKILL")
    parser.add_argument("--others", type=int, default=4, help="cases of the other faults")
    parser.add_argument("--seed", type=int, default=1, help="of faults, moments and ranks")
    parser.add_argument("--state", type=Path, help="a file of what is done; a series goes on from it")
    parser.add_argument("--out", type=Path, help="a page whose table is replaced")
    return parser.parse_args()


def read_state(file: Path | None) -> list[dict]:
    """The cases that are done."""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file and file.exists() else []
    return [{**row, "num_ranks": tuple(row["num_ranks"]), "codes": tuple(row["codes"])} for row in rows]


class Series:
    """Cases on one model, against one undisturbed run of it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.words = [f"model.name={save_tiny_model(folder / 'model')}", *SMALL,
                      f"distributed.timeout_seconds={TIMEOUT_SECONDS}", "evaluate.arms=[base,spd]"]  # fmt: skip
        whole = folder / "whole"
        codes = Launch(1, [*self.words, f"run_dir={whole}"], folder / "whole.log").wait(300)
        assert codes == [0], (folder / "whole.log").read_text()
        self.expected = results(whole)
        self.num_lines = next(n for n, line in enumerate(lines_of(folder / "whole.log")) if "2 arms, greedy" in line)

    def case(self, index: int, faults: Sequence[str]) -> Case:
        """Try the fault of this number; the seed and the number say all about it."""
        chance = random.Random(f"{self.seed}-{index}")
        fault = faults[index % len(faults)]
        before, after = chance.choice([2, 3]), chance.choice([1, 2, 3])
        hit = chance.randrange(before)
        place = self.folder / f"case-{index}"
        place.mkdir()
        on_disk = fault == "disk full"
        if on_disk:
            mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", place)
        try:
            words = [*self.words, f"run_dir={place / 'run'}"]
            log = self.folder / f"case-{index}.log"
            run = Launch(before, words, log)
            moment = chance.randrange(self.num_lines), chance.uniform(0, 1)
            wait_for_line(run, *moment)
            is_over = not all(rank.is_alive() for rank in run.ranks)
            stage = stage_of(log)
            begun = time.monotonic()
            undo = inject(fault, run, hit, place)
            codes = ended(run)
            seconds = time.monotonic() - begun
            undo()
            names_rank = f"rank {hit} on " in log.read_text(errors="replace") or f"(on rank {hit}," in log.read_text()
            wrong = "" if is_over else wrong_end(fault, codes)
            again = Launch(after, words, self.folder / f"case-{index}-again.log")
            outcome = wrong or self.compared(again.wait(300), again, place / "run")
            outcome = "too late" if is_over and outcome == "same" else outcome
            return Case(index, fault, stage, (before, after), round(seconds, 1), names_rank, tuple(codes), outcome)
        finally:
            if on_disk:
                subprocess.run(["umount", "-l", str(place)], check=False)
            shutil.rmtree(place, ignore_errors=True)

    def compared(self, codes: Sequence[int], again: Launch, run: Path) -> str:
        """`same`, or how the run that went on differs from the undisturbed one."""
        if any(codes):
            return f"started again, it ended with {codes}: {again.output()[-300:]}"
        return "; ".join(unequal(results(run), self.expected))[:500] or "same"


def lines_of(log: Path) -> list[str]:
    """What was printed so far."""
    return log.read_text(errors="replace").splitlines() if log.exists() else []


def wait_for_line(run: Launch, number: int, seconds: float) -> None:
    """Until that many lines were printed, and `seconds` more: a moment that a slow machine meets, too."""
    deadline = time.monotonic() + BOUND_SECONDS
    while len(lines_of(run.log)) <= number and time.monotonic() < deadline and any(r.is_alive() for r in run.ranks):
        time.sleep(0.02)
    time.sleep(seconds)


def mount(*words: object) -> None:
    """As root."""
    subprocess.run(["mount", *map(str, words)], check=True)


def inject(fault: str, run: Launch, hit: int, place: Path) -> Callable[[], None]:
    """Let it happen; gives what undoes it before the run is started again."""
    process = run.ranks[hit]
    if fault == "SIGKILL of all ranks":
        run.kill()
    elif fault == "SIGKILL of one rank":
        process.kill()
    elif fault == "SIGTERM to one rank":
        os.kill(process.pid, signal.SIGTERM)
    elif fault == "SIGSTOP of one rank":
        os.kill(process.pid, signal.SIGSTOP)
    else:
        filler = place / "filler"
        with open(filler, "wb") as file:
            try:
                while True:
                    file.write(bytes(2**20))
                    file.flush()
            except OSError:
                pass
        return filler.unlink
    return lambda: None


def ended(run: Launch) -> list[int | None]:
    """The exit codes of all ranks; None of one that still ran at the end of the bound, unless it is held by SIGSTOP."""
    deadline = time.monotonic() + BOUND_SECONDS
    for rank in run.ranks:
        while rank.is_alive() and time.monotonic() < deadline and not is_stopped(rank.pid):
            rank.join(0.2)
    codes = [None if rank.is_alive() and not is_stopped(rank.pid) else rank.exitcode or 0 for rank in run.ranks]
    run.kill()
    return codes


def is_stopped(pid: int) -> bool:
    """Whether it is held by SIGSTOP."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def wrong_end(fault: str, codes: Sequence[int | None]) -> str:
    """What is wrong with how the ranks ended."""
    if None in codes:
        return f"a rank still ran after {BOUND_SECONDS:.0f} s: {codes}"
    allowed = DOCUMENTED.get(fault)
    return f"exit codes {codes}, not {allowed}" if allowed and not set(codes) <= allowed | {0} else ""


def stage_of(log: Path) -> str:
    """The stage that had begun last."""
    said = log.read_text(errors="replace") if log.exists() else ""
    begun = re.findall(r"(\w+): (?:starts|goes on)", said)
    return begun[-1] if begun and begun[-1] in STAGES else STAGES[0]


def unequal(found: object, expected: object, place: str = "") -> list[str]:
    """Where two results differ: texts by a byte, numbers by more than `RELATIVE`."""
    if isinstance(found, dict) and isinstance(expected, dict):
        keys = sorted(found.keys() | expected.keys())
        return [line for key in keys for line in unequal(found.get(key), expected.get(key), f"{place}/{key}")]
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        pairs = enumerate(zip(found, expected, strict=True))
        return [line for index, pair in pairs for line in unequal(*pair, f"{place}/{index}")]
    if isinstance(found, float) and isinstance(expected, float):
        return (
            [] if math.isclose(found, expected, rel_tol=RELATIVE, abs_tol=1e-9) else [f"{place}: {found}, {expected}"]
        )
    return [] if found == expected else [f"{place}: {str(found)[:80]}, not {str(expected)[:80]}"]


def table(cases: Sequence[Case]) -> str:
    """What was tried and what came of it, as Markdown."""
    tried = [case for case in cases if case.outcome != "too late"]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d}, commit {commit.strip() or 'unknown'}, {len(tried)} cases; "
        f"the driver with {' '.join(sys.argv[1:])}",
        "",
        "| fault | " + " | ".join(STAGES) + " | all same | s until all had ended, median and most |",
        "|---|" + "--:|" * (len(STAGES) + 2),
    ]
    for fault in dict.fromkeys(case.fault for case in tried):
        own = [case for case in tried if case.fault == fault]
        cells = []
        for stage in STAGES:
            there = [case for case in own if case.stage == stage]
            same = sum(case.outcome == "same" for case in there)
            cells.append(f"{same} of {len(there)}" if there else "-")
        seconds = sorted(case.seconds for case in own)
        same = sum(case.outcome == "same" for case in own)
        lines.append(
            f"| {fault} | {' | '.join(cells)} | {same} of {len(own)} | {seconds[len(seconds) // 2]}, {seconds[-1]} |"
        )
    lines += [f"- case {case.index}, {case.fault}: {case.outcome}" for case in tried if case.outcome != "same"]
    return "\n".join(lines)


BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"


def replaced(page: str, text: str) -> str:
    """The page with the table between its marks."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    sys.exit(main())
