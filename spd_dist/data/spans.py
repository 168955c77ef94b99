"""Masks: which characters of an example define its correctness (paper, appendix A), and which tokens those are.

A span is a half-open character range (start, stop) of prompt + answer, so it may lie in the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, Literal, Protocol

from spd_dist.data.patterns import SECONDS, compiled
from spd_dist.data.scoring.extract import boxed_span
from spd_dist.data.scoring.numbers import MARKER
from spd_dist.data.scoring.thoughts import closings
from spd_dist.errors import ConfigError, DataError

Span = tuple[int, int]
Policy = Literal["inside", "overlap"]
ENTRY_POINTS = "spd_dist.masks"


class Mask(Protocol):
    """The seam for masks: spans of prompt + answer; a plug-in is such a function as an entry point."""

    def __call__(self, prompt: str, answer: str, row: Mapping[str, Any]) -> Sequence[Span]: ...


def full(prompt: str, answer: str, row: Mapping[str, Any]) -> Sequence[Span]:
    """All of prompt and answer: the control that ignores correctness. (Nothing predicts the very first token.)"""
    return [(0, len(prompt) + len(answer))]


def whole_answer(prompt: str, answer: str, row: Mapping[str, Any]) -> Sequence[Span]:
    """All of the answer: what held-out NLL is taken over."""
    return [(len(prompt), len(prompt) + len(answer))] if answer else []


def final(prompt: str, answer: str, row: Mapping[str, Any]) -> Sequence[Span]:
    """What follows the last `#### ` of the answer: the result of a worked solution."""
    return _after_last(re.compile(f"{MARKER} ?"), prompt, answer)


def letter(prompt: str, answer: str, row: Mapping[str, Any]) -> Sequence[Span]:
    """The letter after the last `Answer:`, which may end the prompt, with the space before it."""
    text = prompt + answer
    matches = list(re.finditer(r"Answer:(\s*\(?[A-Z]\)?)(?![A-Za-z])", text))
    return [matches[-1].span(1)] if matches else []


def boxed_content(prompt: str, answer: str, row: Mapping[str, Any]) -> Sequence[Span]:
    r"""The content of the answer's last `\boxed{...}`."""
    span = boxed_span(answer)
    return [(len(prompt) + span[0], len(prompt) + span[1])] if span else []


def asserts(prompt: str, answer: str, row: Mapping[str, Any]) -> Sequence[Span]:
    """Every occurrence of every test of the row, prompt included; without a `tests` field, every line that asserts."""
    text = prompt + answer
    if "tests" not in row:
        return [match.span(1) for match in re.finditer(r"^[ \t]*(assert\b.*?)\s*$", text, re.MULTILINE)]
    tests = [test.strip() for test in row["tests"] if test.strip()]
    return merged(span for test in tests for span in occurrences(test, text))


def thought(prompt: str, answer: str, row: Mapping[str, Any]) -> Sequence[Span]:
    """What the answer thinks: up to its last mark that ends a thought, the mark included."""
    found = closings(answer)
    return [(len(prompt), len(prompt) + found[-1][1])] if found else []


def after_thought(prompt: str, answer: str, row: Mapping[str, Any]) -> Sequence[Span]:
    """What the answer says after it has thought; all of it if it did not think."""
    found = closings(answer)
    start = found[-1][1] if found else 0
    return merged([(len(prompt) + start, len(prompt) + len(answer))])


def given(prompt: str, answer: str, row: Mapping[str, Any]) -> Sequence[Span]:
    """The row's own `spans`, a list of [start, stop] in prompt + answer."""
    spans = row.get("spans")
    if not isinstance(spans, (list, tuple)) or not all(_is_span(span) for span in spans):
        raise DataError(
            f"row {row.get('id')!r}, field spans: {spans!r} is not a list of [start, stop]; add it to the row, "
            "or choose another calibrate.mask"
        )
    return [(start, stop) for start, stop in spans]


MASKS: Mapping[str, Mask] = {
    "full": full,
    "answer": whole_answer,
    "final": final,
    "letter": letter,
    "boxed": boxed_content,
    "asserts": asserts,
    "spans": given,
    "thought": thought,
    "after_thought": after_thought,
}
"""Masks by the name that `calibrate.mask` gives; besides them `task`, `regex:PATTERN`, and entry points."""


def find_mask(name: str) -> Mask:
    """The mask that `calibrate.mask` names, other than `task`.

    Raises:
        ConfigError: no built-in mask and no entry point has that name, or the pattern is no regular expression.
    """
    if name in MASKS:
        return MASKS[name]
    kind, colon, pattern = name.partition(":")
    if kind == "regex" and colon:
        return _regex(pattern)
    for point in entry_points(group=ENTRY_POINTS, name=name):
        return point.load()
    plugins = [point.name for point in entry_points(group=ENTRY_POINTS)]
    raise ConfigError(
        f"calibrate.mask: {name!r} is not a mask; use task, regex:PATTERN, {', '.join(MASKS)}, "
        f"or an entry point of group {ENTRY_POINTS} (installed: {', '.join(plugins) or 'none'})"
    )


def occurrences(part: str, text: str) -> list[Span]:
    """Where `part` stands in `text`, again and again."""
    return [found.span() for found in re.finditer(re.escape(part), text)]


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same characters as sorted spans that do not overlap, empty ones dropped."""
    result: list[Span] = []
    for start, stop in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(stop, result[-1][1]))
        elif start < stop:
            result.append((start, stop))
    return result


def tokens_in_spans(offsets: Sequence[Span], text: str, spans: Sequence[Span], policy: Policy) -> list[int]:
    """Positions of the tokens whose characters lie inside a span (or overlap one), never position 0.

    White space around a token's characters does not count, so ` 5` lies inside a span that starts after `#### `, and
    the result does not depend on whether the tokenizer trims its offsets. `offsets` are the tokenizer's, in `text`.
    """
    kept, previous_stop = [], 0
    for position, (start, stop) in enumerate(offsets):
        if start == stop:  # a special token, or white space whose offsets were trimmed away
            start = min(previous_stop, stop)
        previous_stop = max(stop, previous_stop)
        token = text[start:stop]
        if token.strip():
            start, stop = start + len(token) - len(token.lstrip()), start + len(token.rstrip())
        if position > 0 and start < stop and any(_matches((start, stop), span, policy) for span in spans):
            kept.append(position)
    return kept


def _is_span(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(type(end) is int for end in value)


def _matches(token: Span, span: Span, policy: Policy) -> bool:
    if policy == "inside":
        return span[0] <= token[0] and token[1] <= span[1]
    return token[0] < span[1] and span[0] < token[1]


def _after_last(marker: re.Pattern[str], prompt: str, answer: str) -> Sequence[Span]:
    matches = list(marker.finditer(answer))
    if not matches:
        return []
    return merged([(len(prompt) + matches[-1].end(), len(prompt) + len(answer.rstrip()))])


def _regex(text: str) -> Mask:
    pattern = compiled(text, "calibrate.mask", multiline=True)

    def spans_of_pattern(prompt: str, answer: str, row: Mapping[str, Any]) -> Sequence[Span]:
        try:
            return merged(pattern.spans(prompt + answer))
        except TimeoutError as error:
            raise DataError(
                f"row {row.get('id')!r}: calibrate.mask: {text!r} takes over {SECONDS} s in it; write a simpler pattern"
            ) from error

    return spans_of_pattern
