"""BIG-Bench Hard: 27 tasks, answered without examples and compared after normalising."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from spd_dist.data import spans
from spd_dist.data.scoring.choices import committed_letter, letter_in_a_sentence, stated_letter
from spd_dist.data.scoring.numbers import plain, same_number
from spd_dist.data.scoring.statements import number_answers, segment_number, stated_answers
from spd_dist.data.scoring.thoughts import TURNED, settled, until_next_question, without_thoughts
from spd_dist.data.spans import Span
from spd_dist.data.tasks.protocol import Metric, Row, Score, Split, scored

INSTRUCTION = "Give only the answer, without an explanation."
SUBTASKS = (
    "boolean_expressions", "causal_judgement", "date_understanding", "disambiguation_qa", "dyck_languages",
    "formal_fallacies", "geometric_shapes", "hyperbaton", "logical_deduction_five_objects",
    "logical_deduction_seven_objects", "logical_deduction_three_objects", "movie_recommendation",
    "multistep_arithmetic_two", "navigate", "object_counting", "penguins_in_a_table",
    "reasoning_about_colored_objects", "ruin_names", "salient_translation_error_detection", "snarks",
    "sports_understanding", "temporal_sequences", "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects", "tracking_shuffled_objects_three_objects", "web_of_lies",
    "word_sorting",
)  # fmt: skip
WORDS = ("true", "false", "yes", "no", "valid", "invalid")
"""Answers that are one of two words."""
_ONLY_A_WORD = re.compile(
    rf"^\W*({'|'.join(WORDS)})(?:(?:,? (?:and )?not \w+)?\W*$|,? (?:because|since)\b)", re.IGNORECASE | re.MULTILINE
)
_SENTENCE_OF_A_WORD = re.compile(rf"(?:^|(?<=[.!?])\s+)({'|'.join(WORDS)})(?=[.!][*`]*(?:\s|$))", re.IGNORECASE)
_NO = re.compile(r"\bno\b", re.IGNORECASE)
"""An answer here, and no sign that another one is taken back."""
_UNSURE = re.compile(
    r"\b(?:not sure|unsure|uncertain|don't know|maybe|perhaps|cannot (?:say|tell|determine))\b", re.IGNORECASE
)
_GIVEN_WORDS = re.compile(
    r"\A\s*(?:given |original |unsorted |input )?(?:words|list|original|unsorted|input)[^:\n]{0,20}:[^\n]*\n",
    re.IGNORECASE,
)
"""What was to be sorted, repeated before it is."""
_ALONE = re.compile(r"\W*\d+(?:[.,]\d+)*\W*")
"""A line that is one number and nothing else."""
_SLANG = {"yeah": "yes", "yep": "yes", "yup": "yes", "nope": "no"}


@dataclass(frozen=True)
class Bbh:
    """Rows have `task` (one of the 27), `input` and `target`; there is no training split."""

    name: str = "bbh"
    metric: Metric = "accuracy"
    test_size: int | None = 6511
    fields: Mapping[str, type] = field(default_factory=lambda: {"task": str, "input": str, "target": str})
    sources: Mapping[Split, str] = field(
        default_factory=lambda: {"test": ",".join(f"lukaemon/bbh:{name}:test" for name in SUBTASKS)}
    )

    def normalise(self, raw: Mapping[str, Any], subset: str) -> Row | None:
        """The hub has a config a task."""
        return {"task": subset, **raw}

    def problem(self, row: Row) -> str:
        """The input."""
        return row["input"]

    def prompt(self, row: Row) -> str:
        """The input, as it is."""
        return f"{INSTRUCTION}\n{row['input'].strip()}\nAnswer:"

    def answer(self, row: Row) -> str:
        """The target, after a space."""
        return f" {row['target']}"

    def target_spans(self, row: Row) -> Sequence[Span]:
        """The whole target."""
        return spans.whole_answer(self.prompt(row), self.answer(row), row)

    def score(self, row: Row, output: str) -> Score:
        """Strict: the first line, or what is said to be the answer. Lenient: whatever has the target's form."""
        gold, spoken = row["target"], without_thoughts(output)
        strict, lenient = _read(
            gold,
            until_next_question(spoken.text, row["input"]),
            re.findall(r"^\([A-Z]\) (.+)$", row["input"], re.MULTILINE),
        )
        return scored(gold, strict, lenient, same=same_answer, is_unfinished=spoken.is_unfinished)


def same_answer(left: str, right: str) -> bool:
    """Equality as numbers, else as text; lists of words word by word, with or without an `and` before the last."""
    return (
        same_number(left, right)
        or same_text(left, right)
        or same_text(re.sub(r",?\s+and\s+(?=\w+\W*$)", ",", left), right)
    )


def same_text(left: str, right: str) -> bool:
    """Equality up to case, white space, commas, quotes and a full stop."""
    return _plain(left) == _plain(right)


def _plain(text: str) -> str:
    if listed := re.fullmatch(r"[\s*_]*\[((?:\s*(?:'[^']*'|\"[^\"]*\")\s*,?)+)\][\s*_]*\.?", text):  # Python's
        text = re.sub(r"['\"]", "", listed[1])
    if listed := re.fullmatch(r"[\s*_]*[(\[]([^()\[\]]+,[^()\[\]]+)[)\]]\.?[\s*_]*", text):
        text = listed[1]
    if re.fullmatch(r"\s*1[.)] .*", text, re.DOTALL):
        text = re.sub(r"(?:^|(?<=\s))\d+[.)]\s+", " ", text)
    text = re.sub(r"(?<=\w)\s*(?:\u2192|->|=>|<|(?<=\s)/(?=\s))\s*(?=\w)", " ", text.strip("*_ \n"))
    bare = re.sub(r"[\s,;|\"`]+", " ", unicodedata.normalize("NFC", text).casefold()).strip(" .*'")
    return bare if re.search(r"\w", bare) else bare.replace(" ", "")


def _read(gold: str, text: str, choices: Sequence[str]) -> tuple[str | None, str | None]:
    """The strict and the lenient answer of `text`, in the form that `gold` has."""
    if re.fullmatch(r"\([A-Z]\)", gold):
        letters = string.ascii_uppercase
        strict, lenient = stated_letter(text, letters, choices), committed_letter(text, letters, choices)
        lenient = lenient or letter_in_a_sentence(text, letters, choices)
        return strict and f"({strict})", lenient and f"({lenient})"
    text = text.replace("__", "")
    text = _GIVEN_WORDS.sub("", text) if "\n" in text.strip() else text
    said, stated = _said(text), stated_answers(plain(text))
    if stated and not said:
        return None, None
    if gold.casefold() in WORDS:
        turns = list(TURNED.finditer(_NO.sub("  ", text)))
        tail = text[turns[-1].end() :] if turns else ""
        if last := _word(tail) or _concluded(tail) or _lone_word(tail):
            return last, last
        said, is_equation = said.rpartition("=")[2], "=" in said  # a step of a working, it may be
        words = [
            *_ONLY_A_WORD.findall(text),
            *_SENTENCE_OF_A_WORD.findall(text),
            *filter(None, (_word(one) for _, one in stated)),
            _word(said) or "",
        ]
        if len({word.casefold() for word in words if word}) > 1 and not TURNED.search(_NO.sub("  ", text)):
            return None, None
        strict = None if is_equation else _word(said)
        return strict, _word(said) or _concluded(text) or _lone_word(text) or next(filter(None, words), None)
    if re.fullmatch(r"-?\d+", gold):
        marked, lenient = number_answers(text)
        is_whole = bool(stated) or plain(text).strip() == said or _ALONE.fullmatch(said) is not None
        return marked or (segment_number(said) if is_whole and (lenient or not stated) else None), lenient
    listed = _one_word_a_line(text)
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    return listed or _after_colon(said), listed or _after_colon(said if stated else last)


def _said(text: str) -> str:
    """What is said to be the answer, else the first line; nothing where two sayings differ."""
    spelled = plain(text).strip()
    stated = stated_answers(spelled)
    return (
        (settled(stated, _NO.sub("  ", spelled), same_answer) or "") if stated else spelled.partition("\n")[0].strip()
    )


def _word(said: str) -> str | None:
    """One of the two words, where `said` begins with it."""
    said = re.sub(rf"\bnot\s+(?:{'|'.join(WORDS)})\s*,?\s+but\s+", "", said, flags=re.IGNORECASE)
    match = re.match(
        rf"\W*({'|'.join([*WORDS, *_SLANG])})\b(?!\s+(?:or|and|one|doubt|idea|clue|way)\b|\s*[/|?]"
        r"|\s+(?:is|was)(?:n't| not| wrong| incorrect)\b"
        r"|,\s*(?:yes|no|maybe)\s*(?:[,.?]|$))",
        said,
        re.IGNORECASE,
    )
    return _SLANG.get(match[1].casefold(), match[1]) if match else None


def _concluded(text: str) -> str | None:
    """The word that the text ends in, as what something is or follows."""
    match = re.search(rf"(?:\b(?:so|therefore|thus|hence|is)\b|=)[\s,*]+({'|'.join(WORDS)})\W*$", text, re.IGNORECASE)
    return match[1] if match else None


def _lone_word(text: str) -> str | None:
    """The word of the answer's form that stands anywhere, if it is the only one and not negated."""
    text = re.sub(rf",\s*(?:and )?not ({'|'.join(WORDS)})\b", "", text, flags=re.IGNORECASE)
    words = "|".join(WORDS)
    is_negated = re.search(
        r"(?:\b(?:not|neither|never|no way|(?:would|could|might|may) be)|n't)\s+"
        rf"(?:\w+\s+){{0,2}}(?:{words})\b|\b(?:{words})(?:\s*\?|\s+(?:is|was)(?:n't| not| wrong| incorrect)\b)",
        text,
        re.IGNORECASE,
    )
    text = re.sub(r"\bno(?= [a-z])", " ", text, flags=re.IGNORECASE)  # `no one`
    found = {word.casefold() for word in re.findall(rf"\b({words})\b", text, re.IGNORECASE)}
    return found.pop() if len(found) == 1 and not is_negated and not _UNSURE.search(text) else None


def _one_word_a_line(text: str) -> str | None:
    """The words of an answer of one word a line, with or without numbers and bullets."""
    lines = [line for line in plain(text).strip().splitlines() if line.strip()]
    listed = [line for line in lines if re.match(r"\s*(?:[-*\u2022]|\d+[.)])\s+\w", line)]
    listed = [] if stated_answers(plain(text)) else listed
    lines = [re.sub(r"^\s*(?:[-*\u2022]|\d+[.)])\s*", "", line).strip() for line in listed or lines]
    return " ".join(lines) if len(lines) > 1 and all(len(line.split()) == 1 for line in lines) else None


def _after_colon(line: str) -> str | None:
    """`a b` of `The sorted words are: a b`."""
    listed = re.fullmatch(
        r"(?:[^:]*\b)?(?:sorted|order|list|words)\b[^:]*?\b(?:is|are)\s+(.+)", line.strip(), re.IGNORECASE
    )
    return listed[1] if listed else line.rpartition(":")[2].strip() or line.strip() or None


BBH = Bbh()
