"""The program that an output holds: in fences, without them, indented, in a list, after a try that was taken back."""

from __future__ import annotations

import ast
import contextlib
import itertools
import re
import textwrap
import warnings
from collections.abc import Sequence, Set

from spd_dist.data.scoring.extract import fences
from spd_dist.data.scoring.numbers import parse_number

PYTHON = ("", "python", "py", "python3", "python2")
"""What a fence may name the language of a program."""
IMPORTS = (
    "import collections, copy, datetime, functools, heapq, itertools, math, operator, random, re, string, sys\n"
    "from collections import *\nfrom typing import *"
)
"""What the field's harnesses put before a program."""
MAX_PARSES = 256
"""After so many tries a program's end is no longer looked for line by line."""
MAX_LINES = 500
"""Of a longer text no program is looked for behind an error that stands above all of it."""
_MARK_LINE = re.compile(
    r"^[ \t]*(?:\[/?(?:BEGIN|DONE|END|PYTHON|CODE|ANSWER)\]|</?(?:code|python|answer)>)[ \t]*$",
    re.MULTILINE | re.IGNORECASE,
)
"""Lines that some prompts and models put around a program in place of a fence."""
_FIRST_LINE_OF_CODE = re.compile(r"^(def |import |from |class |@|async def )", re.MULTILINE)
_FIRST_INDENTED_LINE_OF_CODE = re.compile(r"^([ \t]+)(?:def |import |from |class |@|async def )", re.MULTILINE)
_HTML = re.compile(
    r"^[ \t]*(?:<(?:pre|code)(?: [^<>\n]*)?>)+|(?:</(?:code|pre)>)+[ \t]*$", re.MULTILINE | re.IGNORECASE
)
_DONE = re.compile(r"^[ \t]*\[DONE\]", re.MULTILINE)


def called_by(tests: Sequence[str]) -> set[str]:
    """The names that tests call."""
    return {name for test in tests for name in re.findall(r"\b([A-Za-z_]\w*)\s*\(", test)}


def program_in(candidates: Sequence[str], called: Set[str]) -> str | None:
    """The last candidate that is Python and defines any of what is `called`, else the last that is Python.

    What it uses and only an earlier one defines comes with it.
    """
    programs = [block for block in map(_dedented, candidates) if block.strip() and parses(block)]
    defining = [block for block in programs if called & _defined(block)]
    if not defining:
        return programs[-1] if programs else None
    taken = defining[-1]
    missing = _used(taken) - _defined(taken)
    before = [block for block in programs[: programs.index(taken)] if missing & _defined(block)]
    try:
        return "\n".join([*map(_definitions, before), taken])
    except RecursionError:  # an earlier block is too deep to be written anew
        return taken


def with_imports(program: str) -> str:
    """The program after the usual imports, which `from __future__` must precede."""
    return program if "from __future__" in program else f"{IMPORTS}\n{program}"


def until_done(text: str) -> str:
    """What stands before the mark with which MBPP's prompts end a program, if one does."""
    done = _DONE.search(text)
    return text[: done.start()] if done and re.search(r"\bdef\b|\blambda\b", text[: done.start()]) else text


def python_blocks(text: str) -> list[str]:
    """The fenced blocks of Python or of no language."""
    return [block for language, block in fences(text) if language in PYTHON]


def unfenced(text: str) -> list[str]:
    """What may be a program without a fence: all before a fence that was only closed, or the most that parses."""
    text = _HTML.sub("", _MARK_LINE.sub("", text))
    whole = _dedented(text.partition("```")[0])
    found = [whole if parses(whole) and _defined(whole) else None, python_in(whole), python_in(text)]
    return [block for block in found if block]


def until_needed(program: str, called: Set[str]) -> str:
    """The program up to the last statement that its functions `called` reach.

    What it does behind that, as its own tests and examples, is left out, as EvalPlus does; of a program that defines
    none of them nothing is.
    """
    with warnings.catch_warnings(action="ignore"):
        body = ast.parse(program).body
    wanted, reached = set(called), set[str]()
    while wanted:
        reached |= wanted
        defining = [node for node in body if _names_of(node) & wanted]
        wanted = {name for node in defining for name in _names_in(node)} - reached
    if not any(_names_of(node) & set(called) for node in body):
        return program
    last = max(node.end_lineno or 0 for node in body if _names_of(node) & reached)
    return "\n".join(program.splitlines()[:last])


def helpers(prompt: str, of: str, tests: Sequence[str]) -> str:
    """What `tests` use of a prompt's own definitions, but for the function `of` that is asked for; empty if nothing.

    A test that decodes what the prompt's function has encoded must not take an answer's word for that function.
    """
    if not parses(whole := f"{prompt.rstrip()}\n    pass") or not all(map(parses, tests)):
        return ""
    with warnings.catch_warnings(action="ignore"):
        body = [node for node in ast.parse(whole).body if of not in _names_of(node)]
    needed = set[str]().union(*map(_used, tests)) & {name for node in body for name in _names_of(node)}
    return "\n".join(map(ast.unparse, body)) if needed else ""


def _names_of(node: ast.stmt) -> set[str]:
    """The names that a statement defines, also where it stands under a condition."""
    if isinstance(node, ast.If | ast.Try | ast.With):
        return {name for one in ast.iter_child_nodes(node) if isinstance(one, ast.stmt) for name in _names_of(one)}
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else []
    targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
    return {one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)}


def _names_in(node: ast.AST) -> set[str]:
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}


def _unquoted(lines: list[str]) -> list[str]:
    """The lines of a quotation (`> def f():`) without its marks."""
    is_quoted = all((line.startswith(">") and not line.startswith(">>>")) or not line.strip() for line in lines)
    return [line.removeprefix(">").removeprefix(" ") for line in lines] if is_quoted else lines


def _dedented(block: str) -> str:
    lines = _unquoted(block.rstrip().splitlines())
    while lines and not lines[0].strip():
        lines = lines[1:]
    return textwrap.dedent("\n".join(lines)) + "\n" if lines else ""


def _defined(program: str) -> set[str]:
    """The names that a program gives to functions, classes and values at its top."""
    with warnings.catch_warnings(action="ignore"):
        body = ast.parse(program).body
    return {name for node in body for name in _names_of(node)}


def _used(program: str) -> set[str]:
    with warnings.catch_warnings(action="ignore"):
        return _names_in(ast.parse(program))


def _definitions(program: str) -> str:
    """The imports, functions, classes and values of a program, without what it does besides."""
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign)
    with warnings.catch_warnings(action="ignore"):
        tree = ast.parse(program)
    return "\n".join(ast.unparse(node) for node in tree.body if isinstance(node, kinds))


def python_in(text: str) -> str | None:
    """A fenced block, else the most lines that parse as Python, from the first that opens a definition or import."""
    block = next((one for one in python_blocks(text) if one.strip()), None)
    if block is not None:
        return block if parses(block) else longest_program(block.splitlines())
    if start := _FIRST_LINE_OF_CODE.search(text):
        return longest_program(text[start.start() :].splitlines())
    if start := _FIRST_INDENTED_LINE_OF_CODE.search(text):
        lines = text[start.start() :].splitlines()
        inside = itertools.takewhile(lambda line: line.startswith(start[1]) or not line.strip(), lines)
        return longest_program(textwrap.dedent("\n".join(inside)).splitlines())
    return None


def longest_program(lines: Sequence[str], after: str = "") -> str | None:
    """The most of `lines`, from the first on, that parse as Python behind `after`; None if not one does.

    A line that is a syntax error ends it, so that nothing is parsed twice for every line. Where each end is an error of
    its own (a `try` without its `except`), lines are given up one by one, and from `MAX_PARSES` on ever more at once.
    """
    num_before = len(after.splitlines())
    head = [after] if after else []
    stop, step, num_parses = len(lines), 1, 0
    while stop > 0:
        num_parses += 1
        step = step if num_parses <= MAX_PARSES else 2 * step
        error = _syntax_error("\n".join([*head, *lines[:stop]]))
        if error is None:
            return "\n".join(lines[:stop]).rstrip()
        end = min(stop, max(error - num_before, 0)) if error > num_before else stop
        stop = max(end - step, 1) if end > 1 else 0
        if error <= num_before and len(lines) > MAX_LINES:
            return None
    return None


def parses(program: str) -> bool:
    """Whether `program` is Python."""
    return _syntax_error(program) is None


def _syntax_error(program: str) -> int | None:
    """The line, from 1 on, at which `program` is no Python; None where it is."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of the model's program, as an invalid escape
            ast.parse(program)
    except SyntaxError as error:
        return error.lineno or 1
    except (ValueError, RecursionError, MemoryError):
        return 1
    return None


def canonical(answer: str) -> str:
    """A number's value, a program without comments, docstrings and layout (by its syntax tree), else plain text."""
    number = parse_number(answer)
    if number is not None:
        return str(number)
    if re.search(r"^\s*(?:def|class|import|from) ", answer, re.MULTILINE) and parses(answer):
        with contextlib.suppress(RecursionError):  # a sum of a thousand terms
            return _tree(answer)
    return re.sub(r"\s+", " ", answer).strip().casefold()


def _tree(program: str) -> str:
    with warnings.catch_warnings(action="ignore"):  # of the model's program
        tree = ast.parse(program)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            is_text = isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)
            node.body = node.body[1:] if is_text and len(node.body) > 1 else node.body
    return ast.unparse(tree)
