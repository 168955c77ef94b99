import resource
import signal

import pytest

from spd_dist.errors import DataError
from spd_dist.storage.artifacts import JsonlWriter, read_jsonl


def write_rows(path, rows):
    with JsonlWriter(path) as writer:
        for row in rows:
            writer.write(row)


def test_rows_come_back_and_a_second_writer_appends(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    write_rows(path, [{"id": "a", "text": "line\nbreak \u2028"}])
    write_rows(path, [{"id": "b"}])
    assert [row["id"] for row in read_jsonl(path)] == ["a", "b"]
    assert read_jsonl(path)[0]["text"] == "line\nbreak \u2028"


@pytest.mark.parametrize("torn", [b'{"id": "c", "te', b"{", b"x" * 200_000])
def test_a_line_torn_by_a_kill_is_no_row_and_does_not_spoil_the_next_one(tmp_path, torn):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{"id": "a"}, {"id": "b"}])
    path.write_bytes(path.read_bytes() + torn)
    assert [row["id"] for row in read_jsonl(path)] == ["a", "b"]
    write_rows(path, [{"id": "d"}])
    assert [row["id"] for row in read_jsonl(path)] == ["a", "b", "d"]


def test_a_file_with_nothing_but_a_torn_line_is_empty(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id"')
    write_rows(path, [])
    assert path.read_bytes() == b""


def test_a_full_disk_keeps_the_lines_before_and_no_half_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then the kernel answers EFBIG, after a partial write
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = JsonlWriter(path)
    writer.write({"id": "a"})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        with pytest.raises(DataError, match=r"rows.jsonl cannot be written: .*make room"):
            writer.write({"id": "b" * 200})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert path.read_bytes() == b'{"id": "a"}\n'
    writer.write({"id": "c"})
    writer.close()
    assert [row["id"] for row in read_jsonl(path)] == ["a", "c"]


def test_missing_corrupt_and_alien_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"gone.jsonl is missing"):
        read_jsonl(tmp_path / "gone.jsonl")
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 1}\n{"id"\n{"id": 2}\n')
    with pytest.raises(DataError, match=r"rows.jsonl, line 2 is corrupt"):
        read_jsonl(path)
    path.write_text("[1]\n")
    with pytest.raises(DataError, match=r"line 1: \[1\] is not an object"):
        read_jsonl(path)
