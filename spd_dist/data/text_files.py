"""Rows of text files, JSON Lines, JSON, CSV and TSV: read strictly, each with its line; and many rows on the disk."""

from __future__ import annotations

import ast
import contextlib
import csv
import io
import itertools
import json
import mmap
import pickle
import re
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, overload

from spd_dist.errors import DataError, writing

MAX_DEPTH = 32
"""Lists in lists: no data set is deeper, and what is endless would end in a traceback."""
Numbered = Iterator[tuple[int, str, dict[str, Any]]]
"""Rows, each with its number in the file and the words for its place."""
_SURROGATE = re.compile("[\ud800-\udfff]")
_LIST_CELL = re.compile(r"\s*\[\s*(?:['\"{].*)?\]\s*", re.DOTALL)


MOST_IN_MEMORY = 100_000
"""Rows; each takes about 1 KiB as Python objects, on every rank."""


def held(rows: Iterable[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """`rows` in memory, or, if they are more than `MOST_IN_MEMORY`, in a file without a name that this process maps."""
    rows = iter(rows)
    first = list(itertools.islice(rows, MOST_IN_MEMORY + 1))
    return first if len(first) <= MOST_IN_MEMORY else FiledRows.of(itertools.chain(first, rows))


class FiledRows(Sequence[dict[str, Any]]):
    """Rows of a file, each made when it is asked for; a slice of many shares the file."""

    def __init__(self, text: mmap.mmap, ends: array[int], places: range) -> None:
        """`ends[i]` is where row i ends, and the next begins; `places` are the rows that are meant."""
        self.text, self.ends, self.places = text, ends, places

    @classmethod
    def of(cls, rows: Iterable[dict[str, Any]]) -> FiledRows:
        """Write them below TMPDIR, to a file that ends with this process.

        Raises:
            DataError: the disk is full or may not be written.
        """
        ends = array("q", [0])
        folder = tempfile.gettempdir()
        with contextlib.ExitStack() as opened:
            with writing(folder):
                file = opened.enter_context(tempfile.TemporaryFile(dir=folder))
            for row in rows:
                line = pickle.dumps(row, pickle.HIGHEST_PROTOCOL)
                with writing(folder):
                    ends.append(ends[-1] + file.write(line))
            with writing(folder):
                file.flush()
            text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return cls(text, ends, range(len(ends) - 1))

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[dict[str, Any]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Any] | Sequence[dict[str, Any]]:
        if isinstance(index, slice):
            part = FiledRows(self.text, self.ends, self.places[index])
            return part if len(part) > MOST_IN_MEMORY else list(part)
        place = self.places[index]
        return pickle.loads(self.text[self.ends[place] : self.ends[place + 1]])  # what `of` has written


def read_jsonl(stream: IO[bytes], name: str) -> Numbered:
    """An object a line; empty lines are left out."""
    for number, line in enumerate(stream, 1):
        if line.strip():
            row = _parsed(line, f"{name}, line {number}", "write one object a line")
            if not isinstance(row, dict):
                raise DataError(f"{name}, line {number}: {shown(row)} is not a JSON object; write one object a line")
            yield number, f"line {number}", row


def read_json(stream: IO[bytes], name: str) -> Numbered:
    """A list of objects, an object of columns, or in truth JSON Lines."""
    text = stream.read()
    first, *rest = [line for line in text.splitlines() if line.strip()] or [b"[]"]
    if rest and first.lstrip(b"\xef\xbb\xbf \t").startswith(b"{") and first.rstrip().endswith(b"}"):
        yield from read_jsonl(io.BytesIO(text), name)
        return
    remedy = "write a list of objects, or one object a line in a .jsonl"
    whole = _parsed(text, name, remedy)
    for number, row in enumerate(_rows_of(whole), 1):
        if not isinstance(row, dict):
            raise DataError(f"{name}, row {number}: {shown(row)} is not a JSON object; {remedy}")
        yield number, f"row {number}", row


def _rows_of(whole: Any) -> Sequence[Any]:
    if isinstance(whole, list):
        return whole
    columns = list(whole.values()) if isinstance(whole, dict) else []
    if columns and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        inner = [column for column in columns if all(isinstance(row, dict) for row in column)]
        if len(columns) == len(inner) == 1:
            return inner[0]
        return [dict(zip(whole, cells, strict=True)) for cells in zip(*columns, strict=True)]
    return [whole]


def _parsed(text: bytes, where: str, remedy: str) -> Any:
    try:
        value = json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error}); convert it, as by iconv -t UTF-8") from error
    except RecursionError as error:
        raise DataError(f"{where}: lists or objects lie deeper than {MAX_DEPTH} in one another; flatten it") from error
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); {remedy}") from error
    if b"\\u" in text or text.count(b"[") + text.count(b"{") > MAX_DEPTH:
        _check_inside(value, where, "", MAX_DEPTH)
    return value


def _check_inside(value: Any, where: str, name: str, depth: int) -> None:
    """Refuse half of a surrogate pair, which no text may hold, and what is too deep."""
    if isinstance(value, str):
        found = _SURROGATE.search(value)
        if found:
            raise DataError(
                f"{where}{name}: holds \\u{ord(found[0]):04x}, half of a character, which is no text; write the pair, "
                "or drop the row"
            )
    elif isinstance(value, (list, dict)):
        if depth == 0:
            raise DataError(f"{where}{name}: lists or objects lie deeper than {MAX_DEPTH} in one another; flatten it")
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_inside(str(key), where, name, depth)
            _check_inside(item, where, name or (f", field {key!r}" if isinstance(key, str) else ""), depth - 1)


def read_csv(stream: IO[bytes], name: str, delimiter: str = ",") -> Numbered:
    """Every cell is text, but for one that holds a list of texts or of objects: choices, tests, messages."""
    lines = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    limit = csv.field_size_limit(2**31 - 1)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        twice = sorted({column for column in header if header.count(column) > 1})
        if twice:
            raise DataError(f"{name}, line 1: the columns {twice} stand twice; name each once")
        number, first = 0, reader.line_num + 1
        for cells in reader:
            place, first = f"line {first}", reader.line_num + 1
            if not cells:
                continue
            number += 1
            if len(cells) != len(header):
                raise DataError(
                    f"{name}, {place}: {len(cells)} cells, but the header has {len(header)}; quote what holds a "
                    "delimiter, or correct the row"
                )
            yield number, place, {column: _cell(cell) for column, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise DataError(
            f"{name}, line {reader.line_num}: not readable as CSV: {error}; quote cells as in RFC 4180"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 ({error}); convert it, as by iconv -t UTF-8") from error
    finally:
        csv.field_size_limit(limit)
        lines.detach()


def read_tsv(stream: IO[bytes], name: str) -> Numbered:
    """As CSV, with tabs."""
    return read_csv(stream, name, "\t")


def _cell(text: str) -> Any:
    """The list that a cell holds as JSON, or as pandas writes one; else the text."""
    if not _LIST_CELL.fullmatch(text) or text.strip() == "[]":
        return text
    for parse, is_so_written in (
        (json.loads, lambda value: True),
        (ast.literal_eval, lambda value: repr(value) == text),
    ):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(value, list) and all(isinstance(item, (str, dict)) for item in value) and is_so_written(value):
            return value
    return text


def shown(value: Any) -> str:
    """A value for an error: as Python writes it, but short."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
