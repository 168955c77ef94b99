"""What a text gives as its answer (numbers, letters, boxed expressions, code), and when two answers are the same."""

from __future__ import annotations

import re
from decimal import Decimal

MARKER = "####"
"""Stands before the final answer of a worked solution (GSM8K's convention)."""

# A `-` after a digit, a letter or a bracket is an operator and not a sign; commas count only between groups of three.
_NUMBER = re.compile(r"(?:(?<![\w.)\]])-)?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?", re.ASCII)
_PLAIN_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)", re.ASCII)
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")
_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)


def parse_number(text: str) -> Decimal | None:
    """The value of a number as people write it (`5`, `5.0`, `$5`, `1,000`, `40%`), or None."""
    plain = re.sub(r"[\s,$%]", "", text).rstrip(".")
    return Decimal(plain) if _PLAIN_NUMBER.fullmatch(plain) else None


def same_number(left: str | None, right: str) -> bool:
    """Whether both are numbers of one value: `5` is `5.0` is `$5`."""
    value = None if left is None else parse_number(left)
    return value is not None and value == parse_number(right)


def last_number(text: str) -> str | None:
    """The last number that stands anywhere in `text`: lenient, as it takes a number of any sentence."""
    return next((match.group() for match in reversed(list(_NUMBER.finditer(text)))), None)


def marked_number(text: str) -> str | None:
    """The number after the last `####`, on its line: strict."""
    _, marker, tail = text.rpartition(MARKER)
    match = _NUMBER.search(tail.strip().partition("\n")[0]) if marker else None
    return match.group() if match else None


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


def fenced(text: str) -> str | None:
    """The first fenced block that is not empty; one that was never closed counts."""
    return next((block for block in _FENCE.findall(text) if block.strip()), None)
