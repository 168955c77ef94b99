"""Numbers as people write them, and the one number that a text gives as its answer.

The grammar is that of lm-evaluation-harness for GSM8K, widened by signs, currencies, fractions, exponents, percent and
every mark of thousands. A number is never cut out of a longer token, and several different answers are none.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

from spd_dist.data.scoring.thoughts import settled

MARKER = "####"
"""Stands before the final answer of a worked solution (GSM8K's convention)."""
MAX_EXPONENT = 300
MAX_DIGITS = 300

_SPELLINGS = str.maketrans({
    "\u2212": "-", "\u2013": "-", "\ufe63": "-", "\uff0d": "-", "\u2010": "-", "\u2011": "-",
    "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u2019": "'", "\u00d7": "*", "\u22c5": "*", "\u00f7": "/",
    "\u2044": "/", "\u2248": "=",
} | {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F) if code != 0xFF0D})  # full width  # fmt: skip
_FRACTION = re.compile(r"(?:(?<=(\d))|(?<!\d))([\u00bc-\u00be\u2150-\u215e])")
_RAISED = re.compile(r"[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
_MARKUP = (
    (re.compile(r"\\d?t?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}"), r" \1"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\(?:times|cdot)\b"), "*"),
    (re.compile(r"\\(?:approx|equiv)\b"), "="),
    (re.compile(r"\\([$%#])"), r"\1"),
    (re.compile(r"\\[,;:! ]"), ""),
    (re.compile(r"\\[()\[\]]"), " "),
    (re.compile(r"</?(?:b|strong|i|em|u|p|span|div|code|answer|final)>", re.IGNORECASE), " "),
    (re.compile(r"\*\*|__|`"), ""),
    (re.compile(r"(?<![\w$])\$(?=[^$\n]*\$(?!\d))([^$\n]*)\$"), r" \1 "),  # $...$ of LaTeX
    (re.compile(r"(?<!\S)[*_]+(?=[-+\w$])|(?<=\w)[*_]+(?=[\s.,;:!?]|$)"), ""),
)
_UNITS = (
    r"(?:cm|mm|km|m|kg|g|mg|lbs?|oz|ft|in|l|ml|h|hrs?|min|s|mph|kph|km/h|m/s|\u00b0[CF]?|\u20ac|\u00a3|USD|dollars?"
    r"|cents?)"
)
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_INTEGER = (
    r"\d{1,3}(?:,\d{3})+(?!\d)|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)|\d{1,3}(?: \d{3})+(?!\d)"
    r"|\d{1,3}(?:'\d{3})+(?!\d)|\d{1,3}(?:_\d{3})+(?!\d)|\d{1,3}(?:\.\d{3}){2,}(?!\d)|\d+"
)
_EXPONENT = r"(?:[eE][+-]?\d+| ?\* ?10 ?\^ ?(?:\{[+-]?\d+\}|[+-]?\d+))"
_NUMBER = re.compile(
    r"(?<![\w.^/\\])(?<!\d,)(?<!\d:)(?<!\d')(?<!-to-)"
    r"(?P<sign>(?<![\w)\].%])(?<![\d)\]%] )[-+])?(?:[$\u20ac\u00a3\u00a5\u20b9] ?(?P<inner>-)?)?"
    rf"(?P<value>\d+ \d+/\d+|(?:(?:{_INTEGER})(?:\.\d+)?|\.\d+){_EXPONENT}?(?: ?/ ?(?:\d+(?:\.\d+)?))?)"
    rf"(?: (?P<scale>{'|'.join(_SCALES)})\b)?(?P<after> ?%|{_UNITS})?(?![\w^/\u2030]|[.,:']\d|\(|-to-)",
    re.ASCII,
)
_ARITHMETIC = re.compile(r"[\d)%] ?[-+*/^] ?[$(]*[-.]?\d", re.ASCII)
_STATEMENT = re.compile(
    r"\banswer\b(?: to [^.\n:]{1,60}?| of [^.\n:]{1,60}?)?\s*(?:is|was|are|would be|will be|must be|should be|=|:)"
    r"[\s:]*"
    r"((?:(?!\banswer\b)[^\n])*)",
    re.IGNORECASE,
)
_NEGATED = re.compile(r",?\s*\b(?:and |but )?not\s+[$\u20ac\u00a3]?[-+]?[\d.,]*\d\w*%?(?:,?\s+but\b)?", re.IGNORECASE)
"""`not 5 but` and `, not 5`: what an answer is not."""
_TIMES = re.compile(r"(?<=\d) ?x ?(?=\d)")
_MAKES = re.compile(r"\b(?:equals|is equal to|makes|gives|is)\b(?= *[$\u20ac\u00a3]?[-+]?[\d.])", re.IGNORECASE)
"""Words for an equals sign, in front of a result."""
_HEADING = re.compile(r"\d{1,2}[.)]\s+[A-Z]")
_OPENS = re.compile(
    r"\W*(?:(?:so|not|between|either|the|my|our|final|answer|result|total|is|equals|about|approximately|around|exactly|to|be|a|an)\b\W*)*"
    r"(?:\d|[a-z] ?=)",
    re.IGNORECASE,
)
"""How the line of a final answer begins; any other one is a heading."""
_STOP = re.compile(r"(?<=[\w%)\]}$])[.!?;](?=\s|$)")
_ALTERNATIVES = re.compile(
    r"[\d%] ?\w* ?(?:\bor\b|\bto\b|\bversus\b|\bvs\b)[^\d\n]{0,12}$"
    r"|\d ?(?:years?|months?|weeks?|days?|hours?|hrs?|minutes?|mins?|dollars?|pounds?|feet|foot|ft)"
    r",? and $",
    re.IGNORECASE,
)
"""What stands before a number that is one of two: `5 or 6`, `2 hours and 30 minutes`."""


class Number(NamedTuple):
    """A number where it stands."""

    text: str
    start: int
    stop: int


def plain(text: str) -> str:
    """`text` with one spelling of minus signs, spaces and fractions, and without LaTeX and markdown around numbers."""
    spelled = _FRACTION.sub(lambda one: f"{' ' * bool(one[1])}{unicodedata.normalize('NFKC', one[2])}", text)
    spelled = _RAISED.sub(lambda one: f"^{unicodedata.normalize('NFKC', one[0])}", spelled).translate(_SPELLINGS)
    for pattern, instead in _MARKUP:
        spelled = pattern.sub(instead, spelled)
    return spelled


def parse_number(text: str) -> Fraction | None:
    """The exact value of a number as people write it (`5`, `5.0`, `$5`, `1,000`, `40%`, `1/2`, `1e3`), or None."""
    spelled = re.sub(r"^([-+]) +", r"\1", plain(text).strip().rstrip(".").strip())
    match = _NUMBER.fullmatch(spelled)
    return _value(match) if match else None


def same_number(left: str | None, right: str) -> bool:
    """Whether both are numbers of one value: `5` is `5.0` is `$5`."""
    value = None if left is None else parse_number(left)
    return value is not None and value == parse_number(right)


def number_answers(text: str) -> tuple[str | None, str | None]:
    """The number that `text` gives strictly, after `####`, and leniently, as `last_number`.

    Where several are marked that differ, neither: what was marked is the answer, and it is not one number.
    """
    marked = list(_marked(text))
    strict = settled(marked, text, same_number)
    return strict, None if marked and strict is None else last_number(text)


def marked_number(text: str) -> str | None:
    """The number after `####`, on its line: strict. None where several differ."""
    return number_answers(text)[0]


def last_number(text: str) -> str | None:
    """The number that `text` states as the answer, else the last that stands anywhere in it: lenient.

    None where the answer is not one number: several statements that differ, `5 or 6`, `10 - 5` without its result.
    """
    spelled = plain(text)
    said = stated_answers(spelled)
    said = [one for one in said if re.search(r"\d", one[1])] or said  # `Final Answer: The final answer is 5` is one
    stated = [(place, segment_number(segment)) for place, segment in said]
    if stated and re.search(r"\d", spelled[stated[0][0] :]):
        return settled(stated, spelled, same_number)
    spelled = _NEGATED.sub(" ", spelled)
    numbers = list(_numbers(spelled))
    if not numbers:
        return None
    last = numbers[-1]
    before = spelled[: last.start]
    is_operand = re.search(r"[\d)%] ?[-+*/^] ?$", before) and not re.search(r"=[^=]*$", spelled[last.stop :])
    return None if is_operand or _ALTERNATIVES.search(before) else last.text


def stated_answers(text: str) -> list[tuple[int, str]]:
    """What stands behind each `answer is` and `Answer:`, to the end of its line, with its place."""
    return [(match.start(), match[1].strip()) for match in _STATEMENT.finditer(text) if match[1].strip()]


def segment_number(segment: str) -> str | None:
    """The one number of a short text that is an answer: `10 + 2 = 12` gives 12, `5 or 6` none."""
    spelled = _TIMES.sub("*", _NEGATED.sub(" ", plain(segment)))
    spelled = _MAKES.sub("=", spelled)
    sentence = _STOP.split(spelled, maxsplit=1)[0]
    spelled = sentence if re.search(r"\d", sentence) else spelled
    sides = [side for side in spelled.split("=") if re.search(r"\d", side)]
    for side in reversed(sides):
        without = re.sub(r"\([^()]*\)", " ", side)
        side = without if re.search(r"\d", without) else side
        side = re.sub(r"^(\W*)([-+]) +(?=[\d.$])", r"\1\2", side)
        numbers = list(_numbers(side))
        if _ARITHMETIC.search(_NUMBER.sub("0", side)):
            continue
        values = {parse_number(number.text) for number in numbers}
        return numbers[0].text if len(values) == 1 else None
    return None


def _marked(text: str) -> Iterator[tuple[int, str | None]]:
    """What each `####` gives, with its place; headings are passed over."""
    marks = list(re.finditer(rf"{MARKER}(?!#)", text))
    for match in marks:
        tail = text[match.end() :].lstrip()
        line = plain(tail.partition("\n")[0].partition(MARKER)[0]).strip()
        is_heading = _HEADING.match(line) is not None and match is not marks[-1]
        if _OPENS.match(line) and not is_heading:
            yield match.start(), segment_number(line)


def _numbers(spelled: str) -> Iterator[Number]:
    for match in _NUMBER.finditer(spelled):
        if _value(match) is not None:
            yield Number(match.group().strip(), match.start(), match.end())


def _value(match: re.Match[str]) -> Fraction | None:
    text = match["value"]
    if sum(character.isdigit() for character in text) > MAX_DIGITS:
        return None
    if mixed := re.fullmatch(r"(\d+) (\d+)/(\d+)", text):
        whole, above, below = (int(part) for part in mixed.groups())
        value = None if below == 0 else whole + Fraction(above, below)
    else:
        above, _, below = text.partition("/")
        value, divisor = _decimal(above), _decimal(below) if below else Fraction(1)
        value = None if value is None or not divisor else value / divisor
    if value is None:
        return None
    if match["sign"] and match["inner"]:
        return None
    value *= _SCALES.get(match["scale"], 1)
    return -value if "-" in (match["sign"], match["inner"]) else value


def _decimal(text: str) -> Fraction | None:
    mantissa, exponent = text.replace(" * ", "*").strip(), 0
    if power := re.search(r"(?:[eE]([+-]?\d+)| ?\* ?10 ?\^ ?\{?([+-]?\d+)\}?)$", mantissa):
        exponent, mantissa = int((power[1] or power[2])[:6]), mantissa[: power.start()]
    if abs(exponent) > MAX_EXPONENT:
        return None
    digits = re.sub(r"[ ,'_]", "", mantissa)
    digits = digits.replace(".", "") if digits.count(".") > 1 else digits
    return Fraction(digits if digits[0] != "." else f"0{digits}") * Fraction(10) ** exponent
