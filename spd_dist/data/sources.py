"""Rows from where a config says: the Hugging Face hub, local files, or built in.

A source is `NAME[:CONFIG[:SPLIT]]` on the hub, a `.jsonl` or `.parquet` path, or `builtin:arithmetic:SPLIT`. A Python
slice may follow, as in `rows.jsonl[:-100]`, and sources joined by commas follow each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from spd_dist.config import Data
from spd_dist.data.arithmetic import generate_rows
from spd_dist.data.files import Located, is_file_name, read_rows
from spd_dist.data.tasks.protocol import Row, Split, Task
from spd_dist.errors import DataError


@dataclass(frozen=True)
class Source:
    """One source, parsed."""

    name: str
    subset: str
    split: str
    rows: slice


def load_rows(task: Task, split: Split, config: Data, seed: int) -> list[Row]:
    """The rows of a split, each with an `id` of its own, in the order of their source.

    Calibration examples are the task's own split where it has one, else the training rows from the first on, whatever
    `data.num_train` says. `seed` orders and splits what is built in, and nothing else.

    Raises:
        DataError: no source; a file or line that cannot be read; a field missing or of another type; an id twice.
    """
    given = {"train": config.train, "calibration": config.calibration, "test": config.test}
    sources = given[split] or (None if split == "calibration" and config.train else task.sources.get(split))
    if sources is None and split == "calibration":
        return load_rows(task, "train", Data(task=config.task, train=config.train), seed)
    if sources is None:
        raise DataError(f"data.{split}: the task {task.name!r} has no {split} split of its own; set data.{split}=PATH")
    located = [item for text in sources.split(",") for item in _read(parse_source(text.strip(), split), seed)]
    rows = list(_normalised(task, located, f"data.{split}"))
    if not rows:
        raise DataError(f"data.{split}: {sources} holds no rows; name a source that does")
    limit = {"train": config.num_train, "calibration": None, "test": config.num_test}[split]
    return rows[:limit]


def parse_source(text: str, split: str) -> Source:
    """`text` as a source; `split` is what the hub is asked for where the text does not say."""
    sliced = re.fullmatch(r"(.*)\[(-?\d*):(-?\d*)\]", text)
    text, *bounds = sliced.groups() if sliced else (text, "", "")
    rows = slice(*(int(bound) if bound else None for bound in bounds))
    if is_file_name(text):
        return Source(text, "", "", rows)
    name, subset, named_split = (*text.split(":", 2), "", "")[:3]
    return Source(name, subset, named_split or split, rows)


def _read(source: Source, seed: int) -> list[Located]:
    if source.name == "builtin":
        rows = [Located("builtin:arithmetic", "", row) for row in generate_rows(source.split, seed)]
    elif is_file_name(source.name):
        rows = read_rows(source.name)
    else:
        rows = list(_read_hub(source))
    return rows[source.rows]


def _read_hub(source: Source) -> Iterator[Located]:
    import datasets  # seconds to import, and most runs read local files

    where = ":".join(filter(None, (source.name, source.subset, source.split)))
    try:
        rows = datasets.load_dataset(source.name, source.subset or None, split=source.split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"hub data set {where}: cannot be loaded: {error}; check name, config and split, the network "
            "and HF_HUB_OFFLINE, or give a local path: data.train=rows.jsonl"
        ) from error
    for index, row in enumerate(rows):
        yield Located(where, f"row {index}", {"id": f"{where}/{index}", **row}, source.subset)


def _normalised(task: Task, located: Iterable[Located], key: str) -> Iterator[Row]:
    seen: dict[str, str] = {}
    for item in located:
        row = _normalise(task, item, key)
        if row is None:
            continue
        if row["id"] in seen:
            raise DataError(
                f"{item.where}, field 'id': {row['id']!r} is also that of {seen[row['id']]}; "
                f"give every row an id of its own ({key})"
            )
        seen[row["id"]] = item.where
        yield row


def _normalise(task: Task, item: Located, key: str) -> Row | None:
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
