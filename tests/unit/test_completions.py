"""A corpus is a set of lines: whoever wrote them, torn or repeated, it is read and merged alike."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import pytest

from spd_dist.errors import DataError
from spd_dist.storage.completions import (
    TABLE,
    corpus_name,
    differing,
    gathered,
    is_empty,
    is_repetitive,
    open_corpus,
    part_name,
    parts,
    read_completions,
    to_text,
)
from spd_dist.storage.corpus_merge import LocatedLines, remove_parts, write_merged
from spd_dist.storage.keyed_parts import without_repeats
from spd_dist.storage.tables import Table
from spd_dist.types import Completion

TEXT = "completions.jsonl"
SOME = [Completion(f"p{i}", 0, i, (1, 2), (3, 4, i), f"text é {i}", "stop") for i in range(4)]


def write(path, completions, torn=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(vars(one), ensure_ascii=False) + "\n" for one in completions)
    path.write_bytes(lines.encode() + torn)


def merge(folder, wanted, name="completions.jsonl", check=lambda: None):
    """Merge the parts in the order of `wanted`."""
    numbers, seen = {one.id: number for number, one in enumerate(wanted)}, []
    with LocatedLines(parts(folder), lambda prompt, _: numbers[prompt], len(wanted)) as lines:
        write_merged(lines, folder / name, see=lambda number, one: seen.append((number, one)), check=check)
    assert seen == list(enumerate(wanted))
    remove_parts(folder)


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
    assert set(gathered(tmp_path).values()) == set(SOME)
    merge(tmp_path, SOME)
    assert [path.name for path in tmp_path.iterdir()] == ["completions.jsonl"]
    assert read_completions(tmp_path / "completions.jsonl") == SOME


def test_a_large_corpus_is_a_table_of_the_same_completions_and_exports_as_the_text_of_a_small_one(tmp_path):
    assert [corpus_name(num) for num in (100_000, 100_001)] == [f"completions/{name}" for name in (TEXT, TABLE)]
    for folder in (tmp_path / "text", tmp_path / "table"):
        write(folder / part_name(0, 2), SOME[::2])
        write(folder / part_name(1, 2), SOME[1::2])
    merge(tmp_path / "text", SOME)
    merge(tmp_path / "table", SOME, TABLE)
    table = open_corpus(tmp_path / "table")
    assert isinstance(table, Table)
    assert [*table] == table[:] == [table[number] for number in range(-4, 0)] == SOME
    assert list(table.num_tokens("tokens")) == [3] * 4
    assert list(table.column("text")) == [one.text for one in SOME]
    to_text(table, tmp_path / "exported.jsonl")
    text = (tmp_path / "text" / TEXT).read_bytes()
    assert (tmp_path / "exported.jsonl").read_bytes() == text
    assert table.digest == hashlib.sha256(text).hexdigest()


def test_a_corpus_that_fails_its_check_is_not_there_and_its_parts_are(tmp_path):
    write(tmp_path / part_name(0, 1), SOME)

    def refuse():
        raise DataError("too many are empty")

    for name in (TEXT, TABLE):
        with pytest.raises(DataError, match="too many are empty"):
            merge(tmp_path, SOME, name, refuse)
        assert [path.name for path in tmp_path.iterdir()] == [part_name(0, 1)]


def test_a_table_that_was_cut_off_is_named(tmp_path):
    write(tmp_path / part_name(0, 1), SOME)
    merge(tmp_path, SOME, TABLE)
    file = tmp_path / TABLE
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"completions.arrow is corrupt .*; delete it and start the same command"):
        open_corpus(tmp_path)


def test_lines_that_come_after_the_merged_file_are_no_part_of_the_corpus(tmp_path):
    write(tmp_path / "completions.jsonl", SOME)
    late = dataclasses.replace(SOME[1], tokens=(9,))
    write(tmp_path / part_name(0, 1, task=3, num_tasks=4), [SOME[0], late])
    assert list(gathered(tmp_path).values()) == SOME


def test_two_different_completions_of_one_key_are_an_error():
    other = dataclasses.replace(SOME[1], tokens=(9,))
    with pytest.raises(DataError, match=r"two completions of prompt 'p1', sample 0, differ"):
        without_repeats([*SOME, other], differing)


def test_lines_of_one_key_are_merged_if_they_are_the_same(tmp_path):
    write(tmp_path / part_name(0, 2), SOME[:3])
    write(tmp_path / part_name(1, 2), SOME[2:])
    merge(tmp_path, SOME)
    assert read_completions(tmp_path / TEXT) == SOME
    (tmp_path / TEXT).unlink()
    write(tmp_path / part_name(0, 2), SOME)
    write(tmp_path / part_name(1, 2), [dataclasses.replace(SOME[1], tokens=(9,))])
    with pytest.raises(DataError, match=r"two completions of prompt 'p1', sample 0, differ"):
        merge(tmp_path, SOME)


def test_a_line_that_is_no_completion_is_named(tmp_path):
    write(tmp_path / part_name(0, 1), SOME[:1])
    with (tmp_path / part_name(0, 1)).open("a") as file:
        file.write('{"id": "x", "smaple": 0}\n')
    for read in (gathered, lambda folder: merge(folder, SOME)):
        with pytest.raises(DataError, match=r"part-00000-of-00001.jsonl, line 2: not a completion \(.*smaple"):
            read(tmp_path)


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
    assert is_repetitive((5, 6, 7) * 12)
    assert not is_repetitive(tuple(range(40)))
    assert not is_repetitive((5,) * 10)
