"""Records: dataclasses as JSON, with the version of the format, read back as they were or refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest

from spd_dist.errors import DataError, MissingError
from spd_dist.storage.artifacts import read_json, write_json
from spd_dist.storage.records import SCHEMA, read_fields, read_object, read_record, read_text, write_record


@dataclass(frozen=True)
class Part:
    name: str
    share: float
    bounds: tuple[float, float] | None = None


@dataclass(frozen=True)
class Whole:
    state: Literal["open", "closed"]
    parts: Mapping[str, tuple[Part, ...]]
    losses: list[float]
    anything: Mapping[str, Any]
    count: int | None


RECORD = Whole(
    "open", {"a": (Part("x", 0.5, (0.0, 1.0)), Part("y", 1)), "b": ()}, [0.1, 2], {"k": [1, {"m": None}]}, None
)


def test_a_record_comes_back_as_it_was_and_its_file_has_the_version(tmp_path):
    write_record(tmp_path / "r.json", RECORD)
    assert read_record(tmp_path / "r.json", Whole) == RECORD
    assert read_json(tmp_path / "r.json")["schema"] == SCHEMA
    assert read_fields(tmp_path / "r.json").keys() == vars(RECORD).keys()
    write_record(tmp_path / "again.json", read_record(tmp_path / "r.json", Whole))
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "r.json").read_bytes()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"state": "ajar"}, "'ajar' is none of open, closed"),
        ({"count": "3"}, "'3' is none of"),
        ({"count": True}, "True is none of"),
        ({"losses": 0.1}, "0.1 is no list"),
        ({"parts": {"a": [{"name": "x"}]}}, "bounds, share: missing or unknown"),
        ({"more": 1}, "more: missing or unknown"),
    ],
)
def test_what_is_no_such_record_is_refused_with_the_reason(tmp_path, change, reason):
    write_record(tmp_path / "r.json", RECORD)
    write_json(tmp_path / "r.json", read_json(tmp_path / "r.json") | change)
    with pytest.raises(DataError, match=rf"r.json is corrupt \({reason}.*\); delete it"):
        read_record(tmp_path / "r.json", Whole)


@pytest.mark.parametrize(("written", "version"), [({"schema": 7}, 7), ({}, 1), ([], 1)])
def test_a_file_of_another_version_is_refused_with_both_versions_and_the_remedy(tmp_path, written, version):
    (tmp_path / "r.json").write_text(json.dumps(written))
    rule = rf"r.json is of version {version} of run folders, .* version {SCHEMA}; finish .* another run_dir"
    with pytest.raises(DataError, match=rule):
        read_record(tmp_path / "r.json", Whole)


def test_a_file_that_is_not_there_is_missing(tmp_path):
    with pytest.raises(MissingError):
        read_record(tmp_path / "r.json", Whole)


def test_a_number_that_json_cannot_hold_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="Out of range float values"):
        write_record(tmp_path / "r.json", replace(RECORD, losses=[float("nan")]))


def test_files_that_are_no_records_are_refused_by_name(tmp_path):
    file = tmp_path / "adapter_config.json"
    for read in (read_object, read_text):
        with pytest.raises(MissingError, match=r"adapter_config\.json is missing"):
            read(file)
    file.write_text("[1]")
    with pytest.raises(DataError, match=r"adapter_config\.json is corrupt \(a list and no object\)"):
        read_object(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"adapter_config\.json is corrupt"):
        read_text(file)
