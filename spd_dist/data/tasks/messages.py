"""Rows of several turns, with tools or without: `messages` as chat templates and fine-tuning services take them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spd_dist.data import spans
from spd_dist.data.conversation import Conversation, Turn
from spd_dist.data.scoring.thoughts import without_thoughts
from spd_dist.data.spans import Span
from spd_dist.data.tasks.bbh import same_text
from spd_dist.data.tasks.protocol import Metric, Row, Score, Split, scored
from spd_dist.errors import DataError


@dataclass(frozen=True)
class Messages:
    """A row is `messages`, and `tools` if there are any; what is learned and measured is its last assistant turn."""

    name: str = "messages"
    metric: Metric = "nll"
    test_size: int | None = None
    fields: Mapping[str, type] = field(default_factory=lambda: {"messages": list, "tools": list})
    sources: Mapping[Split, str] = field(default_factory=dict)

    def normalise(self, raw: Mapping[str, Any], subset: str) -> Row | None:
        """The turns up to the last of the assistant, without fields that are null; tools as a list.

        Raises:
            DataError: turns without a role, no assistant turn of text, or nothing before it.
        """
        given, tools = raw["messages"], raw.get("tools") or []
        if isinstance(tools, str):  # as files hold them whose columns are of one type
            tools = json.loads(tools)
        where = f"row {raw.get('id')!r}, field 'messages'"
        if not isinstance(given, (list, tuple)) or not all(
            isinstance(turn, Mapping) and turn.get("role") for turn in given
        ):
            raise DataError(f"{where}: must be a list of {{role, content}}; correct the row")
        turns = [{key: value for key, value in turn.items() if value is not None} for turn in given]
        last = max((place for place, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
        if last == 0 or not isinstance(turns[last].get("content"), str) or not turns[last]["content"].strip():
            raise DataError(
                f"{where}: its last assistant turn must be text with a turn before it, not "
                f"{sorted(turns[last]) if turns else 'nothing'}; end the row with what the model should say"
            )
        return {**raw, "messages": turns[: last + 1], "tools": list(tools)}

    def problem(self, row: Row) -> str:
        """What users said."""
        return "\n".join(str(turn.get("content")) for turn in row["messages"][:-1] if turn["role"] == "user")

    def prompt(self, row: Row) -> str:
        """All turns but the last."""
        return Conversation(_turns(row)[:-1], row["tools"])

    def answer(self, row: Row) -> str:
        """The last assistant turn."""
        return f" {_turns(row)[-1]['content'].strip()}"

    def target_spans(self, row: Row) -> Sequence[Span]:
        """The last assistant turn, behind its thought if it has one."""
        return spans.after_thought(self.prompt(row), self.answer(row), row)

    def score(self, row: Row, output: str) -> Score:
        """Whether the output is the reference, word for word: a diagnostic beside the likelihood."""
        spoken, gold = without_thoughts(output), without_thoughts(self.answer(row)).text.strip()
        said = spoken.text.strip() or None
        return scored(gold, said, said, same=same_text, is_unfinished=spoken.is_unfinished)


def _turns(row: Row) -> list[Turn]:
    return row["messages"]


MESSAGES = Messages()
