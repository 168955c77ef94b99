"""Start `launchers/spd.py` on several ranks, as a launcher would: real processes, ports, signals and exit codes.

They are forked from the server of `ranks`, so that a launch takes a second and not the ten of its imports.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import ranks  # noqa: F401 - sets up the fork server

from spd_dist.storage.artifacts import read_json

SETTINGS = ["metrics.wandb=disabled", "distributed.timeout_seconds=60", "distributed.threads=1"]

SMALL = [
    "data.num_train=10", "data.num_test=6", "calibrate.num_examples=7", "calibrate.num_shards=4",
    "calibrate.batch_size=2", "generate.max_new_tokens=12", "finetune.learning_rate=1e-3", "finetune.num_epochs=2",
    "finetune.global_batch_size=4", "finetune.micro_batch_size=1", "finetune.max_tokens=400",
    "finetune.checkpoint_every=1", "evaluate.max_new_tokens=8",
]  # fmt: skip
"""A run of seconds: seven calibration examples on four shards, ten prompts, six test problems."""

BRIEF = [*SMALL, "finetune.num_epochs=1"]
"""The same with half of the training, which takes most of its time: three steps of each student."""

VARY = {"cost", "seconds", "tokens_per_second", "num_new_tokens", "hook_calls", "leakage", "batch_size"}
"""Of the report: times, and what is counted of the last attempt only."""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def results(run: Path) -> dict[str, object]:
    """What must not depend on ranks or kills: corpus, tokens, answers to the byte, and every number of the report."""
    files = [*run.glob("**/completions.jsonl"), *run.glob("evaluate/*/*.jsonl")]
    texts = {str(file.relative_to(run)): file.read_text() for file in files}
    effects = {f"token effects of {file.stem}": tokens(file) for file in run.glob("token_effects/*.jsonl")}
    return {"report": without(read_json(run / "report.json"), VARY), **texts, **effects}


def tokens(file: Path) -> list[list[object]]:
    """What the projection changes, each token with its likelihoods: to a digit that rounding does not reach."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    pairs = [zip(one["pieces"], one["base_nll"], one["projected_nll"], strict=True) for one in lines]
    return [
        [one["id"], *([piece, round(a, 1), round(b, 1)] for piece, a, b in rows)]
        for one, rows in zip(lines, pairs, strict=True)
    ]


def without(value: object, names: set[str]) -> object:
    if isinstance(value, dict):
        return {key: without(item, names) for key, item in value.items() if key not in names}
    return [without(item, names) for item in value] if isinstance(value, list) else value


def differences(found: object, expected: object, place: str = "") -> list[str]:
    """Where two results differ, and how: a failure names the number, not the report that holds it."""
    if not (isinstance(found, dict) and isinstance(expected, dict)):
        return [] if found == expected else [f"{place}: {found!r}, not {expected!r}"]
    pairs = {key: (found.get(key, "absent"), expected.get(key, "absent")) for key in found.keys() | expected.keys()}
    return [line for key, pair in sorted(pairs.items()) for line in differences(*pair, f"{place}/{key}")]


class Launch:
    """The ranks of one run."""

    def __init__(
        self, world_size: int, words: Sequence[str], log: Path, launcher: str = "launchers/spd.py", **variables: str
    ) -> None:
        """Start them; `variables` of the environment win over those that a launcher sets."""
        variables = {"MASTER_PORT": str(free_port())} | variables
        given = {word.partition("=")[0] for word in words}
        settings = [setting for setting in SETTINGS if setting.partition("=")[0] not in given]
        context = multiprocessing.get_context("forkserver")
        arguments = [(rank, world_size, variables, launcher, [*words, *settings], log) for rank in range(world_size)]
        self.log = log
        self.ranks = [context.Process(target=_launch, args=args) for args in arguments]
        for rank in self.ranks:
            rank.start()

    def wait(self, seconds: float = 120) -> list[int]:
        """The exit codes of all ranks; fails if one of them still runs after `seconds`."""
        deadline = time.monotonic() + seconds
        for rank in self.ranks:
            rank.join(max(0.0, deadline - time.monotonic()))
        codes = [rank.exitcode for rank in self.ranks]
        self.kill()
        assert None not in codes, f"ranks still ran after {seconds} s: {codes}\n{self.output()}"
        return codes

    def kill(self) -> None:
        """SIGKILL to every rank: no handler runs, no file is finished."""
        for rank in self.ranks:
            rank.kill()
            rank.join()

    def when(self, happened: Callable[[], bool], action: Callable[[], None], seconds: float = 180) -> None:
        """Wait for something to be seen on disk, then act."""

        def seen() -> bool:
            try:
                return happened()
            except FileNotFoundError:  # a run in motion renames and removes what a walk had listed
                return False

        deadline = time.monotonic() + seconds
        while not seen():
            assert any(rank.is_alive() for rank in self.ranks), self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.002)
        action()

    def kill_when(self, happened: Callable[[], bool], seconds: float = 180) -> None:
        """Wait for something to be seen on disk, then kill."""
        self.when(happened, self.kill, seconds)

    def output(self) -> str:
        """What all ranks printed."""
        return self.log.read_text(errors="replace")


def launch(
    world_size: int,
    words: Sequence[str],
    log: Path,
    *,
    code: int = 0,
    launcher: str = "launchers/spd.py",
    **variables: str,
) -> str:
    """Run to the end, expect every rank to exit with `code`, and give what was printed."""
    started = Launch(world_size, words, log, launcher, **variables)
    codes = started.wait()
    assert codes == [code] * world_size, f"{codes}\n{started.output()}"
    return started.output()


def _launch(rank: int, world_size: int, variables: dict[str, str], launcher: str, words: list[str], log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {name: str(value) for name, value in place.items()} | variables
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal, wherever the tests run
    sys.argv = [launcher, *words]
    sys.path.insert(0, str(Path(launcher).parent))  # as for a script
    runpy.run_path(launcher, run_name="__main__")
