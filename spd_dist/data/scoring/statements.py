"""What a text states as its answer, and the one number that it gives.

Of several different answers none counts; an aside, a reason or a unit beside the answer changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

from spd_dist.data.scoring.numbers import (
    MARKER,
    NO_NUMBER,
    NUMBER,
    number_in_words,
    numbers_in,
    parse_number,
    plain,
    same_number,
    without_blanks,
)
from spd_dist.data.scoring.phrases import ANSWER_VERBS, ANSWER_WORDS, BESIDE, CLOSING, OUT_OF, REFUSED, SUM_IN_BRACKETS
from spd_dist.data.scoring.thoughts import TURNED, settled

_ARITHMETIC = re.compile(r"[\d)%] ?[-+*/^] ?[$(]*[-.]?\d", re.ASCII)
_VARIABLE = re.compile(r"(?<![\w$])\d*[b-hj-zB-Z] ?[-+*/] ?[\d.]|\d ?[+*^] ?\d*[b-hj-z](?!\w)")
"""A term with a letter: `12x + 3` is no number."""
_STATEMENT = re.compile(
    rf"(?:\banswer\b(?: to [^.\n:]{{1,60}}?| of [^.\n:]{{1,60}}?)?\s*"
    rf"(?:(?:is|was|are|would be|will be|must be|should be)\b(?!')|=|:)|{ANSWER_WORDS}\s*{ANSWER_VERBS})"
    r"[\s:]*"
    r"((?:(?!\banswer\b)[^\n])*)",
    re.IGNORECASE,
)
_KEYED = re.compile(
    r"\"(?:(?:final|correct)[_ ]?)?(?:answer|result)\"\s*:\s*(?:\"([^\"\n]*)\"|([^\",}\n]*))", re.IGNORECASE
)
"""The value of JSON's key `answer`."""
_TURNED_ROUND = re.compile(
    r"([^\n.,;:]{0,40}\d[^\n;:]{0,20}?)\s+is (?:the|my|our) (?:final |correct |right )?answer\b", re.IGNORECASE
)
"""`5 is the answer`."""
_CORRECTED = re.compile(
    rf"{TURNED.pattern}[^\n]{{0,80}}?(?:\b(?:it|that|this)(?: is|'s| was| must be| should be)"
    r"|\bshould (?:be|have been))\s*:?\s*(?=[$]?[-+]?\d)([^\n]*)",
    re.IGNORECASE,
)
"""`No wait, it is 5`."""
_NEGATED = re.compile(
    r",?\s*\b(?:and |but )?(?:not|never|isn't|is not|rather than|instead of)\s+[$\u20ac\u00a3]?[-+]?[\d.,]*\d\w*%?"
    r"(?:,?\s+but\b|[,;.]\s+(?:it's|it is|but)\b)?"
    r"|\b(?:can't|cannot|couldn't|could not|isn't) be [$]?-?\d[\d.,]*|(?<![\d.,])[$]?\d[\d.,]*+\?\s*(?:no|nope|wrong)\b"
    r"|(?<![\w.,])[$]?-?\d[\d.,]*+(?: \w+)? (?:is|was|would be) "
    r"(?:wrong|incorrect|too (?:low|high|small|large|big|many|much|few)"
    r"|not (?:the (?:answer|right|correct|final)|right|correct|enough|it\b))",
    re.IGNORECASE,
)
"""`not 5 but` and `, not 5`: what an answer is not."""
_TIMES = re.compile(r"(?<=\d) ?x ?(?=\d)")
_MAKES = re.compile(r"\b(?:equals|is equal to|makes|gives|is)\b(?= *[$\u20ac\u00a3]?[-+]?[\d.])", re.IGNORECASE)
"""Words for an equals sign, in front of a result."""
_HEADING = re.compile(r"\d{1,2}[.)]\s+[A-Z]")
_OPENS = re.compile(
    r"\W*(?:(?:so|not|between|either|the|my|our|final|answer|result|total|is|equals|about|approximately|around|exactly|to|be|a|an)\b\W*)*"
    r"(?:(?:[a-z]{2}(?=\$)|usd|eur|gbp|inr|rs\.?)\W*)?(?:\d|[a-z] ?=)",
    re.IGNORECASE,
)
"""How the line of a final answer begins; any other one is a heading."""
_STOP = re.compile(r"(?<=[\w%)\]}$])[.!?;](?=\s|$)")
_REASON = re.compile(
    r"[,;]?\s+(?:since|because|as|given|which|whereas|while|when|after|before|considering|so that)\b", re.IGNORECASE
)
"""What only explains an answer that stands before it."""
_ASIDE = re.compile(r"\([^()]*\)")
_OR_ASIDE = re.compile(r"\(\s*(?:or|maybe|perhaps|possibly|not sure)\b", re.IGNORECASE)
_BOUND = re.compile(
    r"(?:\u00b1|\b(?:more|less|fewer|greater|larger|smaller|higher|lower) than(?: the)?|\b(?:over|under|above|below)"
    r"|[<\u2264\u2265]=?|[\w)] ?>=?)\s*$|(?:^|\s)>$",
    re.IGNORECASE,
)
_OR_MORE = re.compile(
    r" ?(?:[a-z]+ )?or (?:more|less|fewer|higher|lower|greater|above|below|over|under)\b", re.IGNORECASE
)
_ALTERNATIVES = re.compile(
    r"[\d%] ?\w* ?(?:\bor\b|\bto\b|\bversus\b|\bvs\b)[^\d\n]{0,12}$"
    r"|\d [a-z]+(?: on \w+)?,? and $"
    r"|\d ?(?:years?|months?|weeks?|days?|hours?|hrs?|minutes?|mins?|pounds?|feet|foot|ft),? $"
    r"|\bif \w+(?:'s|'re| (?:was|were|is|had been|would be|are))\b[^.,;:=\n]*$",
    re.IGNORECASE,
)
"""What stands before a number that is one of two: `5 or 6`, `2 hours and 30 minutes`."""
_BETWEEN = re.compile(r"\bbetween [^\n]{0,20}\d[^\n\d]{0,12} and [$]?$", re.IGNORECASE)
_UNSURE = re.compile(r"\bI (?:don't|do not) know\b|\bnot sure\b|\bno idea\b|\?\?", re.IGNORECASE)
_ONE = r"[-+]?[$\u20ac\u00a3]?\d[\d.,]*%?(?: [A-Za-z]+)?"
_LISTED = re.compile(rf"\W*{_ONE}(?:(?:,\s+|;\s*|\s*&\s*)(?:(?:and|or) )?{_ONE}|\s+(?:and|or)\s+{_ONE})+\W*")
"""A line that is several quantities and nothing else: `8 apples, 9 pears`."""
_HEDGED = re.compile(
    r"\b(?:(?:could|might|may)(?: \w+)? be|(?:maybe|perhaps|possibly)(?: it(?:'s| is))?) [$]?([-+]?\d[\d.,]*\d|\d)",
    re.IGNORECASE,
)
_STEP = re.compile(
    r"\b(?<!this )(?<!that )(?<!which )(?i:step|method|case|part|example|question|problem|option|phase) \d+\b"
)
_ITEM = re.compile(r"^[ \t]*(\d{1,2})[.)][ \t]+(?=\D)", re.MULTILINE)
"""The number of an item of a list."""
_SENTENCE_ASIDE = re.compile(r"(?<=[.!?]) ?\([A-Z][^()\n]*[.!?]\)")
_ALONE_FIRST = re.compile(rf"[^\w+-]*({_ONE})\s*(?:\.(?=\s+[A-Z])|\n)")
_ALONE = re.compile(rf"^[^\w+-]*({_ONE})\W*$", re.MULTILINE)
"""A line that is one quantity and nothing else."""
_OF_A_PART = re.compile(r"answer (?:to|of)\b", re.IGNORECASE)
_EXPLAINED = re.compile(
    r"\W*(?:explanation|because|reason(?:ing)?|solution|since|justification|let me explain)\b", re.IGNORECASE
)


def number_answers(text: str) -> tuple[str | None, str | None]:
    """The number that `text` gives strictly, after `####`, and leniently, as `last_number`.

    Where several are marked that differ, neither: what was marked is the answer, and it is not one number.
    """
    spelled = plain(text)
    marked = list(_marked(spelled))
    if marked:
        marked = [*_said_before(spelled, marked[0][0]), *marked, *_added(spelled, marked[-1][0])]
    strict = settled(marked, spelled, same_number)
    return strict, None if marked and strict is None else last_number(spelled)


def marked_number(text: str) -> str | None:
    """The number after `####`, on its line: strict. None where several differ."""
    return number_answers(text)[0]


def last_number(text: str) -> str | None:
    """The number that `text` states as the answer, else the last that stands anywhere in it: lenient.

    None where the answer is not one number: several statements that differ, `5 or 6`, `10 - 5` without its result.
    """
    spelled = CLOSING.sub("", plain(text))
    said = stated_answers(spelled)
    said = [one for one in said if re.search(r"\d", one[1])] or said  # `Final Answer: The final answer is 5` is one
    stated = [(place, segment_number(segment)) for place, segment in said]
    if stated and re.search(r"\d", spelled[stated[0][0] :]):
        alone = [(match.start(1), segment_number(match[1])) for match in _ALONE.finditer(spelled)]
        hedged = [(match.start(1), match[1]) for match in _HEDGED.finditer(spelled, stated[-1][0])]
        stated = sorted([*stated, *alone, *hedged, *_corrections(spelled, stated[0][0])], key=lambda one: one[0])
        return settled(stated, spelled, same_number)
    found = _unstated(spelled)
    segments = [segment for _, segment in [*said, *_marked_words(spelled)] if not re.search(r"\d", segment)]
    in_words = [value for value in map(number_in_words, segments) if value]
    return None if found and in_words and not same_number(found, in_words[-1]) else found


def _marked_words(spelled: str) -> list[tuple[int, str]]:
    return [(match.start(), match[1]) for match in re.finditer(rf"{MARKER}\s*([A-Za-z][^\n]*)", spelled)]


def stated_answers(text: str) -> list[tuple[int, str]]:
    """What stands behind each `answer is` and `Answer:`, to the end of its line, with its place."""
    keyed = [(match.start(), (match[1] or match[2] or "").strip()) for match in _KEYED.finditer(text)]
    stated = [(match.start(), match[1].strip()) for match in _STATEMENT.finditer(text)]
    turned = [(match.start(), match[1].strip()) for match in _TURNED_ROUND.finditer(text)]
    return sorted(one for one in keyed + stated + turned if one[1])


def segment_number(segment: str) -> str | None:
    """The one number of a short text that is an answer: `10 + 2 = 12` gives 12, `5 or 6` none."""
    spelled = _TIMES.sub("*", _NEGATED.sub(" ", plain(segment)))
    sentence, *more = _STOP.split(spelled, maxsplit=1)
    if more and re.fullmatch(rf"\s*{_ONE}\W*", more[0]) and re.search(r"\d", sentence):  # `12; 13`
        return None
    if not re.search(r"\d", sentence) and NO_NUMBER.match(sentence):
        return None
    spelled = sentence if re.search(r"\d", sentence) else spelled
    head = OUT_OF.sub("", _REASON.split(spelled, maxsplit=1)[0])
    if not re.search(r"=|\d ?[-+*/^]", head) and (found := _one_of(head)) is not None:
        return found
    for side in reversed(_MAKES.sub("=", spelled).split("=")):
        if re.search(r"\d", side) and not _is_sum(side):
            return _one_of(side)
    return None


def _is_sum(side: str) -> bool:
    """Whether it is to be worked out yet, outside of its asides."""
    bare = NUMBER.sub("0", _without_asides(side))
    return _ARITHMETIC.search(bare) is not None or _VARIABLE.search(bare) is not None


def _one_of(side: str) -> str | None:
    """The number of one side of an equation, if there is only one, and no aside and no bound in front denies it."""
    bare = re.sub(r"^(\W*)([-+]) +(?=[\d.$])", r"\1\2", _without_asides(side))
    numbers = list(numbers_in(bare))
    if numbers and re.search(r"(?<![-=])>\s*$", bare[: numbers[0].start]):
        return None
    values = {parse_number(number.text) for number in numbers}
    if len(values) != 1 or "\u00b1" in side or _is_bound(bare, numbers[0].start, numbers[-1].stop) or _is_sum(side):
        return None
    asides = [parse_number(aside.group()[1:-1]) for aside in _ASIDE.finditer(side)] if bare != side else []
    return numbers[0].text if all(one is None or _is_as_percent(one, *values) for one in asides) else None


def _is_bound(text: str, start: int, stop: int) -> bool:
    return _BOUND.search(text[:start]) is not None or _OR_MORE.match(text, stop) is not None


def _without_asides(side: str) -> str:
    without = _ASIDE.sub(lambda aside: aside.group() if _OR_ASIDE.match(aside.group()) else " ", side)
    return without if re.search(r"\d", without) else side


def _is_as_percent(left: Fraction, right: Fraction | None) -> bool:
    """Whether both are one value: `0.5 (50%)`."""
    return right is not None and (left == right or 100 * left == right or left == 100 * right)


def _marked(spelled: str) -> Iterator[tuple[int, str | None]]:
    """What each `####` gives, with its place; headings are passed over."""
    marks = list(re.finditer(rf"{MARKER}(?!#)", spelled))
    for match in marks:
        tail = spelled[match.end() :].lstrip()
        line = tail.partition("\n")[0].partition(MARKER)[0].strip()
        is_heading = _HEADING.match(line) is not None and match is not marks[-1]
        if _OPENS.match(line) and not is_heading:
            yield match.start(), segment_number(line)


def _said_before(spelled: str, stop: int) -> list[tuple[int, str]]:
    """The numbers that are said to be the answer, and not the answer to a part of the question, before `stop`."""
    stated = ((place, said) for place, said in stated_answers(spelled[:stop]) if not _OF_A_PART.match(spelled, place))
    found = ((place, segment_number(said)) for place, said in stated)
    return [(place, number) for place, number in found if number is not None]


def _added(spelled: str, start: int) -> list[tuple[int, str]]:
    """The numbers that are said to be the answer behind `start`, or to correct it."""
    line = re.compile(rf"{MARKER}\s*").match(spelled, start)
    start = line.end() if line else start
    stated = ((start + place, segment_number(said)) for place, said in stated_answers(spelled[start:]))
    found = [(place, number) for place, number in stated if number is not None]
    return sorted([*found, *_corrections(spelled, start)])


def _corrections(spelled: str, start: int) -> list[tuple[int, str]]:
    found = ((match.start(1), segment_number(match[1])) for match in _CORRECTED.finditer(spelled, start))
    return [(place, number) for place, number in found if number is not None]


def _unstated(spelled: str) -> str | None:
    """The last number of a text that states none as its answer, if nothing beside it makes it one of several."""
    spelled = SUM_IN_BRACKETS.sub(lambda one: " " if re.search(r"\d", spelled[: one.start()]) else one.group(), spelled)
    spelled = _STEP.sub(" ", _NEGATED.sub(" ", _SENTENCE_ASIDE.sub(" ", OUT_OF.sub("", spelled))))
    spelled = without_blanks(spelled)
    for _ in range(8):  # endings, of which each is a scan
        bare = BESIDE.sub(lambda one: one.group() if _OR_ASIDE.match(one.group().strip()) else " ", spelled)
        if bare == spelled:
            break
        spelled = bare
    spelled = _ITEM.sub(" ", spelled) if _ITEM.findall(spelled)[:2] == ["1", "2"] else spelled
    numbers = [] if REFUSED.match(spelled) else list(numbers_in(spelled))
    if not numbers or len(set(_HEDGED.findall(spelled))) > 1:
        return None
    last = numbers[-1]
    before = spelled[: last.start]
    is_operand = re.search(r"[\d)%] ?[-+*/^] ?$", before) and not re.search(r"=[^=]*$", spelled[last.stop :])
    lines = [line for line in spelled.splitlines() if re.search(r"\d", line)]
    if is_operand and any(_ALONE.match(side) for side in lines[-1].split("=")[:-1]):  # `12 = 10 + 2`
        return segment_number(lines[-1])
    if re.match(rf"\W*{_ONE}(?:{_REASON.pattern})", lines[-1]):
        return segment_number(lines[-1])
    is_term = _VARIABLE.search(NUMBER.sub("0", lines[-1].rpartition("=")[2])) is not None
    if (
        is_operand
        or is_term
        or "\u00b1" in lines[-1]
        or _ALTERNATIVES.search(before)
        or _is_bound(spelled, last.start, last.stop)
        or _BETWEEN.search(before)
        or (_UNSURE.search(before) and re.match(r"\W*\?", spelled[last.stop :]))
        or _LISTED.fullmatch(lines[-1])
    ):
        return None
    return _opening(spelled, last.text)


def _opening(spelled: str, last: str) -> str | None:
    """`last`, if the text does not open with another number alone: of these two, the first where it is explained."""
    first = _ALONE_FIRST.match(spelled)
    number = segment_number(first[1]) if first else None
    items = [line for line in _ALONE.findall(spelled) if re.search(r"[a-z]", line)]
    if first is None or number is None or same_number(number, last) or len(set(items)) > 1:  # `3 dogs`, `9 cats`
        return last
    return number if _EXPLAINED.match(spelled, first.end()) else None
