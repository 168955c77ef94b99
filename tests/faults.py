"""Faults tried for real: `python tests/faults.py --kills 10 --seed 1`; the table of what came of them is its output.

A case is a run of a tiny model that a fault hits at a moment that the seed says. It goes on and ends as an undisturbed
run does; or all its ranks end in bounded time, killed or with a clear error, and the same command on another number of
ranks goes on to that end. Cases that are done are kept in `--state`, so that a long series goes on.
"""

from __future__ import annotations

import argparse
import contextlib
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
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from multiprocessing import forkserver
from pathlib import Path

from fault_kinds import KILLS, OTHERS, TIMEOUT_SECONDS, Kind, Plan, settable_clocks
from launching import SMALL, Launch, results
from safetensors.torch import load_file
from tiny import save_tiny_model

from spd_dist.storage.artifacts import sha256_of

STAGES = ("start", "calibrate", "generate", "finetune", "evaluate")
BOUND_SECONDS = 150.0
"""By then all ranks have ended, or the case counts as a hang; a collective may take `TIMEOUT_SECONDS` of it."""
BOUND_OF_RUN = 300.0
"""The same, of a run that goes on: W&B, which does not answer, may take 30 s at its end."""
RUN_SECONDS = 300
"""An undisturbed run, on a machine that is busy."""
RELATIVE = 1e-5
"""Of losses and of what follows from them, and of the adapter, where the number of ranks changed."""
AFTER_A_LOSS = {0, 1, -9}
"""Exit codes of ranks that lost another, were killed, or were done."""
PREPARED = "tests/fault_launcher.py"
CLEAR = re.compile(r"^error: |A rank that failed or lags is the likely cause|^rank \d+ was at ", re.MULTILINE)


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
    codes: tuple[int | None, ...]
    outcome: str
    """`same`: the run took it; `ended`, `clear error`: so it ended, and went on to the same result; `too late`: the run
    was over before; else what is wrong."""
    wall_seconds: float = 0.0
    """Of the whole case."""


SMALL_FORM = (
    "SIGKILL of one", "SIGKILL of the launcher", "SIGKILL at a rename", "SIGTERM to one", "disk full", "EIO of writes",
    "ESTALE", "stale", "clock a day", "connections",
)  # fmt: skip
"""By their first words: faults of most kinds, without those that only a long wait ends."""
SMALL_SECONDS = 170.0
"""Then the small form begins no case more, so that a busy machine is not held up."""
OF_ONE_RANK = ("SIGKILL of one rank", "SIGSTOP of one rank", "memory of a rank at its end")
"""Faults that leave others, who can say whom they miss."""
GOOD = ("same", "ended", "clear error", "too late")


def main() -> int:
    """Try the cases that are not done yet; 1 if one of all did not end as it must."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing stays mounted
    arguments = parse_arguments()
    done = [Case(**row) for row in read_state(arguments.state)]
    begun = time.monotonic()
    lacking = {name: reason for name, kind in (KILLS | OTHERS).items() if (reason := kind.lacks())}
    wanted = cases(arguments.kills, arguments.others, SMALL_FORM if arguments.small else arguments.faults, lacking)
    if arguments.small:
        wanted = list(enumerate(dict.fromkeys(fault for _, fault in wanted)))
    todo = [one for one in wanted if one[0] not in {case.index for case in done}][: arguments.at_most]
    with tempfile.TemporaryDirectory(prefix="faults-") as name, ThreadPoolExecutor(arguments.jobs) as pool:
        with settable_clocks(Path(name)):
            forkserver.ensure_running()
        series = Series(Path(name), arguments) if todo else None
        lock = threading.Lock()

        def try_one(one: tuple[int, str]) -> None:
            if time.monotonic() - begun > (SMALL_SECONDS if arguments.small else arguments.seconds):
                say(f"not tried, since the time is over: {one[1]}")
                return
            case = series.case(*one)
            with lock:
                done.append(case)
                if arguments.state:
                    with open(arguments.state, "a", encoding="utf-8") as file:
                        file.write(json.dumps(asdict(case)) + "\n")
                say(f"{len(done)} of {len(wanted)}: {case}")

        list(pool.map(try_one, todo))
    done.sort(key=lambda case: case.index)
    text = table(done, lacking)
    say(text)
    wrong = [case for case in done if case.outcome not in GOOD]
    say(f"{len(done)} cases, {len(wrong)} of them wrong, in {time.monotonic() - begun:.0f} s")
    if arguments.out:
        arguments.out.write_text(replaced(arguments.out.read_text(encoding="utf-8"), text), encoding="utf-8")
    return int(bool(wrong))


def say(text: str) -> None:
    """On standard output, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--small", action="store_true", help="a case of each fault that takes no long wait, for three minutes"
    )
    parser.add_argument("--kills", type=int, default=3, help="cases of SIGKILL")
    parser.add_argument("--others", type=int, default=len(OTHERS), help="cases of the other faults")
    parser.add_argument("--faults", nargs="+", default=[], metavar="FAULT", help="these alone, by their first words")
    parser.add_argument("--seed", type=int, default=1, help="of moments and ranks")
    parser.add_argument("--model", default="", help="a model to run instead of a tiny random one")
    parser.add_argument("--patience", type=float, default=1.0, help="by which all bounds of time are longer")
    parser.add_argument("--jobs", type=int, default=1, help="cases at once")
    parser.add_argument("--state", type=Path, help="a file of what is done; a series goes on from it")
    parser.add_argument("--at-most", type=int, metavar="N", help="stop after so many cases")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no case after so many")
    parser.add_argument("--out", type=Path, help="a page whose table is replaced")
    return parser.parse_args()


def cases(num_kills: int, num_others: int, names: Sequence[str], lacking: Iterable[str]) -> list[tuple[int, str]]:
    """Number and fault of each: faults take turns, without those that can't be had here."""
    chosen = []
    for number, kinds in ((num_kills, KILLS), (num_others, OTHERS)):
        able = [one for one in kinds if one not in lacking and (not names or one.startswith(tuple(names)))]
        chosen += [able[index % len(able)] for index in range(number if able else 0)]
    return list(enumerate(chosen))


def read_state(file: Path | None) -> list[dict]:
    """The cases that are done."""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file and file.exists() else []
    return [{**row, "num_ranks": tuple(row["num_ranks"]), "codes": tuple(row["codes"])} for row in rows]


class Series:
    """Cases on one model, against one undisturbed run of it on each number of ranks."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self.folder, self.seed, self.patience = folder, arguments.seed, arguments.patience
        model = arguments.model or save_tiny_model(folder / "model")
        self.words = [f"model.name={model}", *SMALL, "evaluate.arms=[base,spd]"]
        self.lock = threading.Lock()
        self.undisturbed: dict[int, Path] = {}
        self.expected = found_in(self.whole(1))
        self.num_lines = next(n for n, line in enumerate(lines_of(folder / "whole-1.log")) if "2 arms, greedy" in line)

    def whole(self, num_ranks: int) -> Path:
        """An undisturbed run."""
        with self.lock:
            run = self.folder / f"whole-{num_ranks}"
            if num_ranks not in self.undisturbed:
                log = run.with_suffix(".log")
                codes = Launch(num_ranks, [*self.words, f"run_dir={run}"], log).wait(RUN_SECONDS * self.patience)
                assert codes == [0] * num_ranks, log.read_text()
                self.undisturbed[num_ranks] = run
            return self.undisturbed[num_ranks]

    def case(self, index: int, fault: str) -> Case:
        """Try the fault; the seed and the number say all else about it."""
        chance = random.Random(f"{self.seed}-{index}")
        kind, begun = (KILLS | OTHERS)[fault], time.monotonic()
        before, after = chance.choice([1, 2, 3] if fault in KILLS else [2, 3]), chance.choice([1, 2, 3])
        hit, line, more_seconds = chance.randrange(before), chance.randrange(self.num_lines), chance.uniform(0, 1)
        place = self.folder / f"case-{index}"
        place.mkdir()
        try:
            with kind.open(place, chance) as plan:
                run = self.start(kind, plan, place, before)
                wait_for_line(run, line, more_seconds, BOUND_SECONDS * self.patience)
                is_over = not all(rank.is_alive() for rank in run.ranks)
                stage = stage_of(run.log)
                struck = time.monotonic()
                plan.strike(run, hit)
                bound = self.patience * (BOUND_OF_RUN if kind.goes_on else BOUND_SECONDS)
                codes = ended(run, ranks_of_launcher(place), bound)
                seconds = time.monotonic() - struck
                plan.undo()
                said = run.output()
                names_rank = f"rank {hit} on " in said or f"(on rank {hit}," in said
                outcome = how_it_ended(kind, codes, said)
                if outcome != "same" and "wrong" not in outcome:
                    again = self.start(replace(kind, is_launched=False), plan, place, after)
                    outcome = self.compared(again, place / plan.folder, outcome, before, after)
                elif outcome == "same":
                    outcome = self.difference(place / plan.folder, before, before) or "same"
            outcome = "too late" if is_over and outcome in GOOD else outcome
            return Case(
                index, fault, stage, (before, after), round(seconds, 1), names_rank, tuple(codes), outcome,
                round(time.monotonic() - begun, 1),
            )  # fmt: skip
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def start(self, kind: Kind, plan: Plan, place: Path, num_ranks: int) -> Launch:
        """The run, or that run again, with what the fault needs prepared."""
        given = [word for word in plan.words if word.startswith("distributed.timeout_seconds=")]
        timeout = [] if given else [f"distributed.timeout_seconds={TIMEOUT_SECONDS}"]
        words = [*self.words, *timeout, *plan.words, f"run_dir={place / plan.folder}"]
        log = self.folder / f"{place.name}-{len(list(self.folder.glob(f'{place.name}-*.log')))}.log"
        if plan.preparation is None:
            return Launch(num_ranks, words, log)
        prepared = replace(plan.preparation, num_ranks=num_ranks)
        if not kind.is_launched:
            prepared = replace(prepared, pids="")
        file = prepared.write(place / f"{log.stem}.json")
        return Launch(1 if kind.is_launched else num_ranks, [file, *words], log, PREPARED)

    def compared(self, again: Launch, run: Path, outcome: str, before: int, after: int) -> str:
        """`outcome`, or how the run that went on differs from the undisturbed one."""
        try:
            codes = again.wait(RUN_SECONDS * self.patience)
        except AssertionError as error:
            return f"wrong: started again, it hangs: {str(error)[-300:]}"
        if any(codes):
            return f"wrong: started again, it ended with {codes}: {again.output()[-300:]}"
        return self.difference(run, before, after) or outcome

    def difference(self, run: Path, before: int, after: int) -> str:
        """How its results differ from the undisturbed ones; empty if they do not."""
        found = unequal(found_in(run), self.expected)
        if before == after and sha256_of(adapter(run)) != sha256_of(adapter(self.whole(before))):
            found.append("the adapter is not the same to the byte, though the number of ranks is")
        relative = distance(adapter(run), adapter(self.whole(1)))
        if relative > RELATIVE:
            found.append(f"the adapter is {relative:.1e} away from that of one rank")
        return f"wrong: {'; '.join(found)[:500]}" if found else ""


def found_in(run: Path) -> dict[str, object]:
    """What must be the same to the byte, and the numbers of the report."""
    return results(run) | {"subspace": sha256_of(run / "project" / "subspace.safetensors")}


def adapter(run: Path) -> Path:
    """The trained weights' file."""
    (file,) = (run / "finetune" / "adapter").glob("*.safetensors")
    return file


def distance(one: Path, other: Path) -> float:
    """Between the weights of two files, by the length of the second's."""
    first, second = load_file(one), load_file(other)
    squares = sum(float((first[name] - second[name]).double().square().sum()) for name in second)
    return math.sqrt(squares / sum(float(tensor.double().square().sum()) for tensor in second.values()))


def lines_of(log: Path) -> list[str]:
    """What was printed so far."""
    return log.read_text(errors="replace").splitlines() if log.exists() else []


def wait_for_line(run: Launch, number: int, seconds: float, bound: float) -> None:
    """Until that many lines were printed, and `seconds` more: a moment that a slow machine meets, too."""
    deadline = time.monotonic() + bound
    while len(lines_of(run.log)) <= number and time.monotonic() < deadline and any(r.is_alive() for r in run.ranks):
        time.sleep(0.02)
    time.sleep(seconds)


def ranks_of_launcher(place: Path) -> list[int]:
    """Ranks that are no children of ours, by their numbers."""
    file = place / "pids"
    return json.loads(file.read_text()) if file.exists() else []


def ended(run: Launch, others: Sequence[int], bound: float) -> list[int | None]:
    """The exit codes of all ranks; None of one that still ran at the end of the bound, unless it is held by SIGSTOP."""
    deadline = time.monotonic() + bound
    for rank in run.ranks:
        while rank.is_alive() and time.monotonic() < deadline and not is_stopped(rank.pid):
            rank.join(0.1)
    while any(map(is_running, others)) and time.monotonic() < deadline:
        time.sleep(0.1)
    codes = [None if rank.is_alive() and not is_stopped(rank.pid) else rank.exitcode or 0 for rank in run.ranks]
    codes += [None for pid in others if is_running(pid)]
    run.kill()
    for pid in filter(is_running, others):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, 9)
    return codes


def state_of(pid: int) -> str:
    """A letter, as /proc has it; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def is_stopped(pid: int) -> bool:
    """Whether it is held by SIGSTOP."""
    return state_of(pid) == "T"


def is_running(pid: int) -> bool:
    """Whether it has not ended."""
    return state_of(pid) not in ("", "Z")


def how_it_ended(kind: Kind, codes: Sequence[int | None], said: str) -> str:
    """`same` if it did not, `ended` if it was only killed, `clear error`, or what is wrong with how it ended."""
    if None in codes:
        return f"wrong: a rank still ran after the bound: {codes}"
    if not any(codes) and "Traceback" not in said:
        return "same"
    if kind.goes_on:
        return f"wrong: it ended with {codes}: {said[-300:]}"
    if kind.codes and not set(codes) <= kind.codes | AFTER_A_LOSS:
        return f"wrong: exit codes {codes}, not {sorted(kind.codes)}"
    if all(code in (0, -9) for code in codes):
        return "ended"
    return "clear error" if CLEAR.search(said) else f"wrong: no clear error: {said[-300:]}"


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


def table(done: Sequence[Case], lacking: dict[str, str]) -> str:
    """What was tried and what came of it, as Markdown."""
    tried = [case for case in done if case.outcome != "too late"]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    lines = [
        f"{datetime.now(UTC):%Y-%m-%d}, commit {commit.strip() or 'unknown'}, {len(tried)} cases; "
        f"the driver with `{' '.join(sys.argv[1:])}`. A cell: tried / ended in the same results / said why it ended.",
        "",
        "| fault | " + " | ".join(STAGES) + " | all | s until all had ended, median and most |",
        "|---|" + "--:|" * (len(STAGES) + 2),
    ]
    for fault in [name for name in KILLS | OTHERS if any(case.fault == name for case in tried)]:
        own = [case for case in tried if case.fault == fault]
        cells = [cell([case for case in own if case.stage == stage]) for stage in STAGES]
        seconds = sorted(case.seconds for case in own)
        lines.append(f"| {fault} | {' | '.join([*cells, cell(own)])} | {seconds[len(seconds) // 2]}, {seconds[-1]} |")
    named = [case.names_rank for case in tried if case.fault in OF_ONE_RANK and len({*case.codes}) > 1]
    if named:
        lines += ["", f"Where one rank was hit, the others named it in {sum(named)} of {len(named)} cases."]
    lines += ["", *(f"- not tried here: {name} {reason}" for name, reason in lacking.items())]
    lines += [f"- case {case.index}, {case.fault}: {case.outcome}" for case in tried if case.outcome not in GOOD]
    return "\n".join(lines).strip()


def cell(own: Sequence[Case]) -> str:
    """Tried, the same in the end, of these with a clear error."""
    same = sum(case.outcome in GOOD for case in own)
    return f"{len(own)} / {same} / {sum(case.outcome == 'clear error' for case in own)}" if own else "-"


BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"


def replaced(page: str, text: str) -> str:
    """The page with the table between its marks."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    sys.exit(main())
