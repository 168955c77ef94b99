"""A corpus on disk: parts that workers append to, and the one file that they become.

A line is a completion. Its key is (prompt id, sample); whichever worker of whichever attempt wrote it, its content is
the same, so that a corpus is a set of lines and the merged file has one canonical order. Once that file is there, it
alone is the corpus: a task that read what was left to do before may still append to a part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spd_dist.errors import DataError
from spd_dist.storage.artifacts import as_json, read_jsonl, write_text
from spd_dist.types import Completion, record_of

MERGED = "completions.jsonl"
CORPUS = f"completions/{MERGED}"
"""The finished corpus in a stage's folder."""
Key = tuple[str, int]


def part_name(worker: int, num_workers: int, *, task: int = 0, num_tasks: int = 1) -> str:
    """The file that one worker appends to; no other worker of any task that runs at the same time has it."""
    part = f"part-{worker:05d}-of-{num_workers:05d}.jsonl"
    return part if num_tasks == 1 else f"task-{task:05d}-of-{num_tasks:05d}.{part}"


def parts(folder: Path) -> list[Path]:
    """All parts, of any attempt and world size, in the order of their names."""
    return sorted([*folder.glob("part-*.jsonl"), *folder.glob("task-*.jsonl")])


def read_completions(path: Path) -> list[Completion]:
    """The completions of a file; a torn last line is none.

    Raises:
        DataError: the file is missing, or a line is not a completion.
    """
    return [_completion(path, number, row) for number, row in enumerate(read_jsonl(path), 1)]


def gathered(folder: Path) -> dict[Key, Completion]:
    """What there is, by key, while other tasks may merge: the merged corpus alone, or the lines of all parts.

    Raises:
        DataError: a line is not a completion, or two of one key differ.
    """
    merged = folder / MERGED
    if not merged.exists():
        found = [one for part in parts(folder) for one in _read_if_there(part)]
        if not merged.exists():
            return without_repeats(found)
    return without_repeats(read_completions(merged))


def without_repeats(completions: Iterable[Completion]) -> dict[Key, Completion]:
    """By key. Workers that share a folder may have made one twice; it must then be the same.

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
    """Write the corpus in the order given, unless it is there, then remove the parts."""
    path = folder / MERGED
    if not path.exists():
        lines = (as_json(as_row(completion)) + "\n" for completion in completions)
        write_text(path, "".join(lines))
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
    tokens = {name: tuple(row[name]) for name in ("prompt_tokens", "tokens")}
    return record_of(Completion, {**row, **tokens})


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
