"""Records with a key, a JSON line each, as ranks write them together: parts that become one file.

While a stage is at work each rank appends to a part of its own; the merged file replaces them, and is the same whatever
the world size was, and however often the run was killed. A key is an id and the number of a sample: whoever wrote a
line, of one key there is one content.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from spd_dist.errors import DataError
from spd_dist.storage.artifacts import as_json, read_jsonl, write_text
from spd_dist.storage.records import parse_record, wrong_names

Key = tuple[str, int]


class Keyed(Protocol):
    """A dataclass whose fields are text, numbers and tuples of them."""

    @property
    def id(self) -> str:
        """Of a row or prompt."""
        ...

    @property
    def sample(self) -> int:
        """Which of several, from 0."""
        ...


K = TypeVar("K", bound=Keyed)


def part_path(merged: Path, rank: int, world_size: int) -> Path:
    """What one rank appends to."""
    return merged.with_name(f"{merged.stem}.part-{rank:05d}-of-{world_size:05d}.jsonl")


def parts(merged: Path) -> list[Path]:
    """All parts, of any attempt and world size."""
    return sorted(merged.parent.glob(f"{glob.escape(merged.stem)}.part-*.jsonl"))  # an arm's name may hold brackets


def read_lines(path: Path, kind: type[K]) -> list[K]:
    """The records of a file; a torn last line is none.

    Raises:
        DataError: the file is missing, or a line is no such record.
    """
    found: list[K] = []
    for number, row in enumerate(read_jsonl(path), 1):
        if wrong := wrong_names(kind, row):
            named = f"not {_words(kind)} ({', '.join(wrong)} missing or unknown)"
            raise DataError(f"{path}, line {number}: {named}; delete that file")
        found.append(parse_record(Path(f"{path}, line {number}"), kind, row))
    return found


def _words(kind: type[object]) -> str:
    """`an answer` for `Answer`."""
    words = re.sub(r"(?<!^)(?=[A-Z])", " ", kind.__name__).lower()
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def read_parts(merged: Path, kind: type[K]) -> dict[Key, K]:
    """Every record that there is, by key: of the merged file, or of the parts.

    Raises:
        DataError: a line is no such record, or two of one key differ.
    """
    files = [merged] if merged.exists() else parts(merged)

    def differing(name: str, sample: int) -> DataError:
        return DataError(
            f"{merged}: two lines of {name!r}, sample {sample}, differ: these are parts of two settings or kinds of "
            f"machine; delete {merged.parent} and start the same command again"
        )

    return without_repeats((one for file in files for one in read_lines(file, kind)), differing)


def without_repeats(records: Iterable[K], differing: Callable[[str, int], DataError]) -> dict[Key, K]:
    """By key. Workers that share a folder may have made one twice; it must then be the same.

    Raises:
        DataError: that of `differing`, where two of one key do.
    """
    by_key: dict[Key, K] = {}
    for record in records:
        key = (record.id, record.sample)
        if by_key.setdefault(key, record) != record:
            raise differing(*key)
    return by_key


def merge_parts(merged: Path, kind: type[K], keys: Sequence[Key], expected: str) -> list[K]:
    """The records of `keys`, in that order, and the merged file of them, which is written unless it is there.

    `keys` are of all that there must be, each once, and `expected` says in words what that is: `12 completions`.

    Raises:
        DataError: a line is no such record, two of one key differ, or there are others than those of `keys`.
    """
    by_key = read_parts(merged, kind)
    if by_key.keys() != set(keys):
        wrong = sorted(by_key.keys() ^ set(keys))
        raise DataError(
            f"{merged} has {len(by_key)} lines, and there must be {expected} ({wrong[0]!r} is in one only); delete "
            f"{merged.parent} and start the same command again"
        )
    found = [by_key[key] for key in keys]
    if not merged.exists():
        write_merged(merged, found)
    return found


def write_merged(merged: Path, records: Iterable[Keyed]) -> None:
    """Write the records whole, then remove the parts."""
    lines = [as_json(vars(record)) + "\n" for record in records]
    write_text(merged, "".join(lines))
    for part in parts(merged):
        part.unlink()
