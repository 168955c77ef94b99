"""Several turns as one prompt: the turns for a chat template, and a plain text that spans are counted in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Turn = Mapping[str, Any]
"""`role`, and `content` or `tool_calls`, as chat templates take them."""


class Conversation(str):
    """A prompt of several turns; as text it is their plain form, after which the answer stands."""

    turns: tuple[Turn, ...]
    tools: tuple[Mapping[str, Any], ...]
    """Functions that the model is told of, as JSON schemas."""
    contents: tuple[tuple[int, int], ...]
    """Where each turn's content stands in the text."""

    def __new__(cls, turns: Sequence[Turn], tools: Sequence[Mapping[str, Any]] = ()) -> Conversation:
        """The plain form is `role: content` a turn, then `assistant:`."""
        parts, contents, length = [], [], 0
        for turn in turns:
            content = str(turn.get("content") or turn.get("tool_calls") or "")
            start = length + len(f"{turn['role']}: ")
            parts.append(f"{turn['role']}: {content}\n\n")
            contents.append((start, start + len(content)))
            length += len(parts[-1])
        self = super().__new__(cls, "".join(parts) + "assistant:")
        self.turns, self.tools, self.contents = tuple(turns), tuple(tools), tuple(contents)
        return self

    def __getnewargs__(self) -> tuple[tuple[Turn, ...], tuple[Mapping[str, Any], ...]]:
        return self.turns, self.tools

    def located(self, rendered: str) -> Iterator[tuple[tuple[int, int], int]]:
        """The contents that stand in `rendered` as they are: each span here, and how far it moved."""
        position = 0
        for start, stop in self.contents:
            content = self[start:stop].strip()
            place = rendered.find(content, position) if content else -1
            if place >= 0:
                first = start + self[start:stop].index(content)
                yield (first, first + len(content)), place - first
                position = place + len(content)


def turns_of(prompt: str) -> tuple[Turn, ...]:
    """What a chat template is given for a prompt, without a system turn of the config's."""
    return prompt.turns if isinstance(prompt, Conversation) else ({"role": "user", "content": prompt},)


def tools_of(prompt: str) -> tuple[Mapping[str, Any], ...]:
    """The functions of a prompt; none of one that is text alone."""
    return prompt.tools if isinstance(prompt, Conversation) else ()
