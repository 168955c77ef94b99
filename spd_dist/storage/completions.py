"""A corpus on disk: parts that workers append to, and the one file that they become.

A line is a completion. Its key is (prompt id, sample); whichever worker of whichever attempt wrote it, its content is
the same, so that a corpus is a set of lines and the merged file has one canonical order. Once that file is there, it
alone is the corpus: a task that read what was left to do before may still append to a part.

A large corpus is merged to a memory-mapped table (`storage.tables`) instead of text, and no step holds it in memory.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spd_dist.errors import DataError
from spd_dist.storage.artifacts import as_json, read_jsonl, replacing
from spd_dist.storage.keyed_parts import Key, without_repeats
from spd_dist.storage.tables import Table
from spd_dist.types import Completion, record_of

MERGED, TABLE = "completions.jsonl", "completions.arrow"
"""The finished corpus, as text or as a table."""
CORPUS = f"completions/{MERGED}"
"""The one as text, in a stage's folder."""
MOST_AS_TEXT = 100_000
"""Completions that are merged to text, which people read; more become a table."""


def corpus_name(num_completions: int) -> str:
    """The finished corpus of so many completions, in its stage's folder."""
    return f"completions/{MERGED if num_completions <= MOST_AS_TEXT else TABLE}"


def finished_corpus(folder: Path) -> Path | None:
    """The finished corpus in a folder of completions, if there is one."""
    return next((path for path in (folder / MERGED, folder / TABLE) if path.exists()), None)


def open_corpus(path: Path) -> Sequence[Completion]:
    """The completions of a finished corpus: in memory if it is text, else a table on disk.

    Raises:
        DataError: it is missing or corrupt.
    """
    path = finished_corpus(path) or path / MERGED if path.is_dir() else path
    return Table(Completion, [path]) if path.name == TABLE else read_completions(path)


def open_corpora(files: Sequence[Path]) -> Sequence[Completion]:
    """The completions of several files, one after the other, as `open_corpus` gives those of one.

    Raises:
        DataError: one is missing or corrupt.
    """
    if all(file.name == TABLE for file in files):
        return Table(Completion, files)
    return [one for file in files for one in open_corpus(file)]


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
    if finished_corpus(folder) is None:
        found = [one for part in parts(folder) for one in read_if_there(part)]
        if finished_corpus(folder) is None:
            return without_repeats(found, differing)
    return without_repeats(open_corpus(folder), differing)


def differing(prompt: str, sample: int) -> DataError:
    """The error for two completions of one key."""
    return DataError(
        f"two completions of prompt {prompt!r}, sample {sample}, differ: these are parts of two settings or kinds of "
        "machine; delete generate/ and start the same command again"
    )


def to_text(completions: Iterable[Completion], path: Path) -> None:
    """Write completions as the text that the merge writes of small corpora."""
    with replacing(path) as partial, open(partial, "w", encoding="utf-8") as file:
        file.writelines(as_json(vars(one)) + "\n" for one in completions)


def parse_line(line: bytes) -> Completion:
    """The completion of a line.

    Raises:
        ValueError: it is not JSON; as a `DataError`, not a completion.
    """
    row = json.loads(line)
    if not isinstance(row, dict):
        raise DataError(f"{row!r} is not an object; write one {{...}} a line")
    return _completion_of(row)


NAMES = {field.name for field in dataclasses.fields(Completion)}


_KINDS = {"id": str, "sample": int, "seed": int, "text": str, "finish_reason": str}


def _completion_of(row: Mapping[str, Any]) -> Completion:
    if set(row) != NAMES:
        wrong = ", ".join(sorted(row.keys() ^ NAMES))
        raise DataError(f"not a completion ({wrong} missing or unknown); delete that file")
    tokens = {name: row[name] for name in ("prompt_tokens", "tokens")}
    is_right = all(isinstance(row[name], kind) for name, kind in _KINDS.items())
    if not is_right or any(type(ids) is not list or not set(map(type, ids)) <= {int} for ids in tokens.values()):
        raise DataError("not a completion (a number, a text or a list of tokens is something else); delete that file")
    return record_of(Completion, {**row, **{name: tuple(ids) for name, ids in tokens.items()}})


def _completion(file: Path, number: int, row: Mapping[str, Any]) -> Completion:
    try:
        return _completion_of(row)
    except DataError as error:
        raise DataError(f"{file}, line {number}: {error}") from error


def read_if_there(file: Path) -> Sequence[Completion]:
    """The completions of a part or a corpus, or none if another task has merged it since it was listed.

    Raises:
        DataError: it is there, and is not of completions.
    """
    try:
        return open_corpus(file)
    except DataError:
        if file.exists():
            raise
        return []


def is_empty(completion: Completion) -> bool:
    """Whether there is nothing to read in it."""
    return not completion.text.strip()


def is_repetitive(tokens: Sequence[int], *, size: int = 4, at_least_tokens: int = 32) -> bool:
    """Whether more than half of the runs of `size` tokens occurred before: a completion goes in circles."""
    if len(tokens) < at_least_tokens:
        return False
    num_runs = len(tokens) - size + 1
    if 2 * len(set(tokens[:num_runs])) >= num_runs:  # runs that begin differently differ, and this is soon known
        return False
    return 2 * len(set(zip(*(tokens[start:] for start in range(size)), strict=False))) < num_runs
