"""What a task is: a few functions of a row, and where its rows come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from spd_dist.data.spans import Span

Row = dict[str, Any]
"""A problem as plain data: `id`, and the fields that its task names."""

Split = Literal["train", "calibration", "test"]
SPLITS: tuple[Split, ...] = ("train", "calibration", "test")
Metric = Literal["accuracy", "nll"]


@dataclass(frozen=True)
class Score:
    """How one output was judged."""

    correct: bool
    extracted: str | None
    """What was taken as the answer: the strict extraction, else the lenient one; None where there is none."""
    gold: str
    strict: str | None = None
    """What the output gives in the form that the prompt asks for."""
    lenient: str | None = None
    """What could be taken from anywhere in the output."""
    strict_correct: bool = False
    lenient_correct: bool = False
    reason: str = ""
    """Why it is right or wrong: `right`, `other value`, `no answer`, `unfinished` (its thought was cut), `failed`."""


class Example(Protocol):
    """The part of a task that makes an example of a row: prompt + answer, and what of them is learned."""

    def prompt(self, row: Row) -> str:
        """What the policy is asked."""
        ...

    def answer(self, row: Row) -> str:
        """The reference answer, with the white space that parts it from the prompt; "" if calibration needs none."""
        ...

    def target_spans(self, row: Row) -> Sequence[Span]:
        """The characters of prompt + answer that define correctness."""
        ...


class Task(Example, Protocol):
    """The seam for tasks. Texts are characters, never tokens; prompt + answer is the example in plain form."""

    @property
    def name(self) -> str:
        """What `data.task` calls it."""
        ...

    @property
    def metric(self) -> Metric:
        """`accuracy`: the share of correct scores. `nll`: the mean negative log-likelihood of the reference answers."""
        ...

    @property
    def fields(self) -> Mapping[str, type]:
        """What each row must hold besides its `id`."""
        ...

    @property
    def sources(self) -> Mapping[Split, str]:
        """Where the rows of a split come from by default (`spd_dist.data.sources`); a split may be absent."""
        ...

    @property
    def test_size(self) -> int | None:
        """Rows of the published test split; None where none is published."""

    def normalise(self, raw: Mapping[str, Any], subset: str) -> Row | None:
        """A published row with our fields (`subset`: the hub's config name), or None to drop it."""

    def problem(self, row: Row) -> str:
        """What makes two rows the same problem, without instructions: what leak checks compare."""
        ...

    def score(self, row: Row, output: str) -> Score:
        """Judge what the policy answered."""
        ...


@runtime_checkable
class ScoredByChoices(Protocol):
    """The seam for tasks whose answers are choices, beside `Task`: `choices.scoring=likelihood` needs it."""

    def alternatives(self, row: Row) -> Sequence[Row]:
        """The row with each of its choices as the answer."""
        ...


def scored(gold: str, strict: str | None, lenient: str | None, *, same: Any, is_unfinished: bool = False) -> Score:
    """The score of two extractions against the reference, by the equality `same(extracted, gold)`."""
    strict_correct = strict is not None and same(strict, gold)
    lenient_correct = lenient is not None and same(lenient, gold)
    correct = strict_correct if strict is not None else lenient_correct
    extracted = strict if strict is not None else lenient
    if correct:
        reason = "right"
    elif is_unfinished:
        reason = "unfinished"
    else:
        reason = "no answer" if extracted is None else "other value"
    return Score(correct, extracted, gold, strict, lenient, strict_correct, lenient_correct, reason)
