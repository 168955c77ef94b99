"""Held-out rows with their reference answers, to be scored without sampling; and the wrong answers beside them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from spd_dist.config import Calibrate, Data
from spd_dist.data.masking import MaskedText, mask_row
from spd_dist.data.spans import Span, tokens_in_spans
from spd_dist.data.tasks.protocol import Example, Row, Task
from spd_dist.data.templates import Tokenizer, adds_special_tokens
from spd_dist.errors import DataError
from spd_dist.seeding import generator
from spd_dist.types import SupervisedExample

Part = Literal["prompt", "solution", "answer"]
PARTS: tuple[Part, ...] = ("prompt", "solution", "answer")
NUMBER = re.compile(r"-?\d[\d,]*(\.\d+)?")
LETTER = re.compile(r"\(?([A-Z])\)?")


class WrongToken(NamedTuple):
    """Where a wrong answer parts from the right one, and what it says there."""

    target: int
    """Index among the scored positions."""
    token: int


@dataclass(frozen=True)
class HeldOutExample:
    """A row as the policy reads it, and the positions at which its predictions are looked at."""

    example: SupervisedExample
    """Its targets are the scored positions: all of the solution, and some of the prompt."""
    parts: tuple[Part, ...]
    """Of each target; `answer` are the tokens that define correctness."""
    kl_weights: tuple[float, ...]
    """Of each target in the mean divergence a token of the whole row; 0 where it is not taken."""
    wrong: tuple[WrongToken, ...]
    """None for a task without wrong answers."""

    def positions(self, part: Part) -> list[int]:
        """Indices of the targets of a part at which the divergence is taken."""
        found = enumerate(zip(self.parts, self.kl_weights, strict=True))
        return [index for index, (name, weight) in found if name == part and weight > 0]


@dataclass(frozen=True)
class _BareTask:
    """A task as `mask_row` asks it, without its instruction."""

    task: Task

    def prompt(self, row: Row) -> str:
        whole, problem = self.task.prompt(row), self.task.problem(row)
        targets = self.task.target_spans(row)
        is_behind = all(start >= len(whole) for start, _ in targets)
        return problem if is_behind and whole.startswith(problem) else whole

    def answer(self, row: Row) -> str:
        return self.task.answer(row)

    def target_spans(self, row: Row) -> Sequence[Span]:
        shift = len(self.task.prompt(row)) - len(self.prompt(row))
        return [(start - shift, stop - shift) for start, stop in self.task.target_spans(row)]


def held_out_rows(rows: Sequence[Row], calibration: Sequence[Row], task: Task, num_rows: int) -> list[Row]:
    """The first rows with a reference answer whose problem is none of the calibration's.

    Raises:
        DataError: there are fewer than two.
    """
    used = {task.problem(row).strip() for row in calibration}
    found = [row for row in rows if task.problem(row).strip() not in used and task.answer(row).strip()]
    if len(found) < 2:
        raise DataError(
            f"data.test: {len(found)} of {len(rows)} rows have a reference answer and are not among the calibration "
            "examples, and the mechanism test needs 2; name another data.test, or raise data.num_test"
        )
    return found[:num_rows]


def make_held_out(
    rows: Sequence[Row],
    task: Task,
    tokenizer: Tokenizer,
    data: Data,
    form: Literal["task", "bare"],
    *,
    kl_positions: int,
) -> list[HeldOutExample]:
    """The rows with their answers, in one form of the prompt.

    `task`: as the run asks. `bare`: without chat template, and without the task's instruction where the problem alone
    opens the prompt and the target lies in the answer.

    Raises:
        ConfigError: no chat template.
        DataError: a row whose answer has no token.
    """
    asked, data = (task, data) if form == "task" else (_BareTask(task), dataclasses.replace(data, template="plain"))
    return [_held_out(row, asked, tokenizer, data, kl_positions) for row in rows]


def _held_out(row: Row, task: Example, tokenizer: Tokenizer, data: Data, kl_positions: int) -> HeldOutExample:
    mask = Calibrate(allow_empty=True)
    whole = mask_row(row, task, tokenizer, data, dataclasses.replace(mask, mask="answer"))
    gold = mask_row(row, task, tokenizer, data, mask)
    if not whole.targets:
        raise DataError(f"row {row['id']!r}: its reference answer has no token of its own; correct the row")
    inside = set(gold.targets) & set(whole.targets)
    answer = inside or set(whole.targets)  # a program's tests lie in the prompt: there the whole answer counts
    prompt = _spread(range(1, whole.targets[0]), kl_positions)
    solution = [target for target in whole.targets if target not in answer]
    sampled = {"prompt": prompt, "solution": _spread(solution, kl_positions), "answer": sorted(answer)}
    sizes = {"prompt": whole.targets[0] - 1, "solution": len(solution), "answer": len(answer)}
    part_of: dict[int, Part] = {
        **dict.fromkeys(prompt, "prompt"), **dict.fromkeys(solution, "solution"), **dict.fromkeys(answer, "answer")
    }  # fmt: skip
    weight_of = {
        target: sizes[part] / len(chosen) / sum(sizes.values()) for part, chosen in sampled.items() for target in chosen
    }
    targets = sorted(part_of)
    texts = wrong_texts(gold, row) if inside else []
    return HeldOutExample(
        SupervisedExample(row["id"], whole.tokens[: targets[-1] + 1], tuple(targets)),
        tuple(part_of[target] for target in targets),
        tuple(weight_of.get(target, 0.0) for target in targets),
        tuple(_wrong_tokens(whole, texts, targets, tokenizer, data)),
    )


def _spread(positions: Sequence[int], count: int) -> list[int]:
    """`count` of the positions, evenly spread; all if there are no more."""
    if len(positions) <= count:
        return list(positions)
    return [positions[(2 * index + 1) * len(positions) // (2 * count)] for index in range(count)]


class WrongText(NamedTuple):
    """An example with another answer in the place of the right one."""

    text: str
    span: Span


def wrong_texts(gold: MaskedText, row: Mapping[str, object]) -> list[WrongText]:
    """The example with each wrong answer: a number with one digit changed, another letter of the choices; else none."""
    if len(gold.spans) != 1:
        return []
    (start, stop), text = gold.spans[0], gold.text
    value = text[start:stop].strip()
    start += text[start:stop].index(value) if value else 0
    head, tail = text[:start], text[start + len(value) :]
    return [WrongText(head + wrong + tail, (start, start + len(wrong))) for wrong in wrong_values(value, row)]


def wrong_values(value: str, row: Mapping[str, object]) -> list[str]:
    """Wrong answers of the form of `value`."""
    choices = row.get("choices")
    lettered = LETTER.fullmatch(value)
    if lettered and isinstance(choices, (list, tuple)):
        letters = [chr(ord("A") + index) for index in range(len(choices))]
        return [value.replace(lettered[1], letter) for letter in letters if letter != lettered[1]]
    if not NUMBER.fullmatch(value):
        return []
    places = [index for index, character in enumerate(value) if character.isdigit()]
    return [
        value[:place] + digit + value[place + 1 :]
        for place in places
        for digit in "0123456789"
        if digit != value[place] and not (digit == "0" and place == places[0] and len(places) > 1)
    ]


def _wrong_tokens(
    right: MaskedText, texts: Sequence[WrongText], targets: Sequence[int], tokenizer: Tokenizer, data: Data
) -> list[WrongToken]:
    """The first token of each wrong answer that is not the right one's, where that position is scored."""
    if not texts:
        return []
    encoded = tokenizer([one.text for one in texts], add_special_tokens=adds_special_tokens(data))["input_ids"]
    index_of, found = {target: index for index, target in enumerate(targets)}, set()
    for tokens in encoded:
        pairs = enumerate(zip(right.tokens, tokens, strict=False))
        place = next((index for index, (ours, theirs) in pairs if ours != theirs), None)
        if place in index_of:
            found.add(WrongToken(index_of[place], tokens[place]))
    return sorted(found)


def wrong_examples(
    rows: Sequence[Row], task: Task, tokenizer: Tokenizer, data: Data, calibrate: Calibrate, seed: int
) -> list[SupervisedExample]:
    """The calibration rows with one wrong answer each, drawn from a named generator, its tokens supervised.

    Rows of a task without wrong answers are left out.
    """
    examples = []
    for row in rows[: calibrate.num_examples]:
        texts = wrong_texts(mask_row(row, task, tokenizer, data, calibrate), row)
        if not texts:
            continue
        draw = generator(seed, "mechanism", "wrong", row["id"])
        text, span = texts[int(torch.randint(len(texts), (1,), generator=draw))]
        found = tokenizer(text, add_special_tokens=adds_special_tokens(data), return_offsets_mapping=True)
        offsets = [(start, stop) for start, stop in found["offset_mapping"]]
        targets = tokens_in_spans(offsets, text, [span], calibrate.span_policy)
        if targets and targets[-1] < calibrate.max_tokens:
            tokens = tuple(found["input_ids"][: targets[-1] + 1])
            examples.append(SupervisedExample(row["id"], tokens, tuple(targets)))
    return examples


def shuffled_examples(examples: Collection[SupervisedExample], seed: int) -> list[SupervisedExample]:
    """The same examples with as many targets each, at positions that were drawn at random."""
    shuffled = []
    for example in examples:
        draw = generator(seed, "mechanism", "shuffled", example.id)
        order = torch.randperm(len(example.tokens) - 1, generator=draw)[: len(example.targets)]
        shuffled.append(dataclasses.replace(example, targets=tuple(sorted((order + 1).tolist()))))
    return shuffled
