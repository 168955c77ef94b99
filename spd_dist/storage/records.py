"""What a run folder holds as JSON: frozen dataclasses, each file with the version of the format beside its fields.

A file of another version is refused by one sentence, never read in part: a folder belongs to the version that made it.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from spd_dist.errors import DataError
from spd_dist.storage.artifacts import corrupt, missing, read_json, write_json
from spd_dist.types import ADDED_LATER, Json, record_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

R = TypeVar("R")

SCHEMA = 3
"""The version of what is written into run folders; a change of a record's fields raises it, but for `ADDED_LATER`."""
KEY = "schema"


def write_record(path: Path, record: DataclassInstance) -> None:
    """Write a record whole, with the version.

    Raises:
        DataError: the disk is full or may not be written.
    """
    write_json(path, {KEY: SCHEMA, **dataclasses.asdict(record)})


def read_record(path: Path, kind: type[R]) -> R:
    """The record of a file.

    Raises:
        MissingError: there is no such file.
        DataError: it is of another version, or no such record.
    """
    return parse_record(path, kind, read_fields(path))


def read_fields(path: Path) -> dict[str, Json]:
    """The fields of a record, as JSON has them: to be shown as they are, whatever record it is.

    Raises:
        MissingError: there is no such file.
        DataError: it is of another version.
    """
    data = read_json(path)
    check_schema(path, data)
    return {name: value for name, value in data.items() if name != KEY}


def read_object(path: Path) -> dict[str, Json]:
    """The object of a JSON file that is no record of ours.

    Raises:
        DataError: the file is missing, not JSON, or holds anything else.
    """
    data = read_json(path)
    if not isinstance(data, dict):
        raise corrupt(path, ValueError(f"a {type(data).__name__} and no object"))
    return data


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        DataError: the file is missing, or no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise missing(path) from error
    except UnicodeDecodeError as error:
        raise corrupt(path, error) from error


def check_schema(path: Path, data: Any) -> None:
    """See that a file of a run folder, whose JSON is `data`, is of this version.

    Raises:
        DataError: it is of another one.
    """
    found = data.get(KEY, 1) if isinstance(data, Mapping) else 1
    if found != SCHEMA:
        raise DataError(
            f"{path} is of version {found} of run folders, and this spd_dist reads and writes version {SCHEMA}; finish "
            "with the spd_dist that made it, or name another run_dir"
        )


def parse_record(path: Path, kind: type[R], data: Any) -> R:
    """Plain data, as JSON holds it, as the dataclass `kind`; lists become tuples, and objects dataclasses or dicts.

    Raises:
        DataError: a field is missing, unknown, or of another type, in the file `path`.
    """
    try:
        return _parsed(data, kind)
    except (TypeError, ValueError) as error:
        raise corrupt(path, error) from error


def _parsed(value: Any, hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _dataclass(value, hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None and type(None) in arguments else _one_of(value, arguments)
    if origin is typing.Literal:
        if value not in arguments:
            raise ValueError(f"{value!r} is none of {', '.join(map(str, arguments))}")
        return value
    if origin is not None and issubclass(origin, Mapping):
        return {key: _parsed(item, arguments[1]) for key, item in _of(value, Mapping).items()}
    if origin is not None and issubclass(origin, Sequence):
        items = _of(value, list)
        hints = arguments if len(arguments) == len(items) and ... not in arguments else arguments[:1] * len(items)
        parsed = [_parsed(item, each) for item, each in zip(items, hints, strict=True)]
        return parsed if origin is list else tuple(parsed)
    return value if hint in (Any, object) or (hint is float and type(value) is int) else _of(value, hint)


def _dataclass(value: Any, kind: Any) -> Any:
    hints = _hints(kind)
    if wrong := wrong_names(kind, _of(value, Mapping)):
        raise ValueError(f"{', '.join(wrong)}: missing or unknown")
    return record_of(kind, {name: _parsed(item, hints[name]) for name, item in value.items()})


def wrong_names(kind: Any, fields: Iterable[str]) -> list[str]:
    """What there is among `fields` that a record has not, and what it has and is not among them, in order."""
    found, known = set(fields), dataclasses.fields(kind)
    needed = {item.name for item in known if not item.metadata.keys() >= ADDED_LATER.keys()}
    return sorted(found - {item.name for item in known} | needed - found)


@functools.cache
def _hints(kind: Any) -> Mapping[str, Any]:
    return typing.get_type_hints(kind)


def _one_of(value: Any, choices: Sequence[Any]) -> Any:
    for choice in choices:
        try:
            return _parsed(value, choice)
        except (TypeError, ValueError):
            continue
    raise ValueError(f"{value!r} is none of {', '.join(map(str, choices))}")


def _of(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind) or (kind in (int, float) and isinstance(value, bool)):
        raise ValueError(f"{value!r} is no {kind.__name__}")
    return value
