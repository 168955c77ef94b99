"""Answers on disk, and what they say of one arm: `evaluate/ARM/TASK.jsonl`, in the order of the test set.

While an arm is at work each rank appends to a part of its own; the merged file replaces them, and is the same whatever
the world size was, and however often the run was killed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

from spd_dist.errors import DataError
from spd_dist.storage.artifacts import as_json, read_jsonl, write_text
from spd_dist.storage.completions import Key
from spd_dist.storage.records import parse_record
from spd_dist.types import Answer


def answers_path(folder: Path, arm: str, task: str) -> Path:
    """Where an arm's answers end up."""
    return folder / arm / f"{task}.jsonl"


def router_path(merged: Path) -> Path:
    """Where it says how the routers of a mixture of experts spread the prompts, beside the answers."""
    return merged.with_suffix(".router.json")


def part_path(merged: Path, rank: int, world_size: int) -> Path:
    """What one rank appends to."""
    return merged.with_name(f"{merged.stem}.part-{rank:05d}-of-{world_size:05d}.jsonl")


def parts(merged: Path) -> list[Path]:
    """All parts, of any attempt and world size."""
    return sorted(merged.parent.glob(f"{merged.stem}.part-*.jsonl"))


def read_answers(path: Path) -> list[Answer]:
    """The answers of a file; a torn last line is none.

    Raises:
        DataError: the file is missing, or a line is not an answer.
    """
    names = {field.name for field in dataclasses.fields(Answer)}
    answers = []
    for number, row in enumerate(read_jsonl(path), 1):
        if row.keys() != names:
            wrong = ", ".join(sorted(row.keys() ^ names))
            raise DataError(f"{path}, line {number}: not an answer ({wrong} missing or unknown); delete that file")
        answers.append(parse_record(Path(f"{path}, line {number}"), Answer, row))
    return answers


def read_parts(merged: Path) -> dict[Key, Answer]:
    """Every answer that there is, by example id and sample: of the merged file, or of the parts."""
    files = [merged] if merged.exists() else parts(merged)
    return {(answer.id, answer.sample): answer for file in files for answer in read_answers(file)}


def write_merged(merged: Path, answers: Iterable[Answer]) -> None:
    """Write the answers whole, then remove the parts."""
    lines = [as_json(vars(answer)) + "\n" for answer in answers]
    write_text(merged, "".join(lines))
    for part in parts(merged):
        part.unlink()
