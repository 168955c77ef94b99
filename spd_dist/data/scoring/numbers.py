"""Numbers as people write them.

The grammar is that of lm-evaluation-harness for GSM8K, widened by signs, currencies, fractions, exponents, percent,
every mark of thousands and the digits of other scripts. A number is never cut out of a longer token.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

MARKER = "####"
"""Stands before the final answer of a worked solution (GSM8K's convention)."""
MAX_EXPONENT = 300
MAX_DIGITS = 300

_SPELLINGS = str.maketrans({
    "\u2212": "-", "\u2013": "-", "\ufe63": "-", "\uff0d": "-", "\u2010": "-", "\u2011": "-",
    "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u2019": "'", "\u00d7": "*", "\u22c5": "*", "\u00f7": "/",
    "\u2044": "/", "\u2248": "=", "\u066b": ".", "\u066c": ",",
} | {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F) if code != 0xFF0D})  # full width  # fmt: skip
_FRACTION = re.compile(r"(?:(?<=(\d))|(?<!\d))([\u00bc-\u00be\u2150-\u215e])")
_DIGIT = re.compile(r"(?![0-9])\d")
"""A decimal digit of another script."""
_LETTER = re.compile(r"[\U0001d400-\U0001d7cd\u24b6-\u24e9]")
"""A letter of the mathematical alphabets, or in a circle."""
_RAISED = re.compile(r"[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+")
_SAID_IN_CODE = re.compile(r"####.*|# *(?:output|answer)\b.*", re.IGNORECASE)


def _what_code_says(block: re.Match[str]) -> str:
    """A program's numbers are not said, but for a comment about what comes out."""
    return "\n".join(one.group() for one in _SAID_IN_CODE.finditer(block[0]))


_MARKUP = (
    (re.compile(r"```(?:python\d?|py)\b[^\n]*\n(?=[^`]*[=(])[^`]*(?:```|\Z)"), _what_code_says),
    (re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"(?<=\d)\\[dt]?frac"), r" \\frac"),
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\s*\{([^{}]*)\}"), r" \1"),
    (re.compile(r"\{([,:])\}"), r"\1"),
    (re.compile(r"\\f?boxed\s*\{([^{}]*)\}"), r" answer: \1 "),
    (re.compile(r"<(?:final[_ ]?)?answer>", re.IGNORECASE), " answer: "),
    (re.compile(r"(?<![-=])[-=]++>(?=\s*[$]?[-\d])"), " "),
    (re.compile(r"\\pm\b\s*|\u00b1\s*"), "\u00b1"),
    (re.compile(r"\\sqrt\s*(?:\[[^\]]*\])?\s*\{?|\u221a\s*"), "\u221a"),
    (re.compile(r"\bRs\.? ?(?=\d)"), "$"),
    (
        re.compile(
            r"\bnegative\s+(?=[$]?\d)|(?:^[ \t]*|(?<=\bis )|(?<=: )|(?<=# ))minus\s+(?=[$]?\d)",
            re.IGNORECASE | re.MULTILINE,
        ),
        "-",
    ),
    (re.compile(r"\\(?:times|cdot)\b"), "*"),
    (re.compile(r"\\(?:approx|equiv)\b"), "="),
    (re.compile(r"\\([$%#])"), r"\1"),
    (re.compile(r"\\[,;:! ]"), ""),
    (re.compile(r"\\[()\[\]]"), " "),
    (
        re.compile(
            r"</?(?:[biup]|(?i:strong|em|span|div|code|(?:final[_ ]?)?answer|final|solution|result))>"
            r"|<([BIUP])>(?=.*</\1>)|</[BIUP]>"
        ),
        " ",
    ),
    (re.compile(r"<([$]?-?[\d.,]+)>"), r" \1 "),
    (re.compile(r"(?<=\d) ?\[\d{1,2}\]"), ""),  # the number of a source
    (re.compile(r"~~[^~\n]+~~|\*\*|__|`"), ""),
    (re.compile(r"(?<![\w$])\$(?=[^$\n]*\$(?!\d))([^$\n]*)\$"), r" \1 "),  # $...$ of LaTeX
    (re.compile(r"(?<!\S)[*_]+(?=[-+\w$])|(?<=\w)[*_]+(?=[\s.,;:!?]|$)"), ""),
)
_BLANKS = ((re.compile(r"[^\S\n]{3,}"), "  "), (re.compile(r"\n(?:[^\S\n]*\n){2,}"), "\n\n"))
"""Long runs of spaces and of empty lines, which every pattern would try from each of their places."""
_UNITS = (
    r"(?:cm|mm|km|mi|m|kg|g|mg|lbs?|oz|ft|in|l|ml|h|hrs?|min|s|mph|kph|km/h|m/s|\u00b0[CF]?|\u20ac|\u00a3|USD|dollars?"
    r"|cents?)"
)
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_INTEGER = (
    r"\d{1,3}(?:,\d{3})+(?!\d)|\d{1,2}(?:,\d{2})+,\d{3}(?!\d)|\d{1,3}(?: \d{3})+(?!\d)"
    r"|\d{1,3}(?:'\d{3})+(?!\d)|\d{1,3}(?:_\d{3})+(?!\d)|\d{1,3}(?:\.\d{3}){2,}(?!\d)|\d+"
)
_EXPONENT = r"(?:[eE][+-]?\d+| ?\* ?10 ?\^ ?(?:\{[+-]?\d+\}|[+-]?\d+))"
NUMBER = re.compile(
    r"(?<![\w.^/\\\u00b1\u221a])(?<![A-Za-z]\()(?<!\d,)(?<!\d:)(?<!\d')(?<!-to-)(?<![A-Za-z]-)"
    r"(?P<sign>(?<![\w)\].%])(?<![\d)\]%] )[-+])?(?:[$\u20ac\u00a3\u00a5\u20b9] ?(?P<inner>-)?)?"
    rf"(?P<value>\d+ (?:and )?\d+/\d+"
    rf"|(?:(?:{_INTEGER})(?:\.\d+)?|\.\d+){_EXPONENT}?(?: ?/ ?(?:\d+(?:\.\d+)?))?)"
    rf"(?P<scale>(?: (?:{'|'.join(_SCALES)})\b)*)(?P<after> ?%|{_UNITS})?"
    r"(?![\w^\u2030\u2080-\u2089]|/(?!(?:an? )?[a-z]{2,}\b(?!/))"
    r"|(?:\.+|[,:'])\d|\(|\+(?!\s?[\d$(.])|-to-|[\u0370-\u03ff]"
    r"| ?\u221a| ?\\(?:pi|sqrt|frac)\b)",
    re.ASCII,
)


NO_NUMBER = re.compile(r"\W*(?:none|unknown|undefined|impossible)\b", re.IGNORECASE)
"""How an answer begins that says there is none."""
_WORDS: str = (
    "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen"
    "|eighteen|nineteen"
)
_TENS: str = "twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety"
_IN_WORDS = re.compile(rf"\W*(?:(?P<tens>{_TENS})(?:[- ](?P<ones>{_WORDS}))?|(?P<small>{_WORDS}))\b", re.IGNORECASE)


class Number(NamedTuple):
    """A number where it stands."""

    text: str
    start: int
    stop: int


def plain(text: str) -> str:
    """`text` with one spelling of minus signs, spaces and fractions, and without LaTeX and markdown around numbers."""
    spelled = _FRACTION.sub(lambda one: f"{' ' * bool(one[1])}{unicodedata.normalize('NFKC', one[2])}", text)
    spelled = re.sub(r"^((?:[^\w\n]|_)*)\u2212 +(?=\d)", r"\1-", spelled, flags=re.MULTILINE)  # never a bullet
    spelled = _RAISED.sub(lambda one: f"^{unicodedata.normalize('NFKC', one[0])}", spelled).translate(_SPELLINGS)
    spelled = _DIGIT.sub(lambda one: str(unicodedata.decimal(one[0])), spelled)
    spelled = _LETTER.sub(lambda one: unicodedata.normalize("NFKC", one[0]), spelled)
    for pattern, instead in _MARKUP:
        spelled = pattern.sub(instead, spelled)
    return without_blanks(spelled)


def without_blanks(text: str) -> str:
    """`text` with at most two spaces or one empty line in a row."""
    for pattern, instead in _BLANKS:
        text = pattern.sub(instead, text)
    return text


def parse_number(text: str) -> Fraction | None:
    """The exact value of a number as people write it (`5`, `5.0`, `$5`, `1,000`, `40%`, `1/2`, `1e3`), or None."""
    spelled = re.sub(r"^([-+]) +", r"\1", plain(text).strip().rstrip(".").strip())
    match = NUMBER.fullmatch(spelled)
    return _value(match) if match else None


def same_number(left: str | None, right: str) -> bool:
    """Whether both are numbers of one value: `5` is `5.0` is `$5`."""
    value = None if left is None else parse_number(left)
    return value is not None and value == parse_number(right)


def number_in_words(text: str) -> str | None:
    """The number below a hundred that a text begins with in words, in digits; `none` where it says there is none."""
    match = _IN_WORDS.match(text)
    if match is None:
        return "none" if NO_NUMBER.match(text) else None
    small, tens = _WORDS.split("|"), _TENS.split("|")
    ones = (match["ones"] or match["small"] or "zero").casefold()
    return str(small.index(ones) + (10 * tens.index(match["tens"].casefold()) + 20 if match["tens"] else 0))


def numbers_in(spelled: str) -> Iterator[Number]:
    """The numbers of a text that `plain` gave, in their order."""
    for match in NUMBER.finditer(spelled):
        if _value(match) is not None:
            yield Number(match.group().strip(), match.start(), match.end())


def _value(match: re.Match[str]) -> Fraction | None:
    text = match["value"]
    if sum(character.isdigit() for character in text) > MAX_DIGITS:
        return None
    if mixed := re.fullmatch(r"(\d+) (?:and )?(\d+)/(\d+)", text):
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
    value *= math.prod(_SCALES[scale] for scale in match["scale"].split())
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
