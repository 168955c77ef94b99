"""What a text holds: boxed expressions, fenced code, and a worked solution without its marks."""

from __future__ import annotations

import re

_CALCULATOR = re.compile(r"<<[^<>\n]*>>")
_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)


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


def fenced(text: str) -> str | None:
    """The first fenced block that is not empty; one that was never closed counts."""
    return next((block for block in _FENCE.findall(text) if block.strip()), None)
