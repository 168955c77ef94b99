"""Which tokens of an example are supervised, and the account of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from spd_dist.config import Calibrate, Data
from spd_dist.data.spans import Span, find_mask, tokens_in_spans
from spd_dist.data.tasks.protocol import Row, Task
from spd_dist.data.templates import Tokenizer, adds_special_tokens, render_example
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


def mask_row(row: Row, task: Task, tokenizer: Tokenizer, data: Data, calibrate: Calibrate) -> MaskedText:
    """The example of a row, rendered and tokenised, with the tokens that `calibrate.mask` supervises.

    Raises:
        DataError: the mask gives spans outside the text, or the tokenizer cannot say where its tokens come from.
    """
    prompt, answer = task.prompt(row), task.answer(row)
    spans = task.target_spans(row) if calibrate.mask == "task" else find_mask(calibrate.mask)(prompt, answer, row)
    _check_spans(spans, len(prompt) + len(answer), row["id"], calibrate.mask)
    rendered = render_example(prompt, answer, tokenizer, data)
    if not tokenizer.is_fast:
        raise DataError(
            "model.name: its tokenizer is not a fast one, so spans cannot be mapped to tokens; use tokenizer.json"
        )
    encoding = tokenizer(rendered.text, add_special_tokens=adds_special_tokens(data), return_offsets_mapping=True)
    offsets = tuple((start, stop) for start, stop in encoding["offset_mapping"])
    found = rendered.spans(spans)
    targets = tokens_in_spans(offsets, rendered.text, found, calibrate.span_policy)
    return MaskedText(row["id"], rendered.text, tuple(encoding["input_ids"]), offsets, tuple(targets), tuple(found))


def _check_spans(spans: Sequence[Span], length: int, row_id: str, mask: str) -> None:
    for start, stop in spans:
        if not 0 <= start <= stop <= length:
            raise DataError(
                f"row {row_id!r}: the mask {mask!r} gives the span [{start}, {stop}), outside the {length} characters "
                "of prompt + answer; correct the row or the mask"
            )
