"""The choice that an output commits to: a letter inside of prose is none, and neither are two that differ."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence, Set

from spd_dist.data.scoring.numbers import parse_number, plain
from spd_dist.data.scoring.phrases import (
    AFTER_OPENING,
    ANSWER,
    CHOSEN,
    CLAUSE,
    CONCLUDED,
    DENIED,
    END,
    FOREIGN,
    HEADED,
    IS_IN_BRACKETS,
    IS_RIGHT,
    IT_IS,
    NEGATED,
    NO_DENIAL,
    NO_WORD,
    OPTION,
    TAKEN_BACK,
    ticked,
)  # fmt: skip
from spd_dist.data.scoring.thoughts import TURNED, settled

_FOLLOWING = re.compile(r"\W*\w[).:,\]\"*]*[ \t]+(?:[-\u2014][ \t]+)?([^\n]+)")
MOST_MARKUP = 400
"""Characters by which a choice's text may be longer with its markup."""
MIN_CUT = 20
"""Characters of a choice's text that are taken for it where the output was cut."""


def committed_letter(text: str, letters: str, choices: Sequence[str] = ()) -> str | None:
    """The letter that `text` gives as its answer, in whatever form a person would take for one; else None.

    `Answer: B`, `(B)`, `B.`, `the answer is b`, `B is correct`, or the text of one of `choices` alone. Of two letters
    none, unless the first is taken back: `A or B` is no answer, `not A but B` is B.
    """
    given = _all_given(text, letters, choices)
    if given:  # what was stated is the answer, and of several that differ none
        return stated_letter(text, letters, choices)
    return _by_text(text, letters, choices) or _in_a_line(text, letters, choices)


def stated_letter(text: str, letters: str, choices: Sequence[str] = ()) -> str | None:
    """The letter that `text` opens with, or says the answer to be; none, where another choice's text stands behind."""
    found = settled(_all_given(text, letters, choices), _spelled(text), str.__eq__)
    by_letter, by_text = _named_by_lines(text, letters, choices)
    beside = by_letter | (by_text if len(by_text) == 1 else set())  # several texts are the choices once more
    return None if found and beside - {found} and not TURNED.search(text) else found


def _named_by_lines(text: str, letters: str, choices: Sequence[str]) -> tuple[set[str], set[str]]:
    """The letters that stand alone in a line, and those whose choice's text does, or is said to be the answer."""
    spelled, both = _spelled(text), f"{letters}{letters.lower()}"
    by_letter = set(
        re.findall(
            rf"^\W*(?:(?:[Oo]ption|[Ll]etter) )?\(?([{both}])(?![-+#])(?:[^\w?\n]*$|,? because\b)",
            spelled,
            re.MULTILINE,
        )
    )
    names = {
        name: letter
        for letter, choice in zip(letters, choices, strict=False)
        for name in (_bare(str(choice)), _bare(f"{letter} {choice}"), _bare(f"{letter}. {choice}"))
    }
    said = [re.sub(r"^\W*(\w)[).:]*\s+[-\u2014]\s|^\W*(\w)[).:]+\s", r"\1\2 ", line) for line in spelled.splitlines()]
    said += [*(match[1] for match in re.finditer(rf"{ANSWER}([^\n]*)", spelled))]
    said += re.split(r"(?<=[.!?])\s+", spelled)
    return {letter.upper() for letter in by_letter}, {
        names[name] for name in map(_bare, said) if name in names and not re.fullmatch(r"[a-z]?", name)
    }


def _all_given(text: str, letters: str, choices: Sequence[str]) -> list[tuple[int, str | None]]:
    spelled = _spelled(text)
    given = sorted(set(_given(spelled, letters, choices)), key=lambda one: one[0])
    texts = [_bare(str(choice)) for choice in choices]
    return [(place, letter if _is_its_own(letter, spelled, place, letters, texts) else None) for place, letter in given]


def _is_its_own(letter: str | None, text: str, place: int, letters: str, texts: Sequence[str]) -> bool:
    """Whether the text beside a letter is not that of another choice: `B. Rome` and `Rome (B)`, where Rome is C."""
    following = _FOLLOWING.match(text, place)
    if letter is None or letters.index(letter) >= len(texts):
        return True
    own = texts[letters.index(letter)]
    before = text[max(0, place - max(map(len, texts)) - len(" **(")) : place].casefold()
    if any(one != own and re.search(rf"(?<!\w){re.escape(one)}[\s*]*\($", before) for one in texts):
        return False
    if following is None:
        return True
    line = following[1][: max(map(len, texts)) + MOST_MARKUP]  # what is longer is no choice's text
    said = {_bare(line), _bare(re.split(r"[.,;:(]\s|\.$", line)[0])} - {""}
    cut = [one for one in said if len(one) > MIN_CUT]
    is_own = own != "" and (
        any(re.match(rf"{re.escape(own)}(?!\w|[.,]\d)", one) for one in said) or any(own.startswith(one) for one in cut)
    )
    return is_own or not (said & set(texts) or any(other.startswith(one) for one in cut for other in texts))


def _spelled(text: str) -> str:
    spelled = re.sub(r"^[ \t]*\|[-:| \t]+\|?[ \t]*$\n?", "", plain(text), flags=re.MULTILINE)  # a table's rule
    spelled = re.sub(r"^[ \t]*\|[ \t]*|[ \t]*\|[ \t]*$", "", spelled, flags=re.MULTILINE)
    spelled = re.sub(r"\A\W*(?i:sure|of course|certainly|great question|okay|ok)[!.,]\s+", "", spelled)
    spelled = re.sub(r"\A\W*A:\s+(?=Let's|So\b|The\b|\([A-Z]\))", "", spelled)  # of `Q: ... A: ...`
    return NEGATED.sub(" ", ticked(spelled)).strip()


def _given(text: str, letters: str, choices: Sequence[str]) -> Iterator[tuple[int, str | None]]:
    both = f"{letters}{letters.lower()}"
    alone = re.fullmatch(rf"[^\w?]*(?:\d+[.)]\s*)?_*([{both}])(?![-+#])_*[^\w?]*", text)
    if alone:
        yield 0, alone[1].upper()
        return
    opening = re.match(rf"[\s*\"'\[(]*([{letters}])(?!\.[A-Za-z]\b|\.\s?[A-Z][a-z]?\.){AFTER_OPENING}", text)
    opening = (
        opening
        or re.match(rf"[\s*\"]*\(([{both}])\)", text)
        or re.match(rf"[\s*]*([{both}])[).](?!\s?[A-Z][a-z]?\.)(?=\s|$)", text)
    )
    is_told = (
        opening
        and re.match(rf"(?:(?:,| and|, and) [{letters}])*\s+(?:is|are|as|seems|would)\b", text[opening.end() :])
        and (re.search(rf"{ANSWER}[\s*\"'\[(]*[{both}](?![\w'?])", text))
    )  # `A is a letter; the answer is D`
    is_word = opening and _is_word(opening[1], text[opening.end() :])
    if opening and not is_told and not is_word and not _lists(text, letters, opening[1], choices):
        yield 0, _alone(opening[1], text[opening.end() :], letters)
    for pattern, taken, end in (
        (ANSWER, both, ""),
        (FOREIGN, letters, NO_WORD),
        (HEADED, both, rf"{NO_WORD}(?=[).]*\s*(?:\n|$))"),
        (CHOSEN, letters, ""),
        (CHOSEN, letters.lower(), rf"{NO_WORD}{END}"),
        (OPTION, letters, rf"{NO_WORD}{END}"),
        (IS_IN_BRACKETS, letters, r"(?=\))"),
        *((one, letters, f"{NO_WORD}{END}") for one in (IT_IS, CONCLUDED, TAKEN_BACK)),
    ):
        for match in re.finditer(rf"{pattern}[\s*\"'\[(]*([{taken}]){end or NO_WORD}", text):
            rest = text[match.end() :]
            if not _is_word(match[1], rest):
                yield match.start(1), _alone(match[1], rest, letters)
    if match := re.search(
        rf"(?:(?<=\w{{3}}[.!?])|(?<=\.\.\.))\s+\(?([{letters}])\)?[.!]?[\s*`]*$", text
    ):  # a sentence of its own, unless it is where a list of the choices was cut
        listed = re.findall(rf"^[\s*]*\(?([{letters}])[).:][ \t]+\S", text, re.MULTILINE)
        if not listed or match[1] in listed or letters.index(match[1]) != letters.index(listed[-1]) + 1:
            yield match.start(1), match[1]
    for match in re.finditer(
        rf"(?<!\w)(?:\(?([{letters}])\)?|\(([{both}])\))(?:(?:[.):]?[ \t]+{NO_DENIAL}[\w']+){{0,4}}?"
        rf" {IS_RIGHT}|\s*[:=]\s*(?:yes|correct|right|true))\b",
        text,
    ):
        if "(" in match.group() or CLAUSE.search(text[: match.start()]):
            is_shared = re.match(r",? (?:but|and) so is\b", text[match.end() :])
            yield match.start(), None if is_shared else (match[1] or match[2]).upper()


def _lists(text: str, letters: str, first: str, choices: Sequence[str]) -> bool:
    """Whether the text opens with the choices once more: `A. one`, line by line, or `A. one B. two C. three`."""
    found = re.findall(rf"^[\s*]*\(?([{letters}])[).:][ \t]*([^\n]*)", text, re.MULTILINE)
    lines = {
        letter for letter, said in found if first.upper() == letters[0] or _is_choice(said, letter, letters, choices)
    }
    only = set(re.findall(rf"^\W*([{letters}])\W*$", text, re.MULTILINE))
    row = re.findall(rf"(?<!\w)(?:\(?([{letters}])[).:]|\(([{letters.lower()}])\))\s", text.partition("\n")[0])
    line = {(upper or lower).upper() for upper, lower in row}
    own = {letter for letter in line if re.search(_enumerated(letter, letters, choices), text, re.IGNORECASE)}
    is_row = len(line) > 2 or len(own) > 1 or (line == set(letters) and len(line) > 1)
    beside = re.match(rf"\W*[{letters}][.)]\s+\(?[{letters}][.)]", text) is not None
    return bool(lines - {first.upper()}) or len(only) > 1 or beside or is_row


def _enumerated(letter: str, letters: str, choices: Sequence[str]) -> str:
    """The pattern of a letter with its own text: `A) Paris`."""
    place = letters.index(letter)
    return rf"(?<!\w){letter}[).:]\s+" + re.escape(str(choices[place])) if place < len(choices) else r"(?!)"


def _is_choice(said: str, letter: str, letters: str, choices: Sequence[str]) -> bool:
    """Whether this is the choice itself and not a word about it."""
    place = letters.index(letter)
    return place >= len(choices) or _bare(said) in ("", _bare(str(choices[place])))


def _is_word(letter: str, rest: str) -> bool:
    """Whether the letter is the article, the pronoun or a name's: `A man`, `I think`, `C. elegans is`."""
    if re.match(r"\.\s+(?!th|because|since)[a-z]{3,}\s+(?:is|are|was|were|has|have|can)\b", rest):
        return True
    return letter in "AaIi" and re.match(r"\s+[a-z]", rest) is not None and not re.match(
        r"\s+(?:or|and|is|because|since|as|seems|would)\b", rest
    )  # fmt: skip


def _alone(letter: str, rest: str, letters: str) -> str | None:
    """The letter, if no other one stands beside it as an alternative."""
    other = re.match(
        rf"[).\]\"*]*(?:\s*\([^()]*\))?(?:\s*(?:\b(?:or|and)\b|[&/,+;|=<>])\s*(?:or |and )?"
        r"(?:(?:maybe|perhaps|possibly|even|could be|might be|may be) )?(?:option |choice )?[\"'(]*"
        rf"([{letters}])(?![\w'])|[)\]]?[ \t]*\(([{letters}])\)"
        rf"|[)\]]?,?\s+(?:but|though)\s+\(?([{letters}])\)?\s+(?:is also|is possible|could|may|might)"
        rf"|[ \t]+([{letters}])(?=[.,;)]?\s*$|[.,;)]?\s*\n))",
        rest,
    )
    if re.match(r"[).]*\s*\(\s*(?:or|maybe|perhaps|possibly)\b", rest):
        return None
    said = next(filter(None, other.groups())) if other else ""
    is_other = other is not None and said != letter.upper() and not _is_word(said, rest[other.end() :])
    return None if is_other else letter.upper()


def _by_text(text: str, letters: str, choices: Sequence[str]) -> str | None:
    """The letter of the choice whose text is the whole answer."""
    text = plain(text)
    if len(_named_by_lines(text, letters, choices)[1]) > 1:
        return None
    said = {_bare(text), _bare(text.strip().partition("\n")[0])}
    said |= {
        re.sub(r"^(?:it|that|this)(?: is|'s) | is (?:the|my) (?:right |correct )?answer$", "", one) for one in said
    }
    said |= {_bare(match[1]) for match in re.finditer(rf"{ANSWER}([^\n]*)", text)}
    said |= {_bare(re.split(r",? (?:and |but )?(?:not|rather than|instead of) ", one)[0]) for one in said}
    named = (
        (letter, {_bare(str(choice)), _bare(f"{letter} {choice}")})
        for letter, choice in zip(letters, choices, strict=False)
    )
    found = {letter for letter, names in named if names & (said - {""})}
    found = found or _by_number(said, letters, choices)
    return found.pop() if len(found) == 1 else None


def _by_number(said: Set[str], letters: str, choices: Sequence[str]) -> set[str]:
    """The letters of the choices that are the number that is said, written otherwise: `1,000` and `1000`."""
    values = {parse_number(one) for one in said} - {None}
    return {letter for letter, choice in zip(letters, choices, strict=False) if parse_number(str(choice)) in values}


def letter_in_a_sentence(text: str, letters: str, choices: Sequence[str]) -> str | None:
    """The letter of the choice that a single sentence ends in, where it names no other, denies and doubts nothing."""
    bare = _bare(text)
    names = {letter: _bare(str(choice)) for letter, choice in zip(letters, choices, strict=False)}
    named = {letter for letter, name in names.items() if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", bare)}
    ends = {letter for letter in named if bare.endswith(f" {names[letter]}") and not names[letter].isdigit()}
    is_plain = not re.search(r"[.!?;:]\s|\n|\([A-Z]\)", text.strip()) and not _unsure(bare) and not DENIED.search(bare)
    inside = {letter for letter in named - ends if any(names[letter] in names[one] for one in ends)}
    return ends.pop() if is_plain and len(ends) == 1 and named - inside == ends else None


def _in_a_line(text: str, letters: str, choices: Sequence[str]) -> str | None:
    """The letter in brackets, or after `option`, that is a line by itself or beside its own text: `Paris (B)`."""
    spelled = NEGATED.sub(" ", plain(text))
    given = list[tuple[int, str | None]]()
    both = f"{letters}{letters.lower()}"
    for line in re.finditer(
        rf"^(.*?)(?:\(([{letters}])\)|\b(?:[Oo]ption|[Cc]hoice|[Ll]etter|[Aa]nswer) \(?([{both}])\)?)(?![\w'])(.*)$",
        spelled,
        re.MULTILINE,
    ):
        letter = (line[2] or line[3]).upper()
        own = _bare(str(choices[letters.index(letter)])) if letters.index(letter) < len(choices) else _bare(line[4])
        before = re.sub(r"^(?:the )?(?:final |correct )?answer(?: is)?\W*", "", _bare(line[1]))
        if before in ("", own, "probably", "likely", "definitely", "only") and _bare(line[4]) in ("", own, "holds"):
            given.append((line.start(), letter))
    for choice in choices:
        spelled = spelled.replace(str(choice), " " * len(str(choice)))  # `or` may stand in one
    return None if _unsure(spelled) else settled(given, spelled, str.__eq__)


def _unsure(text: str) -> bool:
    return re.search(r"\b(?:or|not sure|unsure|don't know|cannot|maybe|perhaps)\b", text, re.IGNORECASE) is not None


def _bare(text: str) -> str:
    return re.sub(r"\s+", " ", plain(text).casefold()).strip(" .*\"'`:;,!")
