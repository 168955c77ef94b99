"""Parts of a corpus become the finished one, in one pass, holding 16 bytes a completion and never the completions."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np

from spd_dist.errors import DataError
from spd_dist.storage.artifacts import corrupt, replacing
from spd_dist.storage.completions import TABLE, differing, parse_line, parts
from spd_dist.storage.keyed_parts import Key
from spd_dist.storage.tables import TableWriter
from spd_dist.types import Completion

HEAD = re.compile(rb'\{"id": ("(?:[^"\\]|\\.)*"), "sample": (\d+), ')
"""How a line begins: its key, found without parsing the tokens."""


class LocatedLines:
    """Where the line of each key stands in the parts: 16 bytes a completion, and an open file a part."""

    def __init__(self, files: Sequence[Path], number_of: Callable[[str, int], int], total: int) -> None:
        """What is to be read; to enter the context reads it.

        `number_of` gives a key's place among the `total` of the corpus; it raises a `DataError` for a key that has
        none.
        """
        self.files, self.number_of = list(files), number_of
        self.handles: list[BinaryIO] = []
        self.file_N = np.full(total, -1, np.int32)
        self.start_N, self.size_N = np.zeros(total, np.int64), np.zeros(total, np.int32)

    def __enter__(self) -> LocatedLines:
        """Read the head of every line.

        Raises:
            DataError: a line has no place, is no completion, or differs from another of its key.
        """
        _allow_open_files(len(self.files))
        with ExitStack() as stack:
            self.handles = [stack.enter_context(open(file, "rb")) for file in self.files]
            for index, handle in enumerate(self.handles):
                for start, line in whole_lines(handle):
                    self._take(self.number_of(*self._key(index, start, line)), index, start, line)
            self.opened = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.opened.close()

    def _take(self, number: int, index: int, start: int, line: bytes) -> None:
        if self.file_N[number] < 0:
            self.file_N[number], self.start_N[number], self.size_N[number] = index, start, len(line)
        elif self.line(number) != line:  # as bytes; two ways to write one completion are none of ours
            completion = self.parsed(number, line)
            raise differing(completion.id, completion.sample)

    def _key(self, index: int, start: int, line: bytes) -> Key:
        head = HEAD.match(line)
        if head is not None:
            return json.loads(head[1]), int(head[2])
        completion = self._parsed(index, start, line)
        return completion.id, completion.sample

    def _parsed(self, index: int, start: int, line: bytes) -> Completion:
        try:
            return parse_line(line)
        except (ValueError, RecursionError) as error:
            number = 1 + sum(begin < start for begin, _ in whole_lines(self.handles[index]))
            if isinstance(error, DataError):
                raise DataError(f"{self.files[index]}, line {number}: {error}") from error
            raise corrupt(f"{self.files[index]}, line {number}", error) from error

    @property
    def num_found(self) -> int:
        """Keys that have a line."""
        return int((self.file_N >= 0).sum())

    def line(self, number: int) -> bytes:
        """The line at a place of the corpus, with its end."""
        handle = self.handles[self.file_N[number]]
        return os.pread(handle.fileno(), int(self.size_N[number]), int(self.start_N[number]))

    def parsed(self, number: int, line: bytes) -> Completion:
        """The completion of the line at a place of the corpus.

        Raises:
            DataError: it is none.
        """
        return self._parsed(int(self.file_N[number]), int(self.start_N[number]), line)


def _allow_open_files(count: int) -> None:
    """A part of each rank of each attempt may be more than a process may open unless it asks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count + 256 <= hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count + 256, hard))


def write_merged(
    lines: LocatedLines, path: Path, *, see: Callable[[int, Completion], None], check: Callable[[], None]
) -> None:
    """Write the corpus in its order.

    `see` is given each completion with its place; `check` is called before the file gets its name: if it raises, there
    is none.
    """
    with replacing(path) as partial:
        (_write_table if path.name == TABLE else _write_text)(lines, partial, see)
        check()


def _write_text(lines: LocatedLines, partial: Path, see: Callable[[int, Completion], None]) -> None:
    with open(partial, "wb") as text:
        for number in range(len(lines.file_N)):
            line = lines.line(number)
            see(number, lines.parsed(number, line))
            text.write(line)


def _write_table(lines: LocatedLines, partial: Path, see: Callable[[int, Completion], None]) -> None:
    """The digest is that of the text, whatever the batches."""
    table, digest = TableWriter(partial, Completion), hashlib.sha256()
    for number in range(len(lines.file_N)):
        line = lines.line(number)
        completion = lines.parsed(number, line)
        see(number, completion)
        table.write(completion)
        digest.update(line)
    table.close(digest.hexdigest())


def remove_parts(folder: Path) -> None:
    """Remove the parts of a corpus that is merged."""
    for part in parts(folder):
        part.unlink(missing_ok=True)


def whole_lines(handle: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Where each line of a file starts, and the line with its end; a last line without one is none yet."""
    start = handle.seek(0)
    for line in handle:
        if line.endswith(b"\n"):
            yield start, line
        start += len(line)
