"""Words and run folders that nobody meant: each launcher ends with a documented code, and never with a traceback.

SPD_FUZZ_SECONDS sets the time of each test, SPD_FUZZ_SEED what is drawn. A fault of a run ends this process.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from launching import SETTINGS, SMALL
from tiny import save_tiny_model

from spd_dist.launch import LAUNCHERS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

SECONDS = float(os.environ.get("SPD_FUZZ_SECONDS", "60"))
SEED = int(os.environ.get("SPD_FUZZ_SEED", "0"))
CODES = {0, 1, 2, 3, 75}
WRONG = [None, -1, 1e308, "", [], {}, "../../x", True, "a" * 300, 10**30]
WORDS = [
    "--help", "--config", "--num", "3", "-1", "0", "x", "--json", "--out", "data.task=gsm8k", "data.task=no", "a=b",
    "=", "--", "", "💥", "../..", "finetune", "--dry-run", "--list", "--seed", "1e9", "nan", "model.name=",
    "run_dir=/proc/x", "evaluate.arms=[", "evaluate.arms=[a", "project.rank=-1", "seed=x", "--until", "--from",
    "--restart-from",
    "calibrate", "--show-config", "--task", "--tasks", "--adapter", "--base", "--form", "folded", "--nodes",
    "--sbatch=--x", "stats", "show", "diff", "export", "plan", "status", "collect", "words", "fused", "stages", "array",
    "experiment", "chain", "o/n", "adapter", "--public", "--against", "--png", "/dev/null", "/", "~nobody/x", "\x00",
    "a\nb", "--model-config", "--gpu", "H100", "--array", "0-3%2", "--preview-masks", "--preview-scoring", "--power",
    "--pilot", "nothing.yaml",
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("policy") / "model")


@pytest.fixture(scope="module")
def words(model) -> list[str]:
    config = str(Path("configs/quickstart.yaml").resolve())
    few = ["data.num_train=4", "data.num_test=3", "evaluate.arms=[base,spd]", "finetune.num_epochs=1"]
    return ["--config", config, f"model.name={model}", *SMALL, *SETTINGS, *few, "mechanism.in_run=false"]


@pytest.fixture(scope="module")
def run(words, tmp_path_factory) -> Path:
    """A finished one."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    code, printed = exit_of("run", [*words, f"run_dir={folder}"])
    assert code == 0, printed
    return folder


@pytest.fixture(autouse=True)
def nowhere(monkeypatch, tmp_path):
    """Whatever a launcher writes by default goes there, and nothing to a hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("WANDB_MODE", "disabled")


def exit_of(name: str, words: Sequence[str]) -> tuple[int, str]:
    """The exit code of a launcher in this process, and what it printed."""
    module, _, function = LAUNCHERS[name].partition(":")
    main = getattr(importlib.import_module(f"spd_dist.launch.{module}"), function)
    printed = io.StringIO()
    sys.argv = [f"spd {name}", *words]
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            code = main(list(words))
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return code, printed.getvalue()


def spoil(file: Path, chance: random.Random) -> None:
    """Cut it, change bytes or values, put something else there, or remove it."""
    text = file.read_bytes()
    lines = text.split(b"\n") if file.suffix == ".jsonl" else [text]
    kinds: list[Callable[[], bytes]] = [
        lambda: text[: chance.randrange(len(text) + 1)],
        lambda: bytes(chance.randrange(256) if chance.random() < 0.01 else byte for byte in text),
        lambda: json.dumps(chance.choice([*WRONG, [[]], {"": None}])).encode(),
        lambda: b"\n".join([json.dumps(with_wrong_value(json.loads(lines[0]), chance)).encode(), *lines[1:]]),
        lambda: chance.randbytes(chance.randrange(200)),
    ]
    try:
        file.write_bytes(chance.choice(kinds)())
    except ValueError:  # it is no JSON
        file.unlink()


def with_wrong_value(value: object, chance: random.Random) -> object:
    """JSON with a wrong value somewhere, or without one."""
    if isinstance(value, dict) and value:
        key = chance.choice(sorted(value))
        if chance.random() < 0.2:
            return {name: held for name, held in value.items() if name != key}
        return value | {key: with_wrong_value(value[key], chance)}
    if isinstance(value, list) and value:
        place = chance.randrange(len(value))
        return [*value[:place], with_wrong_value(value[place], chance), *value[place + 1 :]]
    return chance.choice(WRONG)


def wrong_files(run: Path, folder: Path, chance: random.Random) -> list[str]:
    """Make `folder` a copy of `run` with wrong files; their names."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run, folder)
    small = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.stat().st_size < 2**22]
    chosen = chance.sample(small, chance.randrange(1, 4))
    for file in chosen:
        spoil(file, chance)
    return [str(file.relative_to(folder)) for file in chosen]


def rounds() -> Iterator[random.Random]:
    end, number = time.monotonic() + SECONDS, 0
    while time.monotonic() < end:
        yield random.Random(f"{SEED} {number}")
        number += 1


def check(name: str, words: Sequence[str], files: object) -> None:
    """No traceback, printed or raised; a code that is documented, with a sentence where it is an error."""
    try:
        code, printed = exit_of(name, words)
    except Exception as error:
        raise AssertionError(f"{name} {words} {files}") from error
    assert code in CODES, (name, words, files, code)
    assert "Traceback" not in printed, (name, words, files, printed)
    has_sentence = "error:" in printed or "stopped" in printed or (name, code) == ("wandb_sync", 1)
    assert code == 0 or has_sentence, (name, words, files, code, printed)


def test_words():
    names = sorted(set(LAUNCHERS) - {"doctor"})  # which tries the machine whatever it is asked
    for chance in rounds():
        check(chance.choice(names), chance.choices(WORDS, k=chance.randrange(1, 6)), None)


def test_what_reads_a_run_folder(run, model, tmp_path):
    folder, out = tmp_path / "run", tmp_path / "out"
    given, config = str(folder), ["--config", str(folder / "config.yaml")]
    calls = [
        ("report", [given]), ("report", [given, "--against", str(run)]), ("compare", [given, str(run)]),
        ("corpus", ["stats", given]), ("corpus", ["show", given, "--num", "2"]), ("corpus", ["diff", given, str(run)]),
        ("corpus", ["export", given]), ("export", [given, "--base", str(model), "--out", str(out)]),
        ("export", [given, "--base", str(model), "--out", str(out), "--form", "adapter", "--no-check"]),
        ("push", [given, "adapter", "o/n", "--attempts=1"]), ("push", [given, "subspace", "o/n", "--attempts=1"]),
        ("push", [given, "corpus", "o/n", "--attempts=1"]), ("wandb_sync", [given, "--dry-run"]),
        ("run", [*config, "--show-config"]), ("plan", config), ("experiment", [*config, "--list"]),
    ]  # fmt: skip
    for chance in rounds():
        files = wrong_files(run, folder, chance)
        shutil.rmtree(out, ignore_errors=True)
        check(*chance.choice(calls), files)


def test_a_run_that_goes_on_in_a_spoilt_folder(run, words, tmp_path):
    for chance in rounds():
        files = wrong_files(run, tmp_path / "run", chance)
        check("run", [*words, f"run_dir={tmp_path / 'run'}"], files)
