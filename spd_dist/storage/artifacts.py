"""Files that appear whole: written beside, synced, renamed. JSON Lines that survive a kill."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import socket
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from safetensors import SafetensorError, safe_open

from spd_dist.errors import MAKE_ROOM, DataError, MissingError, writing

if TYPE_CHECKING:
    from torch import Tensor

PARTIAL = ".partial"


class TensorFile(NamedTuple):
    """What a safetensors file holds."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


@contextmanager
def replacing(path: str | Path) -> Generator[Path]:
    """A path beside `path` to write to: it takes the place of `path` when the body is done, and is removed if it fails.

    Raises:
        DataError: the disk is full or may not be written.
    """
    path = Path(path)
    partial = partial_path(path)
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _make_own(partial)
            yield partial
            if partial.is_symlink():
                raise DataError(f"{partial} became a link while it was written; see who else may write {path.parent}")
            _sync(partial)
            os.replace(partial, path)
            _sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def partial_path(path: Path) -> Path:
    """Where `path` is written before it is renamed: a name of this process, since array jobs share run folders."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}{PARTIAL}")


def _make_own(path: Path) -> None:
    """An empty file that was not there before: what somebody has put under its name, as a link, is not written to."""
    path.unlink(missing_ok=True)
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666))


def clear_folder(path: Path) -> None:
    """Remove a folder, or a link that somebody has put in its place."""
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` whole."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write plain data as indented JSON; NaN and infinities are refused, since other readers do."""
    write_text(path, as_json(value, indent=2) + "\n")


def as_json(value: Any, indent: int | None = None) -> str:
    """Plain data as JSON that UTF-8 can hold: half a surrogate pair, which it cannot, is escaped."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, indent=indent, allow_nan=False)
    return text


def parse_json(text: str | bytes) -> Any:
    """The data of a JSON text that we wrote; Python would also take NaN and infinity, which we write nowhere.

    Raises:
        ValueError: it is none.
    """
    return json.loads(text, parse_constant=_finite, parse_float=_finite)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def read_json(path: str | Path) -> Any:
    """The data of a JSON file.

    Raises:
        DataError: the file is missing or not JSON.
    """
    try:
        return parse_json(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise missing(path) from error
    except (ValueError, RecursionError) as error:
        raise corrupt(path, error) from error


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors and string metadata as safetensors, from whatever device they are on: the same to the same bytes.

    Raises:
        DataError: the disk is full or may not be written.
    """
    from safetensors.torch import save_file  # and so torch, which takes seconds: JSON and text need none of it

    with replacing(path) as partial:
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, dict(metadata or {}))
        except SafetensorError as error:
            raise DataError(f"{path} cannot be written: {error}; {MAKE_ROOM}") from error
        _sort_metadata(partial)


def _sort_metadata(path: Path) -> None:
    """Order the names in a safetensors header, which the library writes in another order each time."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # as it was, but for the order
            file.seek(8)
            file.write(text.ljust(length))


def read_tensors(path: str | Path) -> TensorFile:
    """The tensors, on the CPU, and the metadata of a safetensors file.

    Raises:
        DataError: the file is missing or not safetensors.
    """
    try:
        with safe_open(path, "pt") as file:
            return TensorFile({name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {})  # noqa: SIM118
    except FileNotFoundError as error:
        raise missing(path) from error
    except SafetensorError as error:
        raise corrupt(path, error) from error


def sha256_of(path: str | Path) -> str:
    """The hash of a file's bytes."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise missing(path) from error


def content_hash(value: Any) -> str:
    """The hash of plain data (numbers, strings, lists, mappings), whatever the order of keys; a tuple is a list."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return hashlib.sha256(json.dumps(value, sort_keys=True, default=_listed).encode()).hexdigest()
    digest, before = hashlib.sha256(), "["  # item by item, as the text of a million rows takes GiB
    for item in value:
        digest.update((before + json.dumps(item, sort_keys=True, default=_listed)).encode())
        before = ", "
    digest.update(b"]" if len(value) else b"[]")
    return digest.hexdigest()


def _listed(value: Any) -> list[Any]:
    """For JSON, which knows no sequence but lists: rows may lie in a file."""
    if isinstance(value, Sequence):
        return list(value)
    raise TypeError(f"{type(value).__name__} is not plain data")


def missing(path: str | Path) -> MissingError:
    """The error for an artifact that is not there, in a run that has not come to it, or under a wrong path."""
    folder = os.path.dirname(path) or "."
    if os.path.isdir(folder) or any((above / "config.yaml").exists() for above in Path(folder).parents):
        why = "the run is not finished, or the path is wrong; finish it first, by the same command without --from"
    else:
        why = f"there is no folder {folder}; correct the path"
    return MissingError(f"{path} is missing: {why}")


def corrupt(path: str | Path, error: Exception) -> DataError:
    """The error for an artifact that cannot be read."""
    return DataError(f"{path} is corrupt ({error}); delete it and start the same command again: its stage is redone")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
        line = (as_json(row) + "\n").encode()
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
            row = parse_json(line)
        except (ValueError, RecursionError) as error:
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
