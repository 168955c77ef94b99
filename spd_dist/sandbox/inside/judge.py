"""The judge's side: runs the tests, in a process that the program cannot reach.

A name that a test uses is either the judge's own (a builtin, something that the setup imports or assigns) or stands for
an object of the program, in the other sandbox. Calling that object sends the arguments over and brings the result back
as plain data; comparing is done here. So a program passes only by giving the right values: it can neither end before
an assertion, nor redefine one, nor bring an object that equals everything. Arguments go over as copies: what a program
does to them, a test does not see.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from spd_dist.sandbox.inside.wire import Channel, Ended, Outcome, decode, encode

_HELD = "__assertion_held__"


class ProgramError(Exception):
    """What the program raised, where that is no builtin exception."""


class Program:
    """The program's side, as the judge sees it."""

    def __init__(self, channel: Channel) -> None:
        """Take over the channel to the candidate."""
        self._channel = channel
        self._remotes: dict[int, Remote] = {}

    def ask(self, do: str, *arguments: Any) -> Any:
        """What one of the candidate's operations gives.

        Raises:
            Exception: what it raised there, if that is a builtin exception.
            ProgramError: it raised anything else.
            Ended: it is gone.
        """
        self._channel.send({"do": do, "with": encode(arguments, _number_of)})
        reply = self._channel.receive()
        if "error" in reply:
            kind = vars(builtins).get(reply["error"])
            if isinstance(kind, type) and issubclass(kind, Exception):
                raise kind(reply["message"])
            raise ProgramError(f"{reply['error']}: {reply['message']}")
        return decode(reply["value"], self._remote)

    def _remote(self, number: int) -> Remote:
        return self._remotes.setdefault(number, Remote(self, number))


class Remote:
    """An object of the program. It is equal to itself alone, whatever the program says."""

    def __init__(self, program: Program, number: int) -> None:
        """Stand for the object of that number."""
        vars(self).update(_program=program, _number=number)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Call it, there."""
        return self._program.ask("call", self, arguments, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in _TOLD:  # numpy would read memory wherever `__array_interface__` says
            raise AttributeError(name)
        return self._program.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._program.ask("setattr", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._program.ask("getitem", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._program.ask("setitem", self, key, value)

    def __len__(self) -> int:
        return self._program.ask("len", self)

    def __iter__(self) -> Iterator[Any]:
        return self._program.ask("iter", self)

    def __next__(self) -> Any:
        return self._program.ask("next", self)

    def __bool__(self) -> bool:
        return True


_TOLD = ("__name__", "__qualname__", "__module__", "__doc__", "__dict__", "__annotations__", "__defaults__")
"""What a program's object says of itself; other names of Python's own are words between libraries."""


def _number_of(value: Any) -> int:
    if isinstance(value, Remote):
        return vars(value)["_number"]
    raise TypeError(f"a test may give the program plain data and its own objects, not {type(value).__name__}")


class TestOutcome(NamedTuple):
    """What the host is told."""

    passed: bool
    reason: str
    has_ended: bool
    """The program's process is gone."""


def verdict(channel: Channel, program: str, tests: Sequence[str], setup: str) -> TestOutcome:
    """Whether every assertion of every test was reached and held, and if not, why."""
    candidate = Program(channel)
    namespace: dict[str, Any] = {"__name__": "tests"}
    asserted = _Asserted()
    reason = "the setup or a test is not Python"
    with Outcome() as outcome:
        prepared = ast.parse(setup)
        trees = [asserted.visit(ast.parse(test)) for test in tests]
        if not asserted.count:
            raise ValueError("no assertion")
        reason = "loading the program"
        imports: list[ast.stmt] = [node for node in prepared.body if isinstance(node, ast.Import | ast.ImportFrom)]
        candidate.ask("load", program, ast.unparse(ast.Module(imports, [])))
        namespace |= {name: importlib.import_module(name) for name in _modules(trees)}
        for name in _names_of_the_program(prepared, trees):
            reason = f"looking for the program's {name}"
            if name not in namespace:
                namespace[name] = candidate.ask("get", name)
        namespace[_HELD] = asserted.held.add
        _nothing_is_close_to_none([prepared, *trees])
        reason = "the setup"
        _run(prepared, namespace)
        for index, tree in enumerate(trees):
            reason = f"test {index + 1} of {len(tests)}"
            _run(tree, namespace)
        reason = "an assertion was not reached"
    has_ended = isinstance(outcome.error, Ended)
    if outcome.error is not None and not has_ended:
        reason = f"{reason}: {type(outcome.error).__name__} {outcome.message}".rstrip()
    passed = outcome.error is None and asserted.held >= asserted.required and bool(asserted.held)
    return TestOutcome(passed, "passed" if passed else reason, has_ended)


class _Asserted(ast.NodeTransformer):
    """Lets every assertion leave a mark once it has held.

    All must, but those in a function of the tests that chooses between them, as EvalPlus's `assertion` does by the
    kind of the expected value: of these, those that are chosen.
    """

    def __init__(self) -> None:
        self.count = 0
        self.held: set[int] = set()
        self.required: set[int] = set()
        self._is_in_function = False
        self._is_chosen = False

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        before, self._is_in_function = self._is_in_function, True
        self.generic_visit(node)
        self._is_in_function = before
        return node

    def visit_If(self, node: ast.If) -> ast.AST:
        before = self._is_chosen
        self._is_chosen = before or self._is_in_function
        self.generic_visit(node)
        self._is_chosen = before
        return node

    def visit_Assert(self, node: ast.Assert) -> list[ast.stmt]:
        if not self._is_chosen:
            self.required.add(self.count)
        mark = ast.parse(f"{_HELD}({self.count})").body[0]
        self.count += 1
        return [node, ast.copy_location(mark, node)]


def _run(tree: ast.Module, namespace: dict[str, Any]) -> None:
    exec(compile(ast.fix_missing_locations(tree), "<test>", "exec", dont_inherit=True, optimize=0), namespace)


def _nothing_is_close_to_none(trees: Sequence[ast.Module]) -> None:
    """Where tests use numpy: an empty list is not close to a number, though no element of it is apart."""
    imports = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    if not any("numpy" in ast.unparse(node) for node in imports):
        return
    numpy: Any = importlib.import_module("numpy")

    def of_something(compare: Callable[..., Any]) -> Callable[..., Any]:
        def compared(a: Any, b: Any, rtol: Any = 1e-5, atol: Any = 1e-8, equal_nan: bool = False) -> Any:
            if (numpy.size(a) == 0) != (numpy.size(b) == 0):
                raise AssertionError("nothing is compared with something")
            return compare(a, b, rtol, atol, equal_nan)

        return compared

    numpy.allclose, numpy.isclose = map(of_something, (numpy.allclose, numpy.isclose))


def _names_of_the_program(setup: ast.Module, tests: Sequence[ast.Module]) -> list[str]:
    """What the setup and the tests use but do not make; builtins only where they use nothing else of the program.

    So `assert sum(10, 15) == 6` tests the program's `sum`, and the `set` of `assert set(f(1)) == {1}` is Python's.
    """
    trees = (setup, *tests)
    made = {name for tree in trees for name in _stored(tree)} | {_HELD}
    used = dict.fromkeys(node.id for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Name))
    names = [name for name in used if name not in made]
    return [name for name in names if name not in vars(builtins)] or names


def _modules(tests: Sequence[ast.Module]) -> set[str]:
    """Modules of the standard library whose attributes the tests use: never the program's."""
    attributes = (node.value for tree in tests for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return {node.id for node in attributes if isinstance(node, ast.Name)} & sys.stdlib_module_names


def _stored(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.alias):
            yield (node.asname or node.name).partition(".")[0]
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler):
            yield node.name or ""
        elif isinstance(node, ast.arg):
            yield node.arg
