"""JSON Lines that survive a kill: whole lines are appended, and a torn last line is dropped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from spd_dist.errors import DataError, writing
from spd_dist.runtime.artifacts import corrupt, missing


class JsonlWriter:
    """Appends one line a call, and flushes it; what a killed process left of its last line is cut off at the start."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 - closed by `close`
        self._drop_torn_line()

    def write(self, row: Mapping[str, Any]) -> None:
        """Append `row`.

        Raises:
            DataError: the disk is full; the lines before it are kept, and no half line is.
        """
        line = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
        start, written = os.fstat(self._file.fileno()).st_size, 0
        with writing(self.path):
            try:
                while written < len(line):
                    written += self._file.write(line[written:])
            except OSError:
                if written:
                    self._file.truncate(start)
                raise

    def close(self) -> None:
        """Sync the lines to disk and close the file."""
        if not self._file.closed:
            with writing(self.path), self._file:  # NFS says only here that the disk is full
                os.fsync(self._file.fileno())

    def _drop_torn_line(self) -> None:
        end = _end_of_last_line(self._file)
        if end < os.fstat(self._file.fileno()).st_size:
            self._file.truncate(end)

    def __enter__(self) -> JsonlWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a file; a last line without its end is not a row yet.

    Raises:
        DataError: the file is missing, or a line that is whole is not a JSON object.
    """
    try:
        *lines, _torn = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError as error:
        raise missing(path) from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise corrupt(f"{path}, line {number}", error) from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: {row!r} is not an object; write one {{...}} a line")
        rows.append(row)
    return rows


def _end_of_last_line(file: BinaryIO) -> int:
    """Number of bytes up to and with the last line end, read from the back: logs grow large."""
    block = 1 << 16
    position = file.seek(0, os.SEEK_END)
    while position > 0:
        start = max(0, position - block)
        file.seek(start)
        found = file.read(position - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        position = start
    return 0
