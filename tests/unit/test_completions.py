"""A corpus is a set of lines: whoever wrote them, torn or repeated, it is read and merged alike."""

from __future__ import annotations

import dataclasses
import json

import pytest

from spd_dist.errors import DataError
from spd_dist.storage.completions import (
    as_row,
    gathered,
    is_empty,
    is_repetitive,
    part_name,
    parts,
    read_completions,
    without_repeats,
    write_merged,
)
from spd_dist.types import Completion

SOME = [Completion(f"p{i}", 0, i, (1, 2), (3, 4, i), f"text é {i}", "stop") for i in range(4)]


def write(path, completions, torn=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(as_row(one), ensure_ascii=False) + "\n" for one in completions)
    path.write_bytes(lines.encode() + torn)


def test_what_was_written_is_read(tmp_path):
    write(tmp_path / part_name(1, 2), SOME)
    assert list(gathered(tmp_path).values()) == SOME
    assert read_completions(tmp_path / "part-00001-of-00002.jsonl") == SOME


def test_a_torn_last_line_is_no_completion(tmp_path):
    write(tmp_path / part_name(0, 1), SOME[:2], torn=b'{"id": "p2", "sam')
    assert list(gathered(tmp_path).values()) == SOME[:2]


def test_parts_of_all_attempts_and_tasks_are_gathered_and_merged_in_the_order_asked_for(tmp_path):
    write(tmp_path / part_name(0, 1), SOME[2:3])
    write(tmp_path / part_name(3, 7), SOME[3:])
    write(tmp_path / part_name(0, 2, task=1, num_tasks=4), SOME[:2])
    assert [path.name for path in parts(tmp_path)][-1] == "task-00001-of-00004.part-00000-of-00002.jsonl"
    found = gathered(tmp_path)
    write_merged(tmp_path, [found[one.id, 0] for one in SOME])
    assert [path.name for path in tmp_path.iterdir()] == ["completions.jsonl"]
    assert read_completions(tmp_path / "completions.jsonl") == SOME


def test_a_kill_between_the_merged_file_and_the_removal_of_parts_changes_nothing(tmp_path):
    write(tmp_path / part_name(0, 2), SOME[:2])
    write(tmp_path / "completions.jsonl", SOME)
    before = (tmp_path / "completions.jsonl").stat()
    assert list(gathered(tmp_path).values()) == SOME
    write_merged(tmp_path, SOME)
    assert [path.name for path in tmp_path.iterdir()] == ["completions.jsonl"]
    after = (tmp_path / "completions.jsonl").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_lines_that_come_after_the_merged_file_are_no_part_of_the_corpus(tmp_path):
    write(tmp_path / "completions.jsonl", SOME)
    late = dataclasses.replace(SOME[1], tokens=(9,))
    write(tmp_path / part_name(0, 1, task=3, num_tasks=4), [SOME[0], late])
    assert list(gathered(tmp_path).values()) == SOME


def test_two_different_completions_of_one_key_are_an_error():
    other = dataclasses.replace(SOME[1], tokens=(9,))
    with pytest.raises(DataError, match=r"two completions of prompt 'p1', sample 0, differ"):
        without_repeats([*SOME, other])


def test_a_line_that_is_no_completion_is_named(tmp_path):
    write(tmp_path / part_name(0, 1), SOME[:1])
    with (tmp_path / part_name(0, 1)).open("a") as file:
        file.write('{"id": "x", "smaple": 0}\n')
    with pytest.raises(DataError, match=r"part-00000-of-00001.jsonl, line 2: not a completion \(.*smaple"):
        gathered(tmp_path)


def test_a_part_that_another_task_merged_meanwhile_is_not_missed(tmp_path, monkeypatch):
    write(tmp_path / part_name(0, 1), SOME)

    def merged_after_the_listing(folder):
        found = parts(folder)
        write(folder / "completions.jsonl", SOME)
        found[0].unlink()
        return found

    monkeypatch.setattr("spd_dist.storage.completions.parts", merged_after_the_listing)
    assert list(gathered(tmp_path).values()) == SOME


def test_empty_and_repetitive_completions_are_told():
    assert is_empty(dataclasses.replace(SOME[0], text=" \n"))
    assert not is_empty(SOME[0])
    assert is_repetitive(dataclasses.replace(SOME[0], tokens=(5, 6, 7) * 12))
    assert not is_repetitive(dataclasses.replace(SOME[0], tokens=tuple(range(40))))
    assert not is_repetitive(dataclasses.replace(SOME[0], tokens=(5,) * 10))
