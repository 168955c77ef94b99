"""A task of the user's own, described in a YAML file (`spd_dist.data.tasks.description`), without code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spd_dist.data.conversations import Conversation, as_text, read_conversation
from spd_dist.data.patterns import compiled
from spd_dist.data.scoring.choices import committed_letter, stated_letter
from spd_dist.data.scoring.expressions import expression_answers, same_expression
from spd_dist.data.scoring.extract import boxed_answers
from spd_dist.data.scoring.numbers import parse_number, same_number
from spd_dist.data.scoring.programs import called_by
from spd_dist.data.scoring.statements import number_answers
from spd_dist.data.scoring.thoughts import until_next_question, without_thoughts
from spd_dist.data.spans import Span, find_mask
from spd_dist.data.tasks.bbh import same_text
from spd_dist.data.tasks.description import (
    LETTERS,
    Description,
    choices_at,
    filled,
    letter_of,
    places,
    read_description,
    renamed,
    value_at,
)  # fmt: skip
from spd_dist.data.tasks.execution import Execute, allowed, judged_by_tests
from spd_dist.data.tasks.protocol import SPLITS, Metric, Row, Score, Split, scored
from spd_dist.data.text_files import shown
from spd_dist.errors import ConfigError, DataError

Answers = tuple[str | None, str | None]
"""The strict and the lenient answer of an output."""
LETTER, CHOICE = "letter", "choice"
"""The fields that metrics `choice` and `likelihood` add to a row: the letter and the text of its gold."""
_LETTERS_OF_NO_LIST = 10


@dataclass(frozen=True)
class DescribedTask:
    """A task made of templates: `{field}` stands for a field of the row, every other brace for itself."""

    description: Description

    @property
    def name(self) -> str:
        """The file's `name`."""
        return self.description.name

    @property
    def metric(self) -> Metric:
        """All but `nll` are an accuracy."""
        return "nll" if self.description.metric == "nll" else "accuracy"

    @property
    def fields(self) -> Mapping[str, type]:
        """Every field that a template names."""
        description = self.description
        templates = [description.prompt, description.answer, description.gold, *description.code.values()]
        found = set(places([*templates, *[description.choices] * description.has_choices, description.messages]))
        return dict.fromkeys(sorted(found - {LETTER, CHOICE} if description.has_choices else found), object)

    @property
    def sources(self) -> Mapping[Split, str]:
        """The file's `sources`."""
        return {split: self.description.sources[split] for split in SPLITS if split in self.description.sources}

    @property
    def test_size(self) -> int | None:
        """A file publishes none."""
        return None

    def normalise(self, raw: Mapping[str, Any], subset: str) -> Row | None:
        """The row with its fields renamed, and what is compared as text.

        Raises:
            DataError: a template cannot be filled, or the gold is not what the metric compares.
        """
        row = self._renamed(raw)
        if self.description.messages == "{messages}" and "messages" not in row and "conversations" in row:
            row["messages"] = row["conversations"]  # ShareGPT's
        self.prompt(row)
        self.answer(row)
        self._check_gold(row)
        return row

    def _renamed(self, raw: Mapping[str, Any]) -> Row:
        return renamed(raw, self.description.fields)

    def problem(self, row: Row) -> str:
        """The filled prompt."""
        return self.prompt(row)

    def prompt(self, row: Row) -> str:
        """The prompt template, filled; of messages, those before the last answer, as lines."""
        conversation = self.conversation(row)
        if conversation is None:
            return filled(self.description.prompt, row)
        return as_text(conversation.until(conversation.place_of("last")).messages)

    def answer(self, row: Row) -> str:
        """The answer template, filled; of messages, where there is no template, the last turn if it is an answer."""
        conversation = self.conversation(row)
        if conversation is None or self.description.answer:
            return filled(self.description.answer, row)
        last = conversation.messages[conversation.place_of("last") :]
        return last[0]["content"] if last else ""

    @property
    def mask(self) -> str:
        """The file's mask."""
        return self.description.mask

    def conversation(self, row: Row) -> Conversation | None:
        """The row's messages, for a task of messages.

        Raises:
            DataError: they are not of that form.
        """
        description = self.description
        if not description.messages:
            return None
        has_tools = next(places([description.tools])) in row
        tools = value_at(description.tools, row) if has_tools else None
        found = read_conversation(value_at(description.messages, row), tools)
        return found if description.answer or self.metric != "nll" else found.until_last_answer()

    def target_spans(self, row: Row) -> Sequence[Span]:
        """What the file's mask marks."""
        return find_mask(self.description.mask)(self.prompt(row), self.answer(row), row)

    def gold(self, row: Row) -> str:
        """What an answer is compared with: under `choice`, a letter.

        Raises:
            DataError: it names no choice.
        """
        gold = filled(self.description.gold, row) if self.description.gold else self.answer(row).strip()
        return letter_of(gold, self.choices_of(row)) if self.description.has_choices else gold

    def choices_of(self, row: Row) -> list[str]:
        """The choices of a task with metric `choice` or `likelihood`, as texts."""
        if not self.description.has_choices:
            return []
        return choices_at(self.description.choices, row)

    def score(self, row: Row, output: str) -> Score:
        """By the file's extraction and metric."""
        same = SAME.get(self.description.metric, same_text)
        spoken = without_thoughts(output)
        gold = self.gold(row)
        try:
            strict, lenient = self._answers(spoken.text, row)
            return scored(gold, strict, lenient, same=same, is_unfinished=spoken.is_unfinished)
        except TimeoutError:  # of a pattern
            return Score(correct=False, extracted=None, gold=gold, reason="time")

    def _answers(self, text: str, row: Row) -> Answers:
        kind, _, pattern = self.description.reads.partition(":")
        if kind == "regex":
            found = compiled(pattern, "data.task, extraction").last(text)
            return found, found
        text = text if kind in ("text", "whole") else until_next_question(text)
        if kind == "letter":
            choices = self.choices_of(row)
            letters = LETTERS[: len(choices) or _LETTERS_OF_NO_LIST]
            return stated_letter(text, letters, choices), committed_letter(text, letters, choices)
        if kind == "boxed" and self.description.metric == "math":
            return expression_answers(text)
        return EXTRACT[kind](text)

    def _check_gold(self, row: Row) -> None:
        gold, metric = self.gold(row), self.description.metric
        if metric == "numeric" and parse_number(gold) is None:
            raise DataError(f"gold: {gold!r} is no number; correct the row, or set metric: exact in the task")
        if metric == "regex":
            try:
                compiled(gold, "gold")
            except ConfigError as error:
                raise DataError(str(error)) from error
        if metric not in ("nll", "tests") and not gold.strip():
            raise DataError(f"gold: {self.description.gold!r} gives no text; correct the row, or the task")


@dataclass(frozen=True)
class DescribedChoice(DescribedTask):
    """A described task whose answers are choices: they may be scored by their likelihood, too."""

    @property
    def is_by_likelihood(self) -> bool:
        """Whether they only are, whatever `choices.scoring` says."""
        return self.description.metric == "likelihood"

    def alternatives(self, row: Row) -> Sequence[Row]:
        """The row with each of its choices as the gold.

        Raises:
            ConfigError: the answer does not depend on the choice.
        """
        if not {LETTER, CHOICE} & set(places([self.description.answer])):
            raise ConfigError(
                "choices.scoring: likelihood (or metric: likelihood) needs the place of the choice in the answer "
                f'of the task {self.name!r}; set answer: " {{letter}}", or " {{choice}}" for its text'
            )
        return [
            {**row, LETTER: letter, CHOICE: choice}
            for letter, choice in zip(LETTERS, self.choices_of(row), strict=False)
        ]

    def _renamed(self, raw: Mapping[str, Any]) -> Row:
        row = super()._renamed(raw)
        letter = self.gold(row)
        return {**row, LETTER: letter, CHOICE: self.choices_of(row)[LETTERS.index(letter)]}


@dataclass(frozen=True)
class DescribedProgram(DescribedTask):
    """A described task whose answers are programs: its tests decide."""

    execute: Execute | None = None

    def normalise(self, raw: Mapping[str, Any], subset: str) -> Row | None:
        """As of any described task, and its tests are texts."""
        row = super().normalise(raw, subset)
        self._tests(row or {})
        return row

    def score(self, row: Row, output: str) -> Score:
        """Strict: a fenced block is the program. Lenient: what reads as Python. The tests decide.

        Raises:
            ConfigError: nothing was given to run programs with.
        """
        execute, code = allowed(self.name, self.execute), self.description.code
        tests = self._tests(row)
        name, setup = (filled(code.get(key, ""), row) for key in ("entry_point", "setup"))
        return judged_by_tests(
            without_thoughts(output), self.gold(row), lambda program: execute(program, tests, setup),
            called={name} if name else called_by(tests),
        )  # fmt: skip

    def _tests(self, row: Row) -> list[str]:
        """Texts to be run, one after the other; of HumanEval's form, `check(candidate)` is called."""
        code = self.description.code
        value = value_at(code["tests"], row) if code["tests"].startswith("{") else row[code["tests"]]
        tests = [value] if isinstance(value, str) else value
        if not isinstance(tests, (list, tuple)) or not tests or not all(isinstance(test, str) for test in tests):
            raise DataError(f"field {code['tests']}: {shown(value)} must be a text or a list of texts, each a test")
        name = filled(code.get("entry_point", ""), row)
        if any("def check(" in test for test in tests):
            if not name:
                raise DataError(f"field {code['tests']}: it defines check(); set code.entry_point in the task")
            return ["\n\n".join([*tests, f"check({name})"])]
        return list(tests)


SAME: Mapping[str, Callable[[str, str], bool]] = {
    "exact": same_text, "numeric": same_number, "math": same_expression, "choice": str.__eq__, "likelihood": str.__eq__,
    "regex": lambda text, gold: bool(compiled(gold, "gold").spans(text)),
}  # fmt: skip
"""Metric -> whether an extraction and the gold are the same."""


def _whole(text: str) -> Answers:
    found = text.strip() or None
    return found, found


def _first_line(text: str) -> Answers:
    return _whole(text.strip().partition("\n")[0])


EXTRACT: Mapping[str, Callable[[str], Answers]] = {
    "number": number_answers,
    "boxed": lambda text: boxed_answers(text, same_text),
    "text": _first_line,
    "whole": _whole,
}
"""Extractions by name, but those that need the row."""


MESSAGES = DescribedTask(Description("messages", messages="{messages}", gold="", mask="after_thought", metric="nll"))
"""Rows of messages, measured by the likelihood of the supervised turn."""


def read_task(path: str) -> DescribedTask:
    """The task that a YAML file describes.

    Raises:
        ConfigError: the file cannot be read, or a key is missing, unknown or not valid.
    """
    description = read_description(path)
    kinds = {"tests": DescribedProgram, "choice": DescribedChoice, "likelihood": DescribedChoice}
    return kinds.get(description.metric, DescribedTask)(description)
