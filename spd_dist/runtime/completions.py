"""A corpus on disk: parts that workers append to, and the one file that they become.

A line is a completion. Its key is (prompt id, sample); whichever worker of whichever attempt wrote it, its content is
the same, so that a corpus is a set of lines and the merged file has one canonical order.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spd_dist.errors import DataError
from spd_dist.runtime.artifacts import write_text
from spd_dist.runtime.jsonl import read_jsonl
from spd_dist.types import Completion

MERGED = "completions.jsonl"
Key = tuple[str, int]


def part_name(worker: int, num_workers: int, *, task: int = 0, num_tasks: int = 1) -> str:
    """The file that one worker appends to; no other worker of any task that runs at the same time has it."""
    part = f"part-{worker:05d}-of-{num_workers:05d}.jsonl"
    return part if num_tasks == 1 else f"task-{task:05d}-of-{num_tasks:05d}.{part}"


def parts(folder: Path) -> list[Path]:
    """All parts, of any attempt and world size, in the order of their names."""
    return sorted([*folder.glob("part-*.jsonl"), *folder.glob("task-*.jsonl")])


def read_completions(path: Path) -> list[Completion]:
    """The completions of a file, or of all files of a folder; a torn last line is none.

    Raises:
        DataError: the path is missing, or a line is not a completion.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    return [_completion(file, number, row) for file in files for number, row in enumerate(read_jsonl(file), 1)]


def gather_parts(folder: Path) -> list[Completion]:
    """Every line there is, while other tasks may merge: parts first, then the file that replaces them."""
    found: list[Completion] = []
    for file in [*parts(folder), folder / MERGED]:
        if file.exists():
            found += _read_if_there(file)
    return found


def without_repeats(completions: Iterable[Completion]) -> dict[Key, Completion]:
    """By key. Workers that share a folder by mistake may have made one twice; it must then be the same.

    Raises:
        DataError: two that differ.
    """
    by_key: dict[Key, Completion] = {}
    for completion in completions:
        key = (completion.id, completion.sample)
        if by_key.setdefault(key, completion) != completion:
            raise DataError(
                f"two completions of prompt {completion.id!r}, sample {completion.sample}, differ: these are parts of "
                "two settings or kinds of machine; delete generate/ and start the same command again"
            )
    return by_key


def write_merged(folder: Path, completions: Sequence[Completion]) -> Path:
    """Write the corpus in the order given, then remove the parts."""
    path = folder / MERGED
    write_text(path, "".join(json.dumps(as_row(completion), ensure_ascii=False) + "\n" for completion in completions))
    for part in parts(folder):
        part.unlink(missing_ok=True)
    return path


def as_row(completion: Completion) -> dict[str, Any]:
    """The line of a completion, as plain data."""
    return dataclasses.asdict(completion)


def _completion(file: Path, number: int, row: Mapping[str, Any]) -> Completion:
    names = {field.name for field in dataclasses.fields(Completion)}
    if row.keys() != names:
        wrong = ", ".join(sorted(row.keys() ^ names))
        raise DataError(f"{file}, line {number}: not a completion ({wrong} missing or unknown); delete that file")
    return Completion(**{**row, "prompt_tokens": tuple(row["prompt_tokens"]), "tokens": tuple(row["tokens"])})


def _read_if_there(file: Path) -> list[Completion]:
    try:
        return read_completions(file)
    except DataError:
        if file.exists():
            raise
        return []  # merged by another task between the listing and here


def is_empty(completion: Completion) -> bool:
    """Whether there is nothing to read in it."""
    return not completion.text.strip()


def is_repetitive(completion: Completion, *, size: int = 4, at_least_tokens: int = 32) -> bool:
    """Whether more than half of the runs of `size` tokens in it occurred before: it goes in circles."""
    tokens = completion.tokens
    if len(tokens) < at_least_tokens:
        return False
    runs = [tokens[start : start + size] for start in range(len(tokens) - size + 1)]
    return 2 * len(set(runs)) < len(runs)
