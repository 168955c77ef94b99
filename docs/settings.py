"""Writes `docs/settings.md` from the fields of the config: `python docs/settings.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from spd_dist.config import Config, Experiment
from spd_dist.storage.artifacts import as_json
from spd_dist.storage.settings import CHANGES_NO_RESULT, is_of

PAGE = Path(__file__).with_suffix(".md")
WORDS = {str: "text", int: "whole number", float: "number", bool: "true, false", dict: "mapping"}
BOUNDS = {"at_least": ">= {}", "at_most": "<= {}", "above": "> {}"}


def allowed(hint: Any, bounds: dict[str, float]) -> str:
    """What a field may be, in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(map(str, arguments))
    if origin in (Union, UnionType):
        parts = [allowed(part, bounds) for part in arguments if part is not NoneType]
        return " or ".join([*parts, "null"] if NoneType in arguments else parts)
    if origin is tuple:
        return f"list of {allowed(arguments[0], bounds)}"
    told = [BOUNDS[rule].format(bound) for rule, bound in bounds.items()] if hint in (int, float) else []
    return " ".join([WORDS[origin or hint], *told])


def rows(section: type, prefix: str = "") -> Iterator[str]:
    """A line for each field of a section, and of the sections in it; those of a whole run have tables of their own."""
    hints = get_type_hints(section)
    for field in dataclasses.fields(section):
        key, hint, about = f"{prefix}{field.name}", hints[field.name], dict(field.metadata)
        if dataclasses.is_dataclass(hint) and prefix:
            yield from rows(hint, f"{key}.")
        elif not dataclasses.is_dataclass(hint):
            is_default = field.default is not dataclasses.MISSING
            default = as_json(field.default if is_default else field.default_factory())
            sentence, mark = about.pop("sentence"), "\\*" if is_of(key, CHANGES_NO_RESULT) else ""
            cells = [f"`{key}`{mark}", f"`{default}`", allowed(hint, about), sentence]
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page() -> str:
    """The whole page."""
    lines = [
        "# Settings",
        "",
        "Made by `python docs/settings.py` from the fields of the config (`spd_dist/config/`); a test holds both",
        "to each other. `--show-config` prints what a command comes to. Settings marked \\* change no result: a run",
        "may go on under other values of them. Which go together: [compatibility.md](compatibility.md).",
    ]
    head = ["", "| key | default | may be | what it is |", "|---|---|---|---|"]
    lines += ["", "## A run", *head, *rows(Config)]
    hints = get_type_hints(Config)
    for name, section in hints.items():
        if dataclasses.is_dataclass(section):
            lines += ["", f"## {name}", "", str(section.__doc__).splitlines()[0], *head, *rows(section, f"{name}.")]
    lines += ["", "## An experiment", "", "Of `launchers/experiment.py`; `run` has the settings above.", *head]
    return "\n".join([*lines, *rows(Experiment)]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
