"""What a text holds: boxed expressions, fenced code, and a worked solution without its marks."""

from __future__ import annotations

import re
from collections.abc import Callable

from spd_dist.data.scoring.statements import last_number
from spd_dist.data.scoring.thoughts import settled

_CALCULATOR = re.compile(r"<<[^<>\n]*>>")
_FENCE = re.compile(r"```[ \t]*([\w+-]*)[^\n`]*\n(.*?)(?:(?=```[ \t]*\w)|```|\Z)", re.DOTALL)
"""A fence with a language always opens: one without, in front of it, only closed what nothing had opened."""


def without_calculator(solution: str) -> str:
    """GSM8K's solution without its `<<48/2=24>>` marks."""
    return _CALCULATOR.sub("", solution)


def boxed_span(text: str) -> tuple[int, int] | None:
    r"""Where the content of the last complete `\boxed{...}` stands, nested braces and all."""
    for match in reversed(list(re.finditer(r"\\f?boxed\s*\{", text))):
        depth = 1
        for position in range(match.end(), len(text)):
            escaped = text[position - 1] == "\\"
            depth += 0 if escaped else (text[position] == "{") - (text[position] == "}")
            if depth == 0:
                return match.end(), position
    return None


def boxed(text: str) -> str | None:
    r"""The content of the last complete `\boxed{...}`."""
    span = boxed_span(text)
    return text[span[0] : span[1]] if span else None


def all_boxed(text: str) -> list[tuple[int, str]]:
    r"""The content of every complete `\boxed{...}` with its place."""
    found, rest = [], text
    while (span := boxed_span(rest)) is not None:
        found.append((span[0], rest[span[0] : span[1]]))
        rest = rest[: span[0]].rpartition("\\")[0]
    return found[::-1]


def boxed_answers(text: str, same: Callable[[str, str], bool]) -> tuple[str | None, str | None]:
    """The content of the boxes, where all agree; leniently, where there is no box, the last number."""
    boxes = all_boxed(text)
    strict = settled(boxes, text, same)
    return strict, strict if boxes else last_number(text)


def fences(text: str) -> list[tuple[str, str]]:
    """The language, in lower case, and the content of every fenced block; one that was never closed counts."""
    return [(language.lower(), block) for language, block in _FENCE.findall(text)]


def fenced(text: str) -> str | None:
    """The first fenced block that is not empty."""
    return next((block for _, block in fences(text) if block.strip()), None)
