import errno
import json
import os
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from spd_dist.errors import DataError, writing
from spd_dist.storage.artifacts import (
    JsonlWriter,
    clear_folder,
    content_hash,
    partial_path,
    read_json,
    read_jsonl,
    read_tensors,
    replacing,
    sha256_of,
    write_json,
    write_tensors,
    write_text,
)

WRITERS = [
    lambda path: write_json(path, {"a": 1}),
    lambda path: write_text(path, "a text"),
    lambda path: write_tensors(path, {"x": torch.ones(3)}),
]


def test_json_and_tensors_come_back_as_they_were_written(tmp_path):
    value = {"name": "caf\u00e9", "numbers": [1, 2.5, None, True]}
    write_json(tmp_path / "deep" / "a.json", value)
    assert read_json(tmp_path / "deep" / "a.json") == value
    basis_DR = torch.randn(6, 4, dtype=torch.float64).T
    write_tensors(tmp_path / "a.safetensors", {"basis": basis_DR, "empty": torch.empty(0)}, {"rank": "4"})
    tensors, metadata = read_tensors(tmp_path / "a.safetensors")
    assert torch.equal(tensors["basis"], basis_DR)
    assert tensors["empty"].shape == (0,)
    assert metadata == {"rank": "4"}


def test_equal_tensors_make_equal_files(tmp_path):
    metadata = {"caf\u00e9": '"\\\n\x01\u2028', "task": "gsm8k", "rank": "4", "seed": "0", "layers": "[1, 2]"}
    tensors = {"x": torch.arange(5.0), "y": torch.ones(2)}
    for name in map(str, range(20)):
        write_tensors(tmp_path / name, tensors, metadata)
    assert len({sha256_of(tmp_path / name) for name in map(str, range(20))}) == 1
    found, kept = read_tensors(tmp_path / "0")
    assert kept == metadata
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def write_half(path):
    path.write_text("half")
    json.dumps(object())


def test_a_writer_that_fails_leaves_the_old_file_and_no_half_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, "old")
    with pytest.raises(TypeError, match="not JSON serializable"), replacing(path) as partial:
        write_half(partial)
    assert read_json(path) == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


@contextmanager
def no_file_may_grow_beyond(num_bytes):
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then the kernel answers EFBIG
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("write", WRITERS)
def test_a_disk_that_takes_no_more_is_named_with_the_remedy_and_keeps_what_was_there(tmp_path, write):
    path = tmp_path / "artifact"
    path.write_text("old")
    with no_file_may_grow_beyond(3), pytest.raises(DataError, match=r"artifact cannot be written: .*make room"):
        write(path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["artifact"]


def test_a_full_disk_is_named_as_such(tmp_path):
    path = tmp_path / "artifact"
    full = Path("/dev/full")  # the kernel answers ENOSPC to every write
    message = r"artifact cannot be written: No space left on device; make room"
    with pytest.raises(DataError, match=message), replacing(path):
        full.write_text("text")
    assert not list(tmp_path.iterdir())


def test_errors_that_are_not_the_disks_stay_what_they_are(tmp_path):
    with pytest.raises(OSError, match="broken") as caught, replacing(tmp_path / "a"):
        raise OSError(errno.ECONNRESET, "broken")
    assert not isinstance(caught.value, DataError)


@pytest.mark.parametrize(("number", "said", "remedy"), [
    (errno.EIO, "Input/output error", "see to the disk or its server"),
    (errno.ESTALE, "Stale file handle", "see to the disk or its server"),
    (errno.EROFS, "Read-only file system", "make room or fix the permissions"),
])  # fmt: skip
def test_a_broken_disk_is_one_sentence_wherever_it_is_met(tmp_path, number, said, remedy):
    for place, found in ((tmp_path / "a", "a cannot be"), (None, "b cannot be read or written")):
        with pytest.raises(DataError, match=rf"{found}.*: {said}; {remedy}"), writing(place):
            raise OSError(number, os.strerror(number), "b")


def test_a_missing_artifact_is_named_with_what_to_do(tmp_path):
    for read in (read_json, read_tensors, sha256_of):
        with pytest.raises(DataError, match=r"gone is missing: the run is not finished, or the path is wrong; finish"):
            read(tmp_path / "gone")
        with pytest.raises(DataError, match=r"report\.json is missing: there is no folder .*typo; correct the path"):
            read(tmp_path / "typo" / "report.json")
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    with pytest.raises(DataError, match=r"manifest\.json is missing: the run is not finished, .*without --from"):
        read_json(tmp_path / "arms/psr/generate" / "manifest.json")


def test_a_corrupt_artifact_is_named_with_what_to_do(tmp_path):
    path = tmp_path / "torn"
    write_tensors(path, {"x": torch.arange(100.0)})
    os.truncate(path, 200)
    for read in (read_json, read_tensors):
        with pytest.raises(DataError, match=r"torn is corrupt .*; delete it and start the same command again"):
            read(path)


def test_json_that_other_readers_refuse_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", float("nan"))
    assert not list(tmp_path.iterdir())


def test_content_hashes_see_values_and_not_the_order_of_keys():
    assert content_hash({"a": 1, "b": (1, 2)}) == content_hash({"b": [1, 2], "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": 1.5})
    assert content_hash([1, 2]) != content_hash([2, 1])


@pytest.mark.parametrize("write", WRITERS)
def test_nothing_is_written_through_a_link_that_somebody_put_there(tmp_path, write):
    path, target = tmp_path / "a.json", tmp_path / "target"
    target.write_text("mine")
    partial_path(path).symlink_to(target)
    write(path)
    assert target.read_text() == "mine"
    assert not path.is_symlink()


def become_a_link(path, target):
    path.unlink()
    path.symlink_to(target)


def test_a_file_that_becomes_a_link_while_it_is_written_is_not_published(tmp_path):
    path, target = tmp_path / "a.json", tmp_path / "target"
    target.write_text("mine")
    with pytest.raises(DataError, match="became a link while it was written"), replacing(path) as partial:
        become_a_link(partial, target)
    assert not path.exists()
    assert target.read_text() == "mine"


def test_a_folder_that_is_a_link_is_cleared_without_what_it_leads_to(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "a").touch()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    clear_folder(tmp_path / "link")
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "kept" / "a").exists()


def test_half_of_a_surrogate_pair_is_written_and_read_back(tmp_path):
    rows = [{"a": "x \ud800 y"}, {"a": "caf\u00e9"}]
    with JsonlWriter(tmp_path / "a.jsonl") as writer:
        for row in rows:
            writer.write(row)
    write_json(tmp_path / "a.json", rows)
    assert read_jsonl(tmp_path / "a.jsonl") == rows == read_json(tmp_path / "a.json")
    assert "caf\u00e9" in (tmp_path / "a.jsonl").read_text()
