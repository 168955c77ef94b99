"""Rows from where a config says: the Hugging Face hub, local files and folders, or built in."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NoReturn

from spd_dist.config import Data
from spd_dist.data.arithmetic import SPLIT_SIZES, generate_rows
from spd_dist.data.leaks import LeakReport, find_leaks, without_leaks
from spd_dist.data.readers import (
    HubKey,
    Located,
    hub_rows,
    is_file_name,
    is_folder,
    is_saved,
    located,
    read_rows,
    read_saved,
    text_of,
)
from spd_dist.data.tasks.protocol import Row, Split, Task
from spd_dist.data.text_files import held, shown
from spd_dist.errors import DataError


@dataclass(frozen=True)
class Source:
    """One source, parsed."""

    name: str
    subset: str
    split: str
    rows: slice
    revision: str | None = None
    """Branch, tag or commit on the hub."""

    @property
    def key(self) -> HubKey:
        """Of its data set, whole."""
        return self.name, self.subset, self.split, self.revision


def load_rows(task: Task, split: Split, config: Data) -> Sequence[Row]:
    """The rows of a split, each with an `id` of its own, in the order of their source.

    Calibration examples are the task's own split where it has one, else the training rows from the first on, whatever
    `data.num_train` says. `data.leaks=remove` drops the training and calibration rows whose problem is in the test
    split; `remove_all` also the training rows whose problem is in a calibration split of its own.

    Raises:
        DataError: no source; a file or line that cannot be read; a field missing or of another type; an id twice.
    """
    rows = _load_all(task, split, config)
    for other in _kept_apart(task, split, config):
        both = {split: rows, other: _load_all(task, other, config)}
        rows = held(without_leaks(rows, find_leaks(both, task, similarity=config.leak_similarity)))
        if not rows:
            raise DataError(
                f"data.leaks={config.leaks}: every {split} row is also in the {other} split; correct data.{split}"
            )
    return rows[: {"train": config.num_train, "calibration": None, "test": config.num_test}[split]]


def hub_keys(task: Task, split: Split, config: Data) -> list[HubKey]:
    """The data sets of the hub that the rows of a split, and those that they are compared with, are read from."""
    splits = (split, *_kept_apart(task, split, config))
    named = [source for one in splits if sources_of(task, one, config) for source in _named_sources(task, one, config)]
    return [source.key for source in named if _is_of_hub(source)]


def _kept_apart(task: Task, split: Split, config: Data) -> list[Split]:
    """The splits whose problems are removed from this one."""
    if split == "test" or config.leaks == "report":
        return []
    is_of_training = sources_of(task, "calibration", config) == sources_of(task, "train", config)
    if split == "train" and config.leaks == "remove_all" and not is_of_training:
        return ["test", "calibration"]
    return ["test"]


def check_leaks(task: Task, config: Data, *, num_calibration: int) -> list[LeakReport]:
    """What calibration, training and test rows of a run share; a split without a source is skipped."""
    limits: dict[Split, int | None] = {"calibration": num_calibration, "train": None, "test": None}
    used = {
        split: load_rows(task, split, config)[:limit]
        for split, limit in limits.items()
        if sources_of(task, split, config)
    }
    return find_leaks(used, task, similarity=config.leak_similarity)


def sources_of(task: Task, split: Split, config: Data) -> str | None:
    """Where the rows of a split come from: the config's word, else the task's; calibration falls back to training."""
    given = {"train": config.train, "calibration": config.calibration, "test": config.test}[split]
    if given or split != "calibration":
        return given or task.sources.get(split)
    own = None if config.train else task.sources.get("calibration")
    return own or sources_of(task, "train", config)


MOST_DIGITS = 18
"""Of a bound of a slice: what fits a machine word."""
PUBLISHED_TESTS: Mapping[str, str] = {
    "gsm8k": "b69f6af2f21d73ca",
    "svamp": "014c5ca183fc9b77",
    "mbpp": "beabfda66ffc3acf",
    "mbpp_sanitized": "d90473ff69f5c3b3",
    "mmlu": "e449aa7aab7dca97",
    "bbh": "73cdcd4407080dfa",
}
"""Task -> what `_digest` gives of its published test split."""


def published_size(task: Task, config: Data) -> int | None:
    """Rows of the task's published test split, if `data.test` is that split; None for any other rows."""
    if task.test_size is None or sources_of(task, "test", config) == task.sources.get("test"):
        return task.test_size
    rows = _load_all(task, "test", config)
    is_published = len(rows) == task.test_size and _digest(task, rows) == PUBLISHED_TESTS.get(task.name)
    return task.test_size if is_published else None


def _digest(task: Task, rows: Iterable[Row]) -> str:
    """A hash of problems and answers, whatever their order, white space and file format."""
    texts = sorted(" ".join(f"{task.problem(row)} {task.answer(row)}".split()) for row in rows)
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def _load_all(task: Task, split: Split, config: Data) -> Sequence[Row]:
    key = "data.train" if split == "calibration" and config.train and not config.calibration else f"data.{split}"
    named = _named_sources(task, split, config)
    located = (item for source in named for item in _read(source, config.seed))
    rows = held(_normalised(task, _named(located, key), key))
    if not rows:
        raise DataError(f"data.{split}: {sources_of(task, split, config)} holds no rows; name a source that does")
    return rows


def _named_sources(task: Task, split: Split, config: Data) -> list[Source]:
    sources = sources_of(task, split, config)
    if sources is None:
        raise DataError(f"data.{split}: the task {task.name!r} has no {split} split of its own; set data.{split}=PATH")
    default = "train" if split == "calibration" else split
    return [parse_source(text.strip(), default) for text in sources.split(",")]


def _named(rows: Iterable[Located], key: str) -> Iterator[Located]:
    """The same rows; what can't be read is said to be of `key`."""
    try:
        yield from rows
    except DataError as error:
        raise DataError(f"{key}: {error}") from error


def parse_source(text: str, split: str) -> Source:
    """`text` as a source; `split` is what the hub is asked for where the text does not say.

    Raises:
        DataError: it names nothing, what no file system takes, or a row that none has.
    """
    sliced = re.fullmatch(r"(.*)\[(-?\d*):(-?\d*)\]", text)
    text, *bounds = sliced.groups() if sliced else (text, "", "")
    if max(map(len, bounds)) > MOST_DIGITS:
        raise DataError(f"source {text[:60]!r}: a slice has more than {MOST_DIGITS} digits; no data set has such a row")
    rows = slice(*(int(bound) if bound else None for bound in bounds))
    if is_file_name(text) and not is_folder(text.partition(":")[0]):
        return Source(text, "", "", rows)
    name, subset, named_split = (*text.split(":", 2), "", "")[:3]
    name, _, revision = (name, "", "") if is_folder(name) else name.partition("@")
    if not name:
        raise DataError(f"source {text!r}: names nothing; give files, a folder, or NAME:CONFIG:SPLIT of the hub")
    return Source(name, subset, named_split or split, rows, revision or None)


def _read(source: Source, seed: int) -> Iterable[Located]:
    if source.name == "builtin":
        if source.subset != "arithmetic" or source.split not in SPLIT_SIZES:
            raise DataError(
                f"source builtin:{source.subset}:{source.split}: not built in; "
                f"there is builtin:arithmetic:SPLIT, of {', '.join(SPLIT_SIZES)}"
            )
        rows = (Located("builtin:arithmetic", "", row) for row in generate_rows(source.split, seed))
    elif is_file_name(source.name) and not is_folder(source.name):
        rows = read_rows(source.name)
    elif is_saved(source.name):
        rows = read_saved(source.name, source.split)
    else:
        rows = _read_hub(source)
    start, stop = source.rows.start or 0, source.rows.stop
    if start < 0 or (stop is not None and stop < 0):  # counted from the end, which is only known there
        return list(rows)[source.rows]
    return islice(rows, start, stop)


def _is_of_hub(source: Source) -> bool:
    is_local = is_file_name(source.name) or is_saved(source.name) or is_folder(source.name)
    return source.name != "builtin" and not is_local


def _read_hub(source: Source) -> Iterator[Located]:
    where = ":".join(filter(None, (source.name, source.subset, source.split)))
    for index, row in enumerate(hub_rows(source.key)):
        yield located(where, f"row {index}", dict(row), (where, where, index), source.subset)


def _normalised(task: Task, read: Iterable[Located], key: str) -> Iterator[Row]:
    seen: dict[str, str] = {}
    for item in read:
        row = normalised_row(task, item, key)
        if row is None:
            continue
        is_other_file = row["id"] == item.row["id"] and seen.get(row["id"], item.where) != item.where
        if is_other_file and item.long_id:
            row["id"] = item.long_id
        if row["id"] in seen:
            raise DataError(
                f"{item.where}, field 'id': {row['id']!r} is also that of {seen[row['id']]}; "
                f"give every row an id of its own ({key})"
            )
        seen[row["id"]] = item.where
        yield row


class _Watched(dict[str, Any]):
    """A row that keeps which of its fields was asked for last: a fault in its use is about that one."""

    last = ""

    def __getitem__(self, name: str) -> Any:
        self.last = name
        return super().__getitem__(name)


def normalised_row(task: Task, item: Located, key: str) -> Row | None:
    """The row with the task's fields, or None if the task drops it; `key` is the setting that an error names.

    A number where text is expected becomes that text (7 and 7.0 are `7`); null, true, false and lists do not.

    Raises:
        DataError: a field is missing or of another type.
    """

    def refuse(name: str, fault: str) -> NoReturn:
        raise DataError(
            f"{item.where}, field {name!r}: {fault}; the task {task.name!r} needs {', '.join(task.fields)}: "
            f"correct the row, or describe such rows in a task of your own ({key})"
        )

    raw = _Watched(item.row)
    try:
        row = _normalise(task, raw, item.subset)
    except KeyError as error:
        refuse(str(error.args[0]), f"missing, the row has {', '.join(map(str, item.row))}")
    except (AttributeError, IndexError, TypeError):
        refuse(raw.last, f"{shown(item.row.get(raw.last))} is not what belongs there")
    except DataError as error:
        raise DataError(f"{item.where}: {error} ({key})") from error
    if row is None:
        return None
    for name, kind in task.fields.items():
        if name not in row:
            refuse(name, f"missing, the row has {', '.join(map(str, item.row))}")
        row = {**row, name: _of_kind(row[name], kind)}
        if not isinstance(row[name], kind):
            refuse(name, f"{shown(row[name])} is not of type {kind.__name__}")
        if kind is list and _is_mixed(row[name]):
            refuse(name, f"{shown(row[name])} holds what is no text")
    return {**row, "id": str(_as_text(row["id"]))}


def _normalise(task: Task, raw: _Watched, subset: str) -> Row | None:
    try:
        return task.normalise(raw, subset)
    except (AttributeError, TypeError):  # it met a number where text is
        raw.update({name: _as_text(value) for name, value in raw.items()})
        return task.normalise(raw, subset)


def _of_kind(value: Any, kind: type) -> Any:
    if kind is list and isinstance(value, (list, tuple)):
        return [_as_text(item) for item in value]
    return _as_text(value) if kind is str else value


def _is_mixed(items: Sequence[Any]) -> bool:
    """Whether null, or another value that is no text, stands among texts."""
    return None in items or len({isinstance(item, str) for item in items}) > 1


def _as_text(value: Any) -> Any:
    text = text_of(value)
    return value if text is None else text
