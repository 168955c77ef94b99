"""Rows from where a config says: the Hugging Face hub, local JSONL and Parquet files, or built in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spd_dist.config import Data
from spd_dist.data.arithmetic import SPLIT_SIZES, generate_rows
from spd_dist.data.leaks import LeakReport, find_leaks, without_leaks
from spd_dist.data.tasks.protocol import Row, Split, Task
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


@dataclass(frozen=True)
class Source:
    """One source, parsed."""

    name: str
    subset: str
    split: str
    rows: slice
    revision: str | None = None
    """Branch, tag or commit on the hub."""


def load_rows(task: Task, split: Split, config: Data) -> list[Row]:
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
        rows = without_leaks(rows, find_leaks(both, task, similarity=config.leak_similarity))
        if not rows:
            raise DataError(
                f"data.leaks={config.leaks}: every {split} row is also in the {other} split; correct data.{split}"
            )
    return rows[: {"train": config.num_train, "calibration": None, "test": config.num_test}[split]]


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
    used: dict[str, list[Row]] = {}
    for split, limit in (("calibration", num_calibration), ("train", None), ("test", None)):
        if sources_of(task, split, config):
            used[split] = load_rows(task, split, config)[:limit]
    return find_leaks(used, task, similarity=config.leak_similarity)


def sources_of(task: Task, split: Split, config: Data) -> str | None:
    """Where the rows of a split come from: the config's word, else the task's; calibration falls back to training."""
    given = {"train": config.train, "calibration": config.calibration, "test": config.test}[split]
    if given or split != "calibration":
        return given or task.sources.get(split)
    own = None if config.train else task.sources.get("calibration")
    return own or sources_of(task, "train", config)


def _load_all(task: Task, split: Split, config: Data) -> list[Row]:
    sources = sources_of(task, split, config)
    if sources is None:
        raise DataError(f"data.{split}: the task {task.name!r} has no {split} split of its own; set data.{split}=PATH")
    default = "train" if split == "calibration" else split
    located = [item for text in sources.split(",") for item in _read(parse_source(text.strip(), default), config.seed)]
    rows = list(_normalised(task, located, f"data.{split}"))
    if not rows:
        raise DataError(f"data.{split}: {sources} holds no rows; name a source that does")
    return rows


def parse_source(text: str, split: str) -> Source:
    """`text` as a source; `split` is what the hub is asked for where the text does not say."""
    sliced = re.fullmatch(r"(.*)\[(-?\d*):(-?\d*)\]", text)
    text, *bounds = sliced.groups() if sliced else (text, "", "")
    rows = slice(*(int(bound) if bound else None for bound in bounds))
    if is_file_name(text):
        return Source(text, "", "", rows)
    name, subset, named_split = (*text.split(":", 2), "", "")[:3]
    name, _, revision = name.partition("@")
    return Source(name, subset, named_split or split, rows, revision or None)


def _read(source: Source, seed: int) -> list[Located]:
    if source.name == "builtin":
        if source.subset != "arithmetic" or source.split not in SPLIT_SIZES:
            raise DataError(
                f"source builtin:{source.subset}:{source.split}: not built in; "
                f"there is builtin:arithmetic:SPLIT, of {', '.join(SPLIT_SIZES)}"
            )
        rows = [Located("builtin:arithmetic", "", row) for row in generate_rows(source.split, seed)]
    elif is_file_name(source.name):
        rows = read_rows(source.name)
    else:
        rows = list(_read_hub(source))
    return rows[source.rows]


def _read_hub(source: Source) -> Iterator[Located]:
    import datasets  # seconds to import, and most runs read local files

    where = ":".join(filter(None, (source.name, source.subset, source.split)))
    pinned = f"@{source.revision}" if source.revision else ""
    try:
        rows = datasets.load_dataset(source.name, source.subset or None, split=source.split, revision=source.revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"hub data set {where}{pinned}: cannot be loaded: {error}; check name, revision, config and split, the "
            "network and HF_HUB_OFFLINE, or give a local path: data.train=rows.jsonl"
        ) from error
    for index, row in enumerate(rows):
        yield Located(where, f"row {index}", {"id": f"{where}/{index}", **row}, source.subset)


def _normalised(task: Task, located: Iterable[Located], key: str) -> Iterator[Row]:
    seen: dict[str, str] = {}
    for item in located:
        row = normalised_row(task, item, key)
        if row is None:
            continue
        if row["id"] in seen:
            raise DataError(
                f"{item.where}, field 'id': {row['id']!r} is also that of {seen[row['id']]}; "
                f"give every row an id of its own ({key})"
            )
        seen[row["id"]] = item.where
        yield row


def normalised_row(task: Task, item: Located, key: str) -> Row | None:
    """The row with the task's fields, or None if the task drops it; `key` is the setting that an error names.

    Raises:
        DataError: a field is missing or of another type.
    """
    missing = f"missing, the row has {', '.join(map(str, item.row))}"
    remedy = (
        f"the task {task.name!r} needs {', '.join(task.fields)}: correct the row, "
        f"or describe such rows in a task of your own ({key})"
    )
    try:
        row = task.normalise(item.row, item.subset)
    except KeyError as error:
        raise DataError(f"{item.where}, field {error.args[0]!r}: {missing}; {remedy}") from error
    if row is None:
        return None
    for name, kind in task.fields.items():
        if name not in row:
            raise DataError(f"{item.where}, field {name!r}: {missing}; {remedy}")
        if not isinstance(row[name], kind):
            raise DataError(f"{item.where}, field {name!r}: {row[name]!r} is not of type {kind.__name__}; {remedy}")
    return {**row, "id": str(row["id"])}
