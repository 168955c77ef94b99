"""Examples with their supervised tokens marked, to be looked at before a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.text import Text

from spd_dist.config import Calibrate, Data
from spd_dist.data.masking import MaskedText, mask_row
from spd_dist.data.tasks.protocol import Row, Task
from spd_dist.data.templates import Tokenizer

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
