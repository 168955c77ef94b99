"""The program that an output holds: in fences, without them, indented, in a list, after a try that was taken back."""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Sequence

from spd_dist.data.scoring.extract import fences

PYTHON = ("", "python", "py", "python3", "python2")
"""What a fence may name the language of a program."""
IMPORTS = (
    "import collections, copy, datetime, functools, heapq, itertools, math, operator, random, re, string, sys\n"
    "from collections import *\nfrom typing import *"
)
"""What the field's harnesses put before a program."""
_FIRST_LINE_OF_CODE = re.compile(r"^(def |import |from |class |@|async def )", re.MULTILINE)


def program_in(candidates: Sequence[str], tests: Sequence[str]) -> str | None:
    """The last candidate that is Python and defines what `tests` call, else the last that is Python."""
    programs = [block for block in map(_dedented, candidates) if block.strip() and parses(block)]
    called = {name for test in tests for name in re.findall(r"\b([A-Za-z_]\w*)\s*\(", test)}
    defining = [block for block in programs if called & _defined(block)]
    return next(iter([*defining[::-1], *programs[::-1]]), None)


def with_imports(program: str) -> str:
    """The program after the usual imports, which `from __future__` must precede."""
    return program if "from __future__" in program else f"{IMPORTS}\n{program}"


def python_blocks(text: str) -> list[str]:
    """The fenced blocks of Python or of no language."""
    return [block for language, block in fences(text) if language in PYTHON]


def unfenced(text: str) -> list[str]:
    """What may be a program without a fence: all before a fence that was only closed, or the most that parses."""
    whole = _dedented(text.partition("```")[0])
    found = [whole if parses(whole) and _defined(whole) else None, python_in(whole), python_in(text)]
    return [block for block in found if block]


def _dedented(block: str) -> str:
    lines = block.replace("\t", "    ").rstrip().splitlines()
    while lines and not lines[0].strip():
        lines = lines[1:]
    return textwrap.dedent("\n".join(lines)) + "\n" if lines else ""


def _defined(program: str) -> set[str]:
    """The names that a program gives to functions, classes and values at its top."""
    with warnings.catch_warnings(action="ignore"):
        body = ast.parse(program).body
    names = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    assigned = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
    return names | {target.id for target in assigned if isinstance(target, ast.Name)}


def python_in(text: str) -> str | None:
    """A fenced block, else the most lines that parse as Python, from the first that opens a definition or import."""
    block = next((one for one in python_blocks(text) if one.strip()), None)
    if block is not None:
        return block
    start = _FIRST_LINE_OF_CODE.search(text)
    lines = text[start.start() :].splitlines() if start else []
    for stop in range(len(lines), 0, -1):
        if parses("\n".join(lines[:stop])):
            return "\n".join(lines[:stop]).rstrip()
    return None


def parses(program: str) -> bool:
    """Whether `program` is Python."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of the model's program, as an invalid escape
            ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
