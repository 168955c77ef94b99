"""Rows of local files: JSON Lines, JSON, CSV, TSV, Parquet and Arrow, compressed or not; each with its place.

Data sets of the Hugging Face hub are asked for by one rank of a host, and read by the others as its cache has them.
Files it would read, too, but it guesses types (`007` becomes 7), keeps copies, and can't say which line is wrong.
"""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import lzma
import math
import os
import re
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from spd_dist.data.text_files import Numbered, read_csv, read_json, read_jsonl, read_tsv
from spd_dist.errors import DataError, named_path

if TYPE_CHECKING:
    import datasets

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_REFUSED = (".txt", ".zip", ".xml", ".xlsx", ".pkl", ".tar")

HubKey = tuple[str, str, str, str | None]
"""Name, config, split and revision of a data set of the hub."""

_files: dict[HubKey, list[str]] = {}
"""Arrow files of this host that hold exactly those rows: read with no question to the hub."""


@dataclass(frozen=True)
class Located:
    """A row as it was read, and where, for the error that may name it."""

    path: str
    line: str
    row: dict[str, Any]
    subset: str = ""
    long_id: str = ""
    """What tells it from a row of another file of the same name, if it has no `id` of its own."""

    @property
    def where(self) -> str:
        """Path and line."""
        return f"{self.path}, {self.line}" if self.line else self.path


def is_file_name(text: str) -> bool:
    """Whether `text` names local files: by suffix, as a pattern, or as a path; else it is a data set of the hub."""
    endings = tuple(f"{ending}{packed}" for ending in FORMATS + _REFUSED for packed in ("", *COMPRESSIONS))
    return text.endswith(endings) or text.startswith(("/", "./", "../", "~")) or re.search(r"[*?]", text) is not None


def read_rows(name: str) -> Iterator[Located]:
    """The rows of a file, or of all files that a pattern names, in the order of their names; each as it is read.

    A row without `id` takes its number in its file.

    Raises:
        DataError: no such file, another format, or a row that cannot be read; it names the place.
    """
    return (row for path in _paths(name) for row in _read_file(path))


def _paths(name: str) -> list[str]:
    path = named_path(name)
    if path.exists() or not re.search(r"[*?\[]", name):
        return [name]
    found = sorted(glob.glob(str(path), recursive=True))
    if not found:
        raise DataError(f"{name}: no file matches this pattern (from {Path.cwd()}); correct it")
    return found


_Reader = Callable[[IO[bytes], str], Numbered]


def _read_file(name: str) -> Iterator[Located]:
    path = named_path(name)
    packing = path.suffix if path.suffix in COMPRESSIONS else ""
    bare = path.with_suffix("") if packing else path
    if not path.exists():
        raise DataError(f"{name}: no such file (from {Path.cwd()}); correct the path, or name a data set of the hub")
    if bare.suffix not in _READERS or not path.is_file():
        raise DataError(
            f"{name}: a local file must be {', '.join(FORMATS)}, which may end in {', '.join(COMPRESSIONS)}; "
            "convert it, one row a line"
        )
    try:
        with _opened(path, packing) as stream:
            for number, place, row in _READERS[bare.suffix](stream, name):
                yield located(name, place, row, (bare.stem, str(bare), number))
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        kind = f" as {packing}" if packing else ""
        raise DataError(f"{name}: not readable{kind}: {error}; write it again") from error


def located(path: str, place: str, row: Mapping[str, Any], names: tuple[str, str, int], subset: str = "") -> Located:
    """A row with its place; without an `id` it gets one of `names`: its file, the same as a path, and its number."""
    if row.get("id") is not None:
        return Located(path, place, dict(row), subset)
    short, long, number = names
    own = {name: value for name, value in row.items() if name != "id"}
    return Located(path, place, {"id": f"{short}/{number}", **own}, subset, f"{long}/{number}")


@contextmanager
def _opened(path: Path, packing: str) -> Generator[IO[bytes]]:
    openers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, "": open}
    if packing in openers:
        with openers[packing](path, "rb") as stream:
            yield cast("IO[bytes]", stream)  # all of them read bytes
        return
    import pyarrow

    with pyarrow.CompressedInputStream(str(path), "zstd") as stream:
        yield io.BytesIO(stream.read())


def _read_parquet(stream: IO[bytes], name: str) -> Numbered:
    import pyarrow.parquet

    return _rows_of(lambda: pyarrow.parquet.read_table(stream), "Parquet", name)


def _read_arrow(stream: IO[bytes], name: str) -> Numbered:
    import pyarrow.ipc

    whole = stream.read()
    opened = pyarrow.ipc.open_file if whole.startswith(b"ARROW1") else pyarrow.ipc.open_stream
    return _rows_of(lambda: opened(io.BytesIO(whole)).read_all(), "Arrow", name)


def _rows_of(read: Callable[[], Any], form: str, name: str) -> Numbered:
    import pyarrow

    try:
        rows = read().to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        fault = " ".join(str(error).split())
        raise DataError(f"{name}: not readable as {form}: {fault}; write it again, or use .jsonl") from error
    for number, row in enumerate(rows, 1):
        yield number, f"row {number}", row


_READERS: Mapping[str, _Reader] = {
    ".jsonl": read_jsonl, ".ndjson": read_jsonl, ".json": read_json, ".csv": read_csv, ".tsv": read_tsv,
    ".parquet": _read_parquet, ".arrow": _read_arrow,
}  # fmt: skip


def read_saved(name: str, split: str) -> Iterator[Located]:
    """The rows of a folder that `datasets` has saved (`save_to_disk`), of its split if it holds several.

    Raises:
        DataError: it can't be read, or has no such split.
    """
    import datasets  # seconds to import, and most runs read files
    import datasets.exceptions

    folder = named_path(name)
    try:
        saved = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{name}: not readable as a folder of datasets.save_to_disk: {error}; save it again") from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DataError(
                f"{name}: has no split {split!r}, of {', '.join(map(str, saved))}; name one: "
                f"{name}::{next(iter(saved))}"
            )
        saved = saved[split]
    for number, row in enumerate(saved, 1):
        yield located(name, f"row {number}", dict(row), (folder.name, str(folder), number))


def hub_rows(key: HubKey) -> datasets.Dataset:
    """The rows of a data set.

    Raises:
        DataError: the hub has no such data set, or is silent.
    """
    names = _files.get(key, [])
    # Two containers may call themselves the same host, and see other files.
    return _of_files(names) if names and all(map(os.path.exists, names)) else _load_hub(key)


def fetch_from_hub(keys: Iterable[HubKey]) -> dict[HubKey, list[str]]:
    """Ask the hub for data sets, and give the files in which this host's cache has them; for `use_files` elsewhere.

    Raises:
        DataError: the hub has no such data set, or is silent.
    """
    found = {key: _load_hub(key) for key in keys}
    files = {key: [file["filename"] for file in rows.cache_files] for key, rows in found.items()}
    # A part of a split is a part of the files, which do not tell which.
    return {key: names for key, names in files.items() if names and len(_of_files(names)) == len(found[key])}


def use_files(files: Mapping[HubKey, list[str]]) -> None:
    """Read these data sets from files of this host from now on."""
    _files.update(files)


def _load_hub(key: HubKey) -> datasets.Dataset:
    import datasets  # seconds to import, and most runs read local files
    import datasets.exceptions

    name, subset, split, revision = key
    where = ":".join(filter(None, (name, subset, split)))
    pinned = f"@{revision}" if revision else ""
    try:
        return datasets.load_dataset(str(named_path(name)), subset or None, split=split, revision=revision)
    except (OSError, ValueError, IndexError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"hub data set {where}{pinned}: cannot be loaded: {error}; check name, revision, config and split, the "
            "network and HF_HUB_OFFLINE, or give a local path: data.train=rows.jsonl"
        ) from error


def _of_files(names: Sequence[str]) -> datasets.Dataset:
    import datasets

    return datasets.concatenate_datasets([datasets.Dataset.from_file(name) for name in names])


def is_folder(name: str) -> bool:
    """Whether there is a local folder of this name."""
    return bool(name) and named_path(name).is_dir()


def is_saved(name: str) -> bool:
    """Whether a folder was written by `datasets.save_to_disk`."""
    folder = named_path(name)
    return any((folder / file).is_file() for file in ("dataset_dict.json", "state.json"))


def text_of(value: Any) -> str | None:
    """A number as the text that a table shows (7 and 7.0 are `7`), text as it is; None for what is neither."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return str(int(value)) if value == int(value) and abs(value) < 2**53 else str(value)
