r"""The YAML file that describes a task: its keys, and what each may be.

name: trivia
fields: {question: q, choices: choices.text}  # our name: the name in the rows, or a path in them
prompt: "Question: {question}\n{choices}\nAnswer:"  # a list of choices is lettered lines
answer: " {answer}"                           # the reference, for calibration
gold: "{answer}"                              # what is compared
mask: answer                                  # any calibrate.mask but task
extraction: text                              # number | letter | boxed | text | whole | regex:PATTERN
metric: exact                                 # exact | numeric | math | choice | likelihood | tests | regex | nll
choices: "{choices}"                          # for choice and likelihood; {letter} and {choice} are then the gold's
code: {entry_point: f, tests: "{tests}"}      # for metric tests
messages: "{messages}"                        # instead of prompt: a list of objects with role and content
tools: "{tools}"                              # what they may call, if the row has it
sources: {train: train.jsonl, test: test.jsonl}
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from spd_dist.data.patterns import compiled
from spd_dist.data.readers import text_of
from spd_dist.data.spans import find_mask
from spd_dist.data.tasks.bbh import same_text
from spd_dist.data.tasks.protocol import Row
from spd_dist.data.text_files import shown
from spd_dist.errors import ConfigError, DataError, named_path
from spd_dist.types import record_of

EXTRACTIONS = ("number", "letter", "boxed", "text", "whole")
"""Extractions by name; besides them `regex:PATTERN`."""
METRICS: Mapping[str, str] = {
    "exact": "text", "numeric": "number", "math": "boxed", "choice": "letter", "likelihood": "letter", "tests": "whole",
    "regex": "whole", "nll": "text",
}  # fmt: skip
"""Metric -> the extraction that it takes where the file names none."""
JUDGING = ("gold", "extraction", "metric", "code")
"""Keys that change verdicts alone."""
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_PLACE = re.compile(r"\{(\w+)((?:\[\w+\])*)\}")
_CODE_KEYS = ("entry_point", "tests", "setup")


@dataclass(frozen=True)
class Description:
    """The keys of the file."""

    name: str
    prompt: str = ""
    answer: str = ""
    gold: str = "{answer}"
    fields: dict[str, str] = field(default_factory=dict)
    mask: str = "answer"
    extraction: str = ""
    metric: str = "exact"
    choices: str = "{choices}"
    code: dict[str, str] = field(default_factory=dict)
    messages: str = ""
    tools: str = "{tools}"
    sources: dict[str, str] = field(default_factory=dict)

    @property
    def reads(self) -> str:
        """The extraction: that of the file, else the metric's."""
        return self.extraction or METRICS[self.metric]

    @property
    def has_choices(self) -> bool:
        """Whether an answer is one of the row's choices."""
        return self.metric in ("choice", "likelihood")

    @property
    def by_section(self) -> dict[str, dict[str, Any]]:
        """What the file says, by the section of the config whose readers it matters to; rows count for themselves."""
        said = asdict(self)
        del said["sources"]
        judging = {key: said.pop(key) for key in JUDGING}
        return {"evaluate": judging, "calibrate": {"mask": said.pop("mask")}, "data": said}


def read_description(path: str) -> Description:
    """What a file says, with what it leaves out filled in.

    Raises:
        ConfigError: the file cannot be read, or a key is missing, unknown or not valid.
        DataError: no file system takes its name.
    """
    if not named_path(path).is_file():
        raise ConfigError(f"data.task: {path}: no such file (from {Path.cwd()}); correct the path, or name a task")
    try:
        values = yaml.safe_load(named_path(path).read_text(encoding="utf-8"))
    except (OSError, RecursionError, UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"data.task: {path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    known = [item.name for item in fields(Description)]
    has_both = isinstance(values, dict) and "name" in values and ("prompt" in values) != ("messages" in values)
    if not has_both or not values.keys() <= set(known):
        given = ", ".join(map(str, values)) if isinstance(values, dict) else shown(values)
        unknown = [str(key) for key in values if key not in known] if isinstance(values, dict) else []
        nearest = [difflib.get_close_matches(key, known, 1, 0)[0] for key in unknown[:1]]
        raise ConfigError(
            f"data.task: {path} has the keys {given}; it needs name and prompt (or messages), of {', '.join(known)}"
            + (f"; {unknown[0]} is none of them, the nearest is {nearest[0]}" if nearest else "")
        )
    for key, value in values.items():
        _check_type(key, value, path)
    if values.get("metric") == "tests" or ("messages" in values and values.get("metric") == "nll"):
        values = {"gold": values.get("answer", ""), **values}
    description = record_of(Description, values)
    _check(description, path)
    return description


def _check_type(key: str, value: Any, path: str) -> None:
    if key not in ("fields", "sources", "code"):
        if not isinstance(value, str):
            raise ConfigError(f"data.task: {path}, {key}: {shown(value)} must be text; put it in quotes")
    elif not isinstance(value, dict):
        raise ConfigError(f"data.task: {path}, {key}: {shown(value)} must be a mapping")
    else:
        for name, item in value.items():
            if not isinstance(name, str) or not isinstance(item, str):
                raise ConfigError(f"data.task: {path}, {key}.{name}: {shown(item)} must be text; put both in quotes")


def _check(description: Description, path: str) -> None:
    where = f"data.task: {path}"
    if not _NAME.fullmatch(description.name) or ".." in description.name:
        raise ConfigError(
            f"{where}, name: {description.name!r} must be letters, digits, '_', '.' and '-', without '..', and begin "
            "with neither '.' nor '-': files are called by it"
        )
    if description.metric not in METRICS:
        raise ConfigError(f"{where}, metric: {description.metric!r} must be one of {', '.join(METRICS)}")
    unknown = description.sources.keys() - {"train", "calibration", "test"}
    if unknown:
        raise ConfigError(f"{where}, sources: {sorted(unknown)} must be train, calibration or test")
    has_no_tests = description.metric == "tests" and "tests" not in description.code
    if has_no_tests or description.code.keys() - set(_CODE_KEYS):
        raise ConfigError(
            f"{where}, code: {description.code} must be a mapping of {', '.join(_CODE_KEYS)}, tests at least, with "
            "metric: tests"
        )
    _check_places(description, where)
    kind, _, pattern = description.reads.partition(":")
    if kind == "regex":
        compiled(pattern, f"{where}, extraction")
    elif description.reads not in EXTRACTIONS:
        raise ConfigError(
            f"{where}, extraction: {description.extraction!r} must be one of {', '.join(EXTRACTIONS)}, or regex:PATTERN"
        )
    find_mask(description.mask)


def _check_places(description: Description, where: str) -> None:
    for key in ("messages", "tools"):
        if description.messages and not _PLACE.fullmatch(vars(description)[key]):
            raise ConfigError(f"{where}, {key}: {vars(description)[key]!r} must be the place of a list, as '{{{key}}}'")
    if description.has_choices and not _PLACE.fullmatch(description.choices):
        raise ConfigError(f"{where}, choices: {description.choices!r} must be the place of a list, as '{{choices}}'")


def places(templates: Sequence[str]) -> Iterator[str]:
    """The fields that templates name."""
    for template in templates:
        yield from (match[1] for match in _PLACE.finditer(template))


def filled(template: str, row: Row) -> str:
    """A template with the texts of the row: a list is lettered lines, other braces stand for themselves.

    Raises:
        DataError: null, a mapping or another value that is no text stands there.
    """

    def text_at(place: re.Match[str]) -> str:
        value = value_at(place[0], row)
        if isinstance(value, (list, tuple)):
            return lettered(value, place[0])
        text = text_of(value)
        if text is None:
            raise DataError(f"field {place[0]}: {shown(value)} is no text; write it as text, or drop the row")
        return text

    return _PLACE.sub(text_at, template)


def value_at(place: str, row: Row) -> Any:
    """What stands at `{name}` or `{name[key]}` of a row.

    Raises:
        DataError: the row has nothing there.
    """
    match = _PLACE.fullmatch(place)
    assert match is not None
    value = row[match[1]]
    for key in re.findall(r"\w+", match[2]):
        is_index = isinstance(value, (list, tuple)) and key.isdigit() and int(key) < len(value)
        if not is_index and not (isinstance(value, dict) and key in value):
            raise DataError(f"field {place}: {shown(value)} has nothing at [{key}]; correct the template or the row")
        value = value[int(key)] if is_index else value[key]
    return value


def lettered(choices: Sequence[Any], place: str) -> str:
    """Choices as lines that begin with `A. `, `B. `, ...

    Raises:
        DataError: none, more than there are letters, or one that is no text.
    """
    texts = [text_of(choice) for choice in choices]
    if not 1 <= len(texts) <= len(LETTERS) or None in texts:
        raise DataError(
            f"field {place}: {shown(list(choices))} must be 1 to {len(LETTERS)} texts or numbers, to be lettered lines"
        )
    return "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, texts, strict=False))


def choices_at(place: str, row: Row) -> list[str]:
    """The choices of a row, as texts.

    Raises:
        DataError: no list of 1 to 26 texts stands there.
    """
    value = value_at(place, row)
    if not isinstance(value, (list, tuple)):
        raise DataError(f"field {place}: {shown(value)} is no list of choices")
    lettered(value, place)
    return [str(text_of(choice)) for choice in value]


def renamed(raw: Mapping[str, Any], names: Mapping[str, str]) -> Row:
    """The row with our names beside its own; a name with dots that it does not have is a path in it."""
    row = dict(raw)
    for ours, theirs in names.items():
        value: Any = raw
        for key in [theirs] if theirs in raw else theirs.split("."):
            if not isinstance(value, Mapping) or key not in value:
                raise KeyError(theirs)
            value = value[key]
        row[ours] = value
    return row


def letter_of(gold: str, choices: Sequence[str]) -> str:
    """The letter that a row means by its gold: a letter, a choice's text, or a choice's number from 0 on.

    Raises:
        DataError: it names none, or several.
    """
    letters = LETTERS[: len(choices)]
    if gold.strip() in letters and len(gold.strip()) == 1:
        return gold.strip()
    named = [letter for letter, choice in zip(letters, choices, strict=True) if same_text(choice, gold)]
    if len(named) == 1:
        return named[0]
    if not named and gold.strip().isdigit() and int(gold) < len(choices):
        return letters[int(gold)]
    raise DataError(
        f"gold: {gold!r} names {'no' if not named else 'more than one'} choice of {shown(list(choices))}; write its "
        "letter, its text, or its number from 0 on"
    )
