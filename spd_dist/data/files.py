"""Rows from local JSONL and Parquet files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spd_dist.errors import DataError

SUFFIXES = (".jsonl", ".parquet")
_OTHER_SUFFIXES = (".json", ".csv", ".tsv", ".txt", ".gz", ".zst", ".arrow")


@dataclass(frozen=True)
class Located:
    """A row as it was read, and where, for the error that may name it."""

    path: str
    line: str
    row: dict[str, Any]
    subset: str = ""

    @property
    def where(self) -> str:
        """Path and line."""
        return f"{self.path}, {self.line}" if self.line else self.path


def is_file_name(text: str) -> bool:
    """Whether `text` names a local file, by its suffix, and not a data set of the hub."""
    return text.endswith(SUFFIXES + _OTHER_SUFFIXES)


def read_rows(name: str) -> list[Located]:
    """The rows of a `.jsonl` or `.parquet` file; a row without `id` takes its number in the file.

    Raises:
        DataError: no such file, another format, or a line that is not a JSON object.
    """
    path = Path(name).expanduser()
    if not name.endswith(SUFFIXES):
        raise DataError(f"{name}: a local file must be .jsonl or .parquet; convert it, one row a line")
    if not path.is_file():
        raise DataError(f"{name}: no such file (from {Path.cwd()}); correct the path, or name a data set of the hub")
    read = _read_jsonl if path.suffix == ".jsonl" else _read_parquet
    return list(read(path, name))


def _read_jsonl(path: Path, name: str) -> Iterator[Located]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise DataError(f"{name}, line {number}: not JSON ({error}); write one object a line") from error
            if not isinstance(row, dict):
                raise DataError(f"{name}, line {number}: {row!r} is not a JSON object; write one object a line")
            yield Located(name, f"line {number}", {"id": f"{path.stem}/{number}", **row})


def _read_parquet(path: Path, name: str) -> Iterator[Located]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{name}: not readable as Parquet: {error}; write it again, or use .jsonl") from error
    for number, row in enumerate(rows, 1):
        yield Located(name, f"row {number}", {"id": f"{path.stem}/{number}", **row})
