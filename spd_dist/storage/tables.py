"""Rows of a dataclass as a memory-mapped Arrow file: a process holds the rows that it looks at, and no others.

Processes of one machine share the pages. A million completions of 456 tokens are open in a second and take a few MiB of
each process, where as Python objects they would take 15 GiB.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np
import pyarrow as pa

from spd_dist.storage.artifacts import corrupt, missing, replacing
from spd_dist.types import record_of

R = TypeVar("R")

ROWS_A_BATCH = 1024
DIGEST = b"digest"
"""What the last batch carries: a hash of the content, by whoever wrote it."""
TYPES: Mapping[str, pa.DataType] = {"int": pa.int64(), "str": pa.string(), "tuple[int, ...]": pa.list_(pa.int32())}


def schema_of(kind: type[Any]) -> pa.Schema:
    """Columns as the fields of the dataclass; what is neither a number nor tokens is text."""
    return pa.schema([(field.name, TYPES.get(str(field.type), pa.string())) for field in dataclasses.fields(kind)])


class TableWriter(Generic[R]):
    """Writes rows to a file, a batch at a time."""

    def __init__(self, path: Path, kind: type[R]) -> None:
        self.schema = schema_of(kind)
        is_list = {field.name: pa.types.is_list(field.type) for field in self.schema}
        self.plain: dict[str, list[Any]] = {name: [] for name in is_list if not is_list[name]}
        self.tokens = {name: array("i") for name in is_list if is_list[name]}
        self.ends = {name: array("i", [0]) for name in self.tokens}
        self.file = pa.OSFile(str(path), "wb")
        self.arrow = pa.ipc.new_file(self.file, self.schema)
        self.num_rows = 0

    def write(self, row: R) -> None:
        """Append a row."""
        fields = vars(row)
        for name, plain in self.plain.items():
            plain.append(fields[name])
        for name, tokens in self.tokens.items():  # one array a batch: Arrow alone would take seven times as long
            tokens.extend(array("i", fields[name]))
            self.ends[name].append(len(tokens))
        self.num_rows += 1
        if self.num_rows % ROWS_A_BATCH == 0:
            self._flush({})

    def _flush(self, metadata: Mapping[bytes, bytes]) -> None:
        columns = {name: pa.array(values, self.schema.field(name).type) for name, values in self.plain.items()}
        for name, tokens in self.tokens.items():
            columns[name] = pa.ListArray.from_arrays(np.array(self.ends[name]), np.array(tokens))
            self.ends[name], self.tokens[name] = array("i", [0]), array("i")
        batch = pa.record_batch([columns[name] for name in self.schema.names], schema=self.schema)
        self.arrow.write_batch(batch, custom_metadata=dict(metadata))
        self.plain = {name: [] for name in self.plain}

    def close(self, digest: str = "") -> None:
        """Write what is left, and the digest of the content."""
        self._flush({DIGEST: digest.encode()})
        self.arrow.close()
        self.file.close()


def write_table(path: Path, kind: type[R], rows: Iterable[R], *, digest: str = "") -> None:
    """Write rows whole.

    Raises:
        DataError: the disk is full or may not be written.
    """
    with replacing(path) as partial:
        writer = TableWriter(partial, kind)
        for row in rows:
            writer.write(row)
        writer.close(digest)


class Table(Sequence[R]):
    """The rows of one or more files, one file after the other; a row is made when it is asked for."""

    def __init__(self, kind: type[R], paths: Sequence[Path]) -> None:
        """Map the files.

        Raises:
            DataError: one is missing, or is no such table.
        """
        self.kind, self.paths = kind, tuple(paths)
        self.batches: list[_Batch] = []
        self.digest = ""
        for path in paths:
            try:
                reader = pa.ipc.open_file(pa.memory_map(str(path)))
                if reader.schema != schema_of(kind):
                    raise pa.ArrowInvalid(f"its columns are {', '.join(reader.schema.names)}")
                found = [reader.get_batch_with_custom_metadata(number) for number in range(reader.num_record_batches)]
            except FileNotFoundError as error:
                raise missing(path) from error
            except pa.ArrowException as error:
                raise corrupt(path, error) from error
            self.batches += [_Batch(one.batch) for one in found if one.batch.num_rows]
            self.digest = dict(found[-1].custom_metadata or {}).get(DIGEST, b"").decode()
        self.starts = [0, *itertools.accumulate(batch.num_rows for batch in self.batches)]

    def __len__(self) -> int:
        return self.starts[-1]

    @overload
    def __getitem__(self, index: int) -> R: ...
    @overload
    def __getitem__(self, index: slice) -> list[R]: ...
    def __getitem__(self, index: int | slice) -> R | list[R]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        number = index % len(self)
        batch = bisect.bisect_right(self.starts, number) - 1
        return self.batches[batch].row(number - self.starts[batch], self.kind)

    def __iter__(self) -> Iterator[R]:
        for batch in self.batches:
            for row in range(batch.num_rows):
                yield batch.row(row, self.kind)

    def num_tokens(self, column: str) -> np.ndarray:
        """The number of tokens in each row, without making one."""
        return np.concatenate([np.zeros(0, np.int64), *(np.diff(batch.ends[column]) for batch in self.batches)])

    def column(self, name: str) -> Iterator[Any]:
        """A column of numbers or text, row by row, without the rest of the rows."""
        for batch in self.batches:
            yield from batch.plain[name].to_pylist()


def num_tokens_of(rows: Sequence[Any], column: str) -> np.ndarray:
    """The number of tokens in each row, of a table or of rows in memory."""
    if isinstance(rows, Table):
        return rows.num_tokens(column)
    return np.array([len(vars(row)[column]) for row in rows], np.int64)


def column_of(rows: Sequence[Any], name: str) -> Iterator[Any]:
    """A column of numbers or text, of a table or of rows in memory."""
    return rows.column(name) if isinstance(rows, Table) else (vars(row)[name] for row in rows)


class _Batch:
    """Views into the mapped pages of one batch."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.num_rows = batch.num_rows
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        tokens = {name: column for name, column in columns.items() if pa.types.is_list(column.type)}
        self.plain = {name: column for name, column in columns.items() if name not in tokens}
        self.ends = {name: _numbers(column.offsets) for name, column in tokens.items()}
        self.values = {name: _numbers(column.values) for name, column in tokens.items()}

    def row(self, number: int, kind: type[R]) -> R:
        """A row, as the dataclass that it was."""
        fields = {name: column[number].as_py() for name, column in self.plain.items()}
        for name, values in self.values.items():
            start, stop = self.ends[name][number : number + 2]
            fields[name] = tuple(values[start:stop].tolist())
        return record_of(kind, fields)


def _numbers(column: pa.Int32Array) -> np.ndarray:
    """The mapped page itself; `to_numpy` would import pandas first."""
    _, data = column.buffers()
    found = np.frombuffer(data, np.int32) if data is not None else np.zeros(0, np.int32)
    return found[column.offset : column.offset + len(column)]
