"""The choice that an output commits to: a letter inside of prose is none, and neither are two that differ."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from spd_dist.data.scoring.numbers import plain
from spd_dist.data.scoring.thoughts import settled

_NEGATED = re.compile(
    r"\b(?i:not|isn't|neither|nor|never|rather than|instead of|rule out|eliminate)\s+(?:option |choice |answer )?"
    r"\(?[A-Z]\)?(?=[\s.,;:)]|$)(?:,?\s+but\b)?"
    r"|(?<!\w)\(?[A-Z]\)?\s*[:=]\s*(?:no|wrong|incorrect|false)\b"
    r"|(?<!\w)\(?[A-Z]\)?(?:[.:]?[ \t]+(?![A-Z]\b)[\w']+){0,4}?[ \t]+(?:is|are|was|seems)\s+"
    r"(?:not|wrong|incorrect|false|out)\b"
)
"""What an answer is not: `not A but`, `A is wrong`."""
_ANSWER = (
    r"\b(?:[Aa](?:nswer|NSWER)\b(?:\"|(?: to [^.\n:]{1,60}?)?)|[Aa]ns\.?(?=[\s:=])"
    r"|(?:(?:correct|right|best) )?(?:[Oo]ption|[Cc]hoice|[Ll]etter|one)(?=\s*(?:is|was|:|=)))"
    r"\s*(?:is|was|would be|must be|should be|:|=|-|\u2014)(?:\s+but\b)?\W*?"
    r"(?:(?:the |an? )?(?:correct |right |best )?(?:option|choice|letter|answer)\b[\s:]*(?:is\b)?\W*)?"
)
_AFTER_OPENING = (
    r"(?=[).:,;\]\"*/]|\s*[=(]|\s*[-\u2014]\s|\s*\n|\s*$|\s+(?:or|and|&|/)\s"
    r"|\s+(?:is|because|since|as|seems|would)\b)"
)
_CHOSEN = (
    r"\b(?:(?:I|we)(?:'d| would|'ll| will)? (?:choose|chose|pick|select|go with|say)"
    r"|choose|chose|pick|select|go with)"
    r"\s+(?:the )?(?:option |choice |letter |answer )?"
)
_IT_IS = r"\b(?:[Ii]t|[Tt]hat|[Tt]his)(?:'s| is| must be| should be| has to be)\s+"
_CONCLUDED = (
    r"\b(?i:so|therefore|thus|hence|clearly|definitely|certainly|obviously|of course),?"
    r"\s+(?:the )?(?:option |choice |letter )?"
)
_HEADED = r"(?m:^)\W*(?i:(?:the )?(?:final |correct )?answer)[ \t]*\n\s*"
"""A heading with the answer below it."""
_TAKEN_BACK = r"\b(?i:no|wait|actually|sorry|rather)[,:]\s+"
_END = r"(?=\s*(?:[.,;:!)*\"]|$|\n)|\s+(?:because|since|as)\b)"


def committed_letter(text: str, letters: str, choices: Sequence[str] = ()) -> str | None:
    """The letter that `text` gives as its answer, in whatever form a person would take for one; else None.

    `Answer: B`, `(B)`, `B.`, `the answer is b`, `B is correct`, or the text of one of `choices` alone. Of two letters
    none, unless the first is taken back: `A or B` is no answer, `not A but B` is B.
    """
    given = _all_given(text, letters)
    if any(letter is not None for _, letter in given):  # what was stated is the answer, and of several that differ none
        return stated_letter(text, letters)
    return _by_text(text, letters, choices) or _in_brackets(text, letters, choices)


def stated_letter(text: str, letters: str) -> str | None:
    """The letter that `text` opens with, or says the answer to be."""
    return settled(_all_given(text, letters), _spelled(text), str.__eq__)


def _all_given(text: str, letters: str) -> list[tuple[int, str | None]]:
    return sorted(_given(_spelled(text), letters), key=lambda one: one[0])


def _spelled(text: str) -> str:
    return _NEGATED.sub(" ", _unboxed(plain(text))).strip()


def _given(text: str, letters: str) -> Iterator[tuple[int, str | None]]:
    both = f"{letters}{letters.lower()}"
    alone = re.fullmatch(rf"[^\w?]*(?:\d+[.)]\s*)?_*([{both}])_*[^\w?]*", text)
    if alone:
        yield 0, alone[1].upper()
        return
    opening = re.match(rf"[\s*\"'\[(]*([{letters}]){_AFTER_OPENING}", text)
    opening = opening or re.match(rf"[\s*\"]*\(([{both}])\)", text) or re.match(rf"[\s*]*([{both}])[).](?=\s|$)", text)
    is_told = (
        opening
        and re.match(r"\s+(?:is|as|seems|would)\b", text[opening.end() :])
        and (re.search(rf"{_ANSWER}[\s*\"'\[(]*[{both}](?![\w'?])", text))
    )  # `A is a letter; the answer is D`
    is_word = opening and _is_word(opening[1], text[opening.end() :])
    if opening and not is_told and not is_word and not _lists(text, letters, opening[1]):
        yield 0, _alone(opening[1], text[opening.end() :], letters)
    for pattern, taken, end in (
        (_ANSWER, both, ""),
        (_HEADED, both, r"(?=[).]*\s*(?:\n|$))"),
        (_CHOSEN, letters, ""),
        *((one, letters, _END) for one in (_IT_IS, _CONCLUDED, _TAKEN_BACK)),
    ):
        for match in re.finditer(rf"{pattern}[\s*\"'\[(]*([{taken}])(?![\w'?]){end}", text):
            rest = text[match.end() :]
            if not _is_word(match[1], rest):
                yield match.start(1), _alone(match[1], rest, letters)
    for match in re.finditer(
        rf"(?<!\w)(?:\(?([{letters}])\)?|\(([{both}])\))(?:(?:[.):]?[ \t]+[\w']+){{0,4}}?"
        r" (?:is|must be|seems) (?:the )?"
        r"(?:correct|right|best|true)|\s*[:=]\s*(?:yes|correct|right|true))\b",
        text,
    ):
        yield match.start(), _alone(match[1] or match[2], "", letters)


def _lists(text: str, letters: str, first: str) -> bool:
    """Whether the text opens with the choices once more: `A. one`, line by line, or `A. B. C.`."""
    lines = set(re.findall(rf"^[\s*]*\(?([{letters}])[).:]", text, re.MULTILINE)) - {first.upper()}
    only = set(re.findall(rf"^\W*([{letters}])\W*$", text, re.MULTILINE))
    return bool(lines) or len(only) > 1 or re.match(rf"\W*[{letters}][.)]\s+\(?[{letters}][.)]", text) is not None


def _is_word(letter: str, rest: str) -> bool:
    """Whether the letter is the article or the pronoun: `A man`, `I think`."""
    return letter in "AaIi" and re.match(r"\s+[a-z]", rest) is not None and not re.match(
        r"\s+(?:or|and|is|because|since|as|seems|would)\b", rest
    )  # fmt: skip


def _alone(letter: str, rest: str, letters: str) -> str | None:
    """The letter, if no other one stands beside it as an alternative."""
    other = re.match(rf"[).\]\"*]*\s*(?:or|and|&|/|,)\s*(?:option |choice )?\(?([{letters}])(?![\w'])", rest)
    is_other = other is not None and other[1] != letter.upper() and not _is_word(other[1], rest[other.end() :])
    return None if is_other else letter.upper()


def _by_text(text: str, letters: str, choices: Sequence[str]) -> str | None:
    """The letter of the choice whose text is the whole answer."""
    said = {_bare(text), _bare(text.strip().partition("\n")[0])}
    said |= {re.sub(r"^(?:it|that|this)(?: is|'s) ", "", one) for one in said}
    said |= {_bare(match[1]) for match in re.finditer(rf"{_ANSWER}([^\n]*)", text)}
    named = (
        (letter, {_bare(str(choice)), _bare(f"{letter} {choice}")})
        for letter, choice in zip(letters, choices, strict=False)
    )
    found = {letter for letter, names in named if names & (said - {""})}
    return found.pop() if len(found) == 1 else None


def _in_brackets(text: str, letters: str, choices: Sequence[str]) -> str | None:
    """The letter in brackets, or after `option`."""
    spelled = _NEGATED.sub(" ", plain(text))
    if re.match(r"\W*[A-Za-z]\W*$", spelled):
        return None
    found = re.finditer(
        rf"(?<!\w)\(([{letters}])\)|\b(?:[Oo]ption|[Cc]hoice|[Ll]etter|[Aa]nswer) ([{letters}{letters.lower()}])\b",
        spelled,
    )
    given = [(match.start(), (match[1] or match[2]).upper()) for match in found]
    for choice in choices:
        spelled = spelled.replace(str(choice), " " * len(str(choice)))  # `or` may stand in one
    return None if _unsure(spelled) else settled(given, spelled, str.__eq__)


def _unsure(text: str) -> bool:
    return re.search(r"\b(?:or|not sure|unsure|don't know|cannot|maybe|perhaps)\b", text, re.IGNORECASE) is not None


def _unboxed(text: str) -> str:
    return re.sub(r"\\f?boxed\s*\{([^{}]*)\}", r" answer: \1 ", text)


def _bare(text: str) -> str:
    return re.sub(r"\s+", " ", plain(text).casefold()).strip(" .*\"'`:;,!")
