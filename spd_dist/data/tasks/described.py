r"""A task of the user's own, described in a YAML file, without code.

name: trivia
fields: {question: q, answer: a}      # our name: the name in the rows
prompt: "Question: {question}\nAnswer:"
answer: " {answer}"                   # the reference, for calibration
gold: "{answer}"                      # what is compared
mask: answer                          # any calibrate.mask but task
extraction: text                      # number | letter | boxed | text | regex:PATTERN
metric: exact                         # exact | numeric | nll
sources: {train: train.jsonl, test: test.jsonl}
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from spd_dist.data.scoring.choices import committed_letter, stated_letter
from spd_dist.data.scoring.extract import boxed_answers
from spd_dist.data.scoring.numbers import number_answers, same_number
from spd_dist.data.scoring.thoughts import without_thoughts
from spd_dist.data.spans import Span, find_mask
from spd_dist.data.tasks.bbh import same_text
from spd_dist.data.tasks.protocol import Metric, Row, Score, Split, scored
from spd_dist.errors import ConfigError
from spd_dist.types import record_of

Extract = Callable[[str], tuple[str | None, str | None]]
"""The strict and the lenient answer of an output."""
_LETTERS = "ABCDEFGHIJ"
_PLACE = re.compile(r"\{(\w+)\}")


def _first_line(text: str) -> tuple[str | None, str | None]:
    line = text.strip().partition("\n")[0].strip() or None
    return line, line


EXTRACTIONS: Mapping[str, Extract] = {
    "number": number_answers,
    "letter": lambda text: (stated_letter(text, _LETTERS), committed_letter(text, _LETTERS)),
    "boxed": lambda text: boxed_answers(text, same_text),
    "text": _first_line,
}
"""Extractions by name."""
METRICS = ("exact", "numeric", "nll")


@dataclass(frozen=True)
class Description:
    """The keys of the file."""

    name: str
    prompt: str
    answer: str = ""
    gold: str = "{answer}"
    fields: dict[str, str] = field(default_factory=dict)
    mask: str = "answer"
    extraction: str = "text"
    metric: str = "exact"
    sources: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DescribedTask:
    """A task made of templates: `{field}` stands for a field of the row, every other brace for itself."""

    description: Description

    @property
    def name(self) -> str:
        """The file's `name`."""
        return self.description.name

    @property
    def metric(self) -> Metric:
        """`exact` and `numeric` are both an accuracy."""
        return "nll" if self.description.metric == "nll" else "accuracy"

    @property
    def fields(self) -> Mapping[str, type]:
        """Every field that a template names."""
        templates = self.description.prompt + self.description.answer + self.description.gold
        return dict.fromkeys(_PLACE.findall(templates), object)

    @property
    def sources(self) -> Mapping[Split, str]:
        """The file's `sources`."""
        return self.description.sources

    @property
    def test_size(self) -> int | None:
        """A file publishes none."""
        return None

    def normalise(self, raw: Mapping[str, Any], subset: str) -> Row | None:
        """The row with its fields renamed."""
        return {**raw, **{ours: raw[theirs] for ours, theirs in self.description.fields.items()}}

    def problem(self, row: Row) -> str:
        """The filled prompt."""
        return self.prompt(row)

    def prompt(self, row: Row) -> str:
        """The prompt template, filled."""
        return _fill(self.description.prompt, row)

    def answer(self, row: Row) -> str:
        """The answer template, filled."""
        return _fill(self.description.answer, row)

    def target_spans(self, row: Row) -> Sequence[Span]:
        """What the file's mask marks."""
        return find_mask(self.description.mask)(self.prompt(row), self.answer(row), row)

    def score(self, row: Row, output: str) -> Score:
        """By the file's extraction and metric."""
        same = same_number if self.description.metric == "numeric" else same_text
        said, is_unfinished = without_thoughts(output)
        gold = _fill(self.description.gold, row)
        strict, lenient = _extraction(self.description.extraction)(said)
        return scored(gold, strict, lenient, same=same, is_unfinished=is_unfinished)


def read_task(path: str) -> DescribedTask:
    """The task that a YAML file describes.

    Raises:
        ConfigError: the file cannot be read, or a key is missing, unknown or not valid.
    """
    try:
        values = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"data.task: {path} cannot be read as YAML: {error}") from error
    known = [item.name for item in fields(Description)]
    if not isinstance(values, dict) or not values.keys() <= set(known) or not {"name", "prompt"} <= values.keys():
        given = ", ".join(map(str, values)) if isinstance(values, dict) else values
        raise ConfigError(f"data.task: {path} has the keys {given}; it needs name and prompt, of {', '.join(known)}")
    for key, value in values.items():
        kind = dict if key in ("fields", "sources") else str
        if not isinstance(value, kind):
            raise ConfigError(f"data.task: {path}, {key}: {value!r} must be {'text' if kind is str else 'a mapping'}")
    description = record_of(Description, values)
    _check(description, path)
    return DescribedTask(description)


def _check(description: Description, path: str) -> None:
    if description.metric not in METRICS:
        raise ConfigError(f"data.task: {path}, metric: {description.metric!r} must be one of {', '.join(METRICS)}")
    unknown = description.sources.keys() - {"train", "calibration", "test"}
    if unknown:
        raise ConfigError(f"data.task: {path}, sources: {sorted(unknown)} must be train, calibration or test")
    _extraction(description.extraction)
    find_mask(description.mask)


def _fill(template: str, row: Row) -> str:
    return _PLACE.sub(lambda place: str(row[place[1]]), template)


def _extraction(name: str) -> Extract:
    if name in EXTRACTIONS:
        return EXTRACTIONS[name]
    kind, _, pattern = name.partition(":")
    if kind != "regex":
        raise ConfigError(f"data.task, extraction: {name!r} must be one of {', '.join(EXTRACTIONS)}, or regex:PATTERN")
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"data.task, extraction: {pattern!r} is not a regular expression: {error}") from error

    def last_match(text: str) -> tuple[str | None, str | None]:
        matches = list(compiled.finditer(text))
        found = matches[-1].group(1 if compiled.groups else 0) if matches else None
        return found, found

    return last_match
