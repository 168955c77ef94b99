r"""Whether two mathematical expressions in LaTeX are equal, by the conventions of Math-Verify.

Spellings are compared as text first, which is exact and cheap; what differs is given to Math-Verify, in a process of
its own, where a limit of processor time holds for whatever sympy is asked to do: Math-Verify's own limit is an alarm,
which acts in the main thread only and depends on the machine's load. Some of its equalities are no right answers: a
tuple is no set, a word is no product of its letters, and a number is not the same in another base.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import re
import resource
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from spd_dist.data.scoring.extract import all_boxed
from spd_dist.data.scoring.numbers import parse_number
from spd_dist.data.scoring.statements import last_number, segment_number, stated_answers
from spd_dist.data.scoring.thoughts import settled

CPU_SECONDS = 5.0
"""What one comparison may take of a processor; more is: not equal."""
MEMORY_BYTES = 4 * 2**30
MAX_CHARACTERS = 2000
"""Of a longer expression only the spelling is compared."""

_UNITS = (
    r"(?:square |cubic )?(?:cm|mm|km|m|kg|g|feet|foot|ft|inch(?:es)?|in|miles?|mph|hours?|minutes?|seconds?|days?"
    r"|weeks?|years?|months?|dollars?|cents?|degrees?|units?|meters?|centimeters?|kilometers?|pounds?|people|students|ways"
    r"|points?)"
)
_TEXT = r"\\(?:text|mathrm|textbf|textit|mbox|mathbf)"


def _as_fraction(it: re.Match[str]) -> str:
    r"""`0.1\overline{6}` as a fraction: what repeats, over as many nines, behind what does not."""
    return rf"\frac{{{int(it[1] + it[2] + it[3]) - int(it[1] + it[2])}}}{{{(10 ** len(it[3]) - 1) * 10 ** len(it[2])}}}"


_REWRITTEN = tuple((re.compile(pattern), instead) for pattern, instead in (
    (r"[\u2212\u2013]", "-"),
    (r"(\d{1,30})\.(\d{0,30})\\overline\s*\{(\d{1,30})\}", _as_fraction),
    (r"\\(?:left|right|big|Big|displaystyle|limits)(?![a-z])", ""),
    (r"\\!", ""),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\{,\}|\\[,;:]|(?<!\\)\\ |~|\\quad|\\qquad", lambda match: "," if match[0] == "{,}" else " "),
    (rf"\s*,?\s*(?:{_TEXT}\s*\{{\s*(?:and|or)\s*\}}|(?<=\s)(?:and|or)(?=\s))\s*", ", "),
    (_TEXT + r"\s*\{\s*(?:,\s*)?" + _UNITS + r"\s*\}(?:\s*\^\s*\{?\d\}?)?\s*\.?\s*$", ""),
    (r"(?<=[\d}])\s*" + _UNITS + r"(?:\^\{?\d\}?)?\s*\.?\s*$", ""),
    (_TEXT + r"\s*\{([^{}]*)\}", r"\1"),
    (r"\\%|%|\\\$|\$|\^\s*\\circ|\^\s*\{\s*\\circ\s*\}|\\degree", ""),
    (r"\\(?:leq|le)(?![a-z])", r"\\le "),
    (r"\\(?:geq|ge)(?![a-z])", r"\\ge "),
    (r"\\(?:neq|ne)(?![a-z])", r"\\ne "),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"\\frac\s*(\d|\\[a-z]+)\s*(?=\{)", r"\\frac{\1}"),
    (r"\\frac\s*(\d|\\[a-z]+)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"(\\frac\s*\{[^{}]*\})\s*(\d|[a-z])(?!\})", r"\1{\2}"),
    (r"\\sqrt\s*(\d|[a-z])", r"\\sqrt{\1}"),
    (r"\\frac\s*\{\s*-\s*([^{}]*)\}", r"-\\frac{\1}"),
    (r"([\^_])\s*\{\s*(\w)\s*\}", r"\1\2"),
    (r"\\(?:cdot|times)(?![a-z])", "*"),
    (r"\\varnothing", r"\\emptyset"),
    (r"\{:\}", ":"),
    (r"\\pmatrix", "pmatrix"),
    (r"[bp]matrix", "matrix"),
    (r"^\s*\(([A-Za-z])\)\s*$", r"\1"),  # a choice's letter
))  # fmt: skip
_BRACKETED = re.compile(r"[(\[{]|\\\{")
_NAMED = re.compile(r"^\s*([a-zA-Z](?:\([a-z]\))?)\s*(?:=|\\in(?![a-z]))")
"""The left side of `x = 5` and `f(x) = 5`, and of an interval that x is in."""
_WORDS = re.compile(r"[A-Za-z][a-z]*(?:[ .'-]+[A-Za-z][a-z]*)*\.?|[A-Z]{2,}")
_BASE = re.compile(r"\d_\{?(\d+)\}?\s*$")
_MATHS = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)

_POWER = re.compile(r"\}\s*(\^\s*(?:\{[^{}]*\}|\\[a-z]+|\w))")

_lock = threading.Lock()
_workers: list[ProcessPoolExecutor] = []


def same_expression(answer: str, gold: str) -> bool:
    """Whether `answer` is `gold`: spelled alike up to spacing, units, degrees and percent, or equal by Math-Verify.

    A comma parts thousands only between groups of three digits: `1,2,3` is a list and not 123.
    """
    left, right = _NAMED.match(answer), _NAMED.match(gold)
    is_other_name = left is not None and right is not None and _spelling(left[1]) != _spelling(right[1])
    if not is_other_name and _spelling(answer) == _spelling(gold):
        return True
    if _is_words(answer) or _is_words(gold):
        return _spelling(answer).casefold() == _spelling(gold).casefold()
    if is_other_name and parse_number(answer.partition("=")[2]) is not None:
        return False
    return not _differs_in_kind(answer, gold) and math_verify_equal(answer, gold)


def expression_answers(text: str) -> tuple[str | None, str | None]:
    r"""The content of the boxes, where all agree; leniently, without a box, what is said to be the answer.

    Boxes that differ are a list. One that was opened and never closed is an answer that was cut: there is none.
    What is said is the last formula of a statement (`The answer is $x+1$`), else its number; without a statement, a
    formula alone in the last line, else the last number of the text.
    """
    boxes = all_boxed(text)
    if _is_cut(text, boxes):
        return None, None
    boxes = [(place, _with_power(text, place, content)) for place, content in boxes]
    said = [(place, one) for place, one in _said_alone(text) if place > boxes[-1][0]] if boxes else []
    strict = settled([*boxes, *said], text, same_expression)
    if strict is None and len(boxes) > 1 and not said:
        strict = ", ".join(dict.fromkeys(content for _, content in boxes))  # as in `\boxed{5} and \boxed{-5}`
    return strict, strict if boxes else _unboxed(text)


def _with_power(text: str, place: int, content: str) -> str:
    r"""The content of a box with the power that stands behind the box: `\boxed{5}^2` is not 5."""
    power = _POWER.match(text, place + len(content))
    if power is None:
        return content
    return f"{content}{power[1]}" if content.isalnum() else f"({content}){power[1]}"


def math_verify_equal(answer: str, gold: str) -> bool:
    """Whether Math-Verify takes `answer` for `gold`, as they are or in one spelling; False if it takes too long."""
    if max(len(answer), len(gold)) > MAX_CHARACTERS:
        return False
    pairs = dict.fromkeys(((answer, gold), (_rewritten(answer).strip(), _rewritten(gold).strip())))
    return any(_asked(*pair) for pair in pairs)


def _asked(answer: str, gold: str) -> bool:
    with _lock:
        if not _workers:
            context = multiprocessing.get_context("spawn")
            _workers.append(ProcessPoolExecutor(1, mp_context=context, initializer=_prepare))
            atexit.register(_stop)
            _wait_for_start(_workers[0])
        try:
            return _workers[0].submit(_verified, answer, gold).result()
        except BrokenProcessPool:  # over its limit: the kernel ended it
            _stop()
            return False


def _wait_for_start(worker: ProcessPoolExecutor) -> None:
    """Hold a process that cannot start apart from one that is over its limit, which is a verdict.

    Raises:
        RuntimeError: it did not start.
    """
    try:
        worker.submit(os.getpid).result()
    except BrokenProcessPool as error:
        _stop()
        raise RuntimeError(
            "the process that compares expressions did not start; a script that judges answers of MATH has to do so "
            "under `if __name__ == '__main__':`, since new processes read it, too"
        ) from error


def _stop() -> None:
    atexit.unregister(_stop)
    while _workers:
        _workers.pop().shutdown(wait=False, cancel_futures=True)


def _prepare() -> None:
    """Make a process that only compares: no more memory than that needs, and no word of Math-Verify's limits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    logging.disable(logging.CRITICAL)


def _verified(answer: str, gold: str) -> bool:
    from math_verify import parse, verify  # seconds to import, and only here

    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        right, given = (
            parse(rf"\boxed{{{text}}}", parsing_timeout=None, raise_on_error=False)  # pyright: ignore[reportArgumentType]  # None is no limit, as its text says
            for text in (gold, answer)
        )
        return bool(right and given) and verify(
            right, given, timeout_seconds=None, raise_on_error=False, allow_set_relation_comp=True
        )
    except (ArithmeticError, AttributeError, MemoryError, NotImplementedError, RecursionError, TypeError, ValueError):
        return False  # what sympy raises on what it can't do
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _is_cut(text: str, boxes: Sequence[tuple[int, str]]) -> bool:
    """Whether the last box of the text has no end."""
    opened = [match.end() for match in re.finditer(r"\\f?boxed\s*\{", text)]
    return bool(opened) and opened[-1] not in [place for place, _ in boxes]


def _differs_in_kind(answer: str, gold: str) -> bool:
    """What Math-Verify would take for equal though no grader would."""
    pair = (answer, gold)
    bases = {match[1] for match in map(_BASE.search, map(_rewritten, pair)) if match}
    if len(bases) > 1:
        return True
    for one, other in (pair, pair[::-1]):
        if parse_number(_rewritten(one).strip()) is not None and _is_list(other):
            return True
    kinds = {_bracket(text) for text in pair}
    return "set" in kinds and len(kinds & {"tuple", "interval"}) > 0


def _is_list(text: str) -> bool:
    """Whether it is several values: `5, 6`, `(5, 6)`."""
    bare = _rewritten(_rewritten(text).replace("\\,", "")).strip()
    return re.search(r",(?!\d{3}(?!\d))", bare) is not None


def _bracket(text: str) -> str:
    bare = _rewritten(text).strip()
    bare = _NAMED.sub("", bare).strip()
    if bare.startswith(r"\{"):
        return "set"
    return {"(": "tuple", "[": "interval"}.get(bare[:1], "") if "," in bare else ""


def _is_words(text: str) -> bool:
    bare = _rewritten(text).strip()
    is_marked = re.search(_TEXT, text) is not None or " " in bare or bare.isupper() or bare[:1].isupper()
    return len(bare) > 1 and is_marked and _WORDS.fullmatch(bare) is not None


def _unboxed(text: str) -> str | None:
    stated = [(place, _formula(said) or segment_number(said) or said) for place, said in _stated(text)]
    if stated:
        return settled(stated, text, same_expression)
    last = next((line for line in reversed(text.strip().splitlines()) if line.strip()), "")
    alone = re.fullmatch(r"[\s*]*(.+?)[\s*.]*", last)
    return (
        (_formula(alone[1]) if alone and _MATHS.fullmatch(alone[1]) else None) or last_number(text) or _words_said(text)
    )


def _words_said(text: str) -> str | None:
    """A word or name that is said to be the answer: `The answer is Monday.`"""
    words = [(place, said.strip(" .*")) for place, said in stated_answers(text)]
    return settled([one for one in words if _WORDS.fullmatch(one[1])], text, str.__eq__)


def _stated(text: str) -> Iterator[tuple[int, str]]:
    for place, said in stated_answers(text):
        if _MATHS.search(said) or re.search(r"\d", said):
            yield place, said


def _said_alone(text: str) -> Iterator[tuple[int, str]]:
    """What is said to be the answer, where that is a formula or a number and nothing else."""
    for place, said in _stated(text):
        bare = said.strip(" .*")
        formula = _MATHS.fullmatch(bare)
        if formula and "boxed" not in bare:
            yield place, next(filter(None, formula.groups()))
        elif (number := parse_number(bare)) is not None:
            yield place, str(number)


def _formula(text: str) -> str | None:
    """The last formula of a short text, without its dollars."""
    found = [next(filter(None, groups)) for groups in _MATHS.findall(text)]
    return found[-1].rpartition("=")[2].strip() or None if found else None


def _rewritten(expression: str) -> str:
    rewritten = expression.strip().rstrip(".")
    for pattern, instead in _REWRITTEN:
        rewritten = pattern.sub(instead, rewritten)
    return rewritten


def _spelling(expression: str) -> str:
    spelled = _NAMED.sub("", _rewritten(expression))
    number = None if _BRACKETED.match(spelled.strip()) else _number(spelled.strip())
    if number is not None:
        return number
    spelled = re.sub(r"\s+", "", spelled)
    parts = re.split(r",(?!\d{3}(?!\d))", spelled) if not _BRACKETED.search(spelled) else [spelled]
    return ",".join(sorted(_number(part) or part for part in parts)) if len(parts) > 1 else spelled


def _number(text: str) -> str | None:
    simple = re.sub(r"(?<=\d)\s*\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}", r" \1/\2", text)
    simple = re.sub(r"\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}", r"\1/\2", simple)
    value = parse_number(simple)
    return None if value is None else str(value)
