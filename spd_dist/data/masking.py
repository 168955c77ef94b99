"""Which tokens of an example are supervised, the account of it, and examples to look at before a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.text import Text

from spd_dist.config import Calibrate, Data
from spd_dist.data.conversations import Conversation, Conversing, conversation_of
from spd_dist.data.spans import Span, find_mask, merged, tokens_in_spans
from spd_dist.data.tasks.protocol import Example, Row, Task
from spd_dist.data.templates import Tokenizer, adds_special_tokens, render_example, render_turns
from spd_dist.errors import DataError

RULE = (
    "a token is supervised if its characters, less the white space around them, lie {policy} a span; "
    "the first token never is"
)


@dataclass(frozen=True)
class MaskedText:
    """An example with its supervised tokens."""

    id: str
    text: str
    tokens: tuple[int, ...]
    """All of them, before any cut."""
    offsets: tuple[Span, ...]
    targets: tuple[int, ...]
    spans: tuple[Span, ...]
    """The mask's characters, in `text`."""

    def kept(self) -> list[Span]:
        """The characters of the supervised tokens, neighbours joined."""
        runs: list[Span] = []
        for previous, target in pairwise((-2, *self.targets)):
            start, stop = self.offsets[target]
            if target == previous + 1:
                runs[-1] = (runs[-1][0], max(stop, runs[-1][1]))
            else:
                runs.append((start, stop))
        return runs


@dataclass(frozen=True)
class ShownExample:
    """An example's supervised text, for the eye."""

    id: str
    kept: tuple[str, ...]


@dataclass(frozen=True)
class MaskAudit:
    """What the mask kept, over all calibration examples: plain data for `project/summary.json`."""

    mask: str
    rule: str
    num_examples: int
    num_skipped_empty: int
    """No token in the mask at all."""
    num_skipped_truncated: int
    """Every supervised token lay behind calibrate.max_tokens."""
    num_truncated: int
    """Examples that were kept, and lost some of their supervised tokens."""
    num_tokens: int
    num_targets: int
    min_targets: int
    mean_targets: float
    max_targets: int
    shown: tuple[ShownExample, ...]


def mask_row(row: Row, task: Example, tokenizer: Tokenizer, data: Data, calibrate: Calibrate) -> MaskedText:
    """The example of a row, rendered and tokenised, with the tokens that `calibrate.mask` supervises.

    Raises:
        DataError: the mask gives spans outside the text, or the tokenizer cannot say where its tokens come from.
    """
    text, found = _found(row, task, tokenizer, data, calibrate)
    if not tokenizer.is_fast:
        raise DataError(
            "model.name: its tokenizer is not a fast one, so spans cannot be mapped to tokens; use tokenizer.json"
        )
    encoding = tokenizer(text, add_special_tokens=adds_special_tokens(data), return_offsets_mapping=True)
    offsets = tuple((start, stop) for start, stop in encoding["offset_mapping"])
    targets = tokens_in_spans(offsets, text, found, calibrate.span_policy)
    return MaskedText(row["id"], text, tuple(encoding["input_ids"]), offsets, tuple(targets), tuple(found))


def _found(
    row: Row, task: Example, tokenizer: Tokenizer, data: Data, calibrate: Calibrate
) -> tuple[str, Sequence[Span]]:
    """The text of a row's example, and the mask's spans in it."""
    conversation = conversation_of(row, task)
    if conversation is not None and isinstance(task, Conversing):
        return _found_in_turns(row, conversation, task.mask, tokenizer, data, calibrate)
    prompt, answer = task.prompt(row), task.answer(row)
    spans = task.target_spans(row) if calibrate.mask == "task" else find_mask(calibrate.mask)(prompt, answer, row)
    _check_spans(spans, len(prompt) + len(answer), row["id"], calibrate.mask)
    rendered = render_example(prompt, answer, tokenizer, data)
    return rendered.text, rendered.spans(spans)


def _found_in_turns(
    row: Row, conversation: Conversation, mask: str, tokenizer: Tokenizer, data: Data, calibrate: Calibrate
) -> tuple[str, Sequence[Span]]:
    """As `_found`, of messages: the mask is that of each supervised turn, what stands before being its prompt."""
    try:
        rendered = render_turns(conversation, tokenizer, data)
    except DataError as error:
        raise DataError(f"row {row['id']!r}: {error}") from error
    find = find_mask(mask if calibrate.mask == "task" else calibrate.mask)
    spans = [
        span for start, stop in rendered.turns for span in find(rendered.text[:start], rendered.text[start:stop], row)
    ]
    _check_spans(spans, len(rendered.text), row["id"], calibrate.mask)
    said = ((max(start, first), min(stop, last)) for start, stop in merged(spans) for first, last in rendered.contents)
    return rendered.text, merged([(start, stop) for start, stop in said if start < stop])


def _check_spans(spans: Sequence[Span], length: int, row_id: str, mask: str) -> None:
    for start, stop in spans:
        if not 0 <= start <= stop <= length:
            raise DataError(
                f"row {row_id!r}: the mask {mask!r} gives the span [{start}, {stop}), outside the {length} characters "
                "of prompt + answer; correct the row or the mask"
            )


KEPT, CUT, HEAD = "bold black on green", "strike red", "bold cyan"
MARKS = ("[[", "]]")
"""Around kept text where there is no colour."""


def preview_masks(
    rows: Sequence[Row], task: Task, tokenizer: Tokenizer, config: Data, calibrate: Calibrate, *, colour: bool
) -> Iterator[Text]:
    """Each row as `rich` prints it: a head line, then the text as the model reads it, kept tokens marked.

    A row without a supervised token does not fail here, and what lies behind calibrate.max_tokens is struck out.
    """
    for row in rows:
        yield _marked(mask_row(row, task, tokenizer, config, calibrate), calibrate, colour)


def _marked(text: MaskedText, calibrate: Calibrate, colour: bool) -> Text:
    kept = [target for target in text.targets if target < calibrate.max_tokens]
    head = f"{text.id}: {len(kept)} of {len(text.tokens)} tokens kept by the mask {calibrate.mask}"
    if len(kept) < len(text.targets):
        head += f", {len(text.targets) - len(kept)} cut off at calibrate.max_tokens={calibrate.max_tokens}"
    result = Text.assemble((head, HEAD), "\n")
    position = 0
    for start, stop in text.kept():
        result.append(text.text[position:start])
        shown = text.text[start:stop]
        result.append(shown if colour else MARKS[0] + shown + MARKS[1], KEPT)
        position = stop
    result.append(text.text[position:])
    if len(text.tokens) > calibrate.max_tokens and colour:
        first_cut = text.offsets[calibrate.max_tokens][0]
        result.stylize(CUT, len(head) + 1 + first_cut)
    return result.append("\n")
