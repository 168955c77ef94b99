"""Regular expressions of the user's own: refused if they can take for ever, and held to a limit of processor time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

import regex

from spd_dist.errors import ConfigError

SECONDS = 5.0
"""Of the processor, for one search in one text."""
PROBE_SECONDS = 0.3
PROBE_LENGTH = 64
_FUZZY = re.compile(r"(?<!\\)\{(?!\d*,?\d*\})")
"""A brace that is itself, as in `re`: `regex` would take `{e}` for a number of errors."""


class Pattern:
    """A regular expression that `re` understands, searched with a limit: `re` has none."""

    def __init__(self, text: str, key: str, *, multiline: bool = False) -> None:
        """See that it is one, and that it ends (`compiled` does so once).

        Raises:
            ConfigError: it is no regular expression, or takes exponential time.
        """
        try:
            re.compile(text)
            flags = regex.VERSION0 | (regex.MULTILINE if multiline else 0)
            self._compiled = regex.compile(_FUZZY.sub(r"\{", text), flags)
        except (re.error, regex.error, OverflowError, RecursionError) as error:
            raise ConfigError(f"{key}: {text!r} is not a regular expression: {error}") from error
        self.text = text
        self.group = 1 if self._compiled.groups else 0
        if any(self._is_endless(probe) for probe in _probes(text)):
            raise ConfigError(
                f"{key}: {text!r} takes exponential time, as the same characters match it in many ways; write what is "
                "repeated so that it matches in one way only, as a+ for (a|aa)+"
            )

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where it matches: the first group, if it has groups.

        Raises:
            TimeoutError: it takes longer than `SECONDS`.
        """
        found = self._compiled.finditer(text, timeout=SECONDS)
        return [match.span(self.group) for match in found if match.start(self.group) >= 0]

    def last(self, text: str) -> str | None:
        """What the last match holds.

        Raises:
            TimeoutError: it takes longer than `SECONDS`.
        """
        found = self.spans(text)
        return text[slice(*found[-1])] if found else None

    def _is_endless(self, probe: str) -> bool:
        try:
            self._compiled.search(probe, timeout=PROBE_SECONDS)
        except TimeoutError:
            return True
        return False


@lru_cache(maxsize=4096)
def compiled(text: str, key: str, *, multiline: bool = False) -> Pattern:
    """The pattern of `text`, found once; `key` is what an error names.

    Raises:
        ConfigError: it is no regular expression, or takes exponential time.
    """
    return Pattern(text, key, multiline=multiline)


def _probes(text: str) -> Iterator[str]:
    """Texts that a pattern of these characters nearly matches."""
    for character in sorted({*text, *"a0 x\n"}):
        yield character * PROBE_LENGTH + "\0"
