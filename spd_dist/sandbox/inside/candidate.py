"""The candidate's side: loads the program, then does what the judge asks of the program's objects."""

from __future__ import annotations

import ast
import contextlib
import operator
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

from spd_dist.sandbox.inside.wire import Channel, Outcome, decode, encode

PROGRAM = "program"
"""The program's `__name__`: what stands behind `if __name__ == "__main__"` is not run."""


def serve(channel: Channel) -> None:
    """Answer the judge until it ends.

    The program may do whatever it likes to this process. All that leaves it is data, and the judge compares data.
    """
    module = types.ModuleType(PROGRAM)
    sys.modules[PROGRAM] = module  # dataclasses and pickle look for the module of a class
    held: list[Any] = []
    numbers: dict[int, int] = {}

    def number_of(value: Any) -> int:
        if id(value) not in numbers:
            numbers[id(value)] = len(held)
            held.append(value)  # it lives on, so that its id stays its own
        return numbers[id(value)]

    operations = {"load": _loader(module.__dict__), "get": module.__dict__.__getitem__, **_OPERATIONS}
    channel.send({"is_ready": True})
    while True:
        request, reply = channel.receive(), {}
        with Outcome() as outcome:
            done = operations[request["do"]](*decode(request["with"], held.__getitem__))
            reply = {"value": encode(done, number_of)}
        if outcome.error is not None:
            reply = {"error": type(outcome.error).__name__, "message": outcome.message}
        with Outcome() as outcome:
            channel.send(reply)
        if outcome.error is not None:
            channel.send({"error": type(outcome.error).__name__, "message": outcome.message})


def _loader(namespace: dict[str, Any]) -> Callable[[str, str], None]:
    def load(program: str, imports: str) -> None:
        try:
            exec(compile(program, f"<{PROGRAM}>", "exec", dont_inherit=True), namespace)
        except EOFError:  # it asks for input, as a script would, and there is none
            _load_without_input(program, namespace)
        exec(compile(imports, "<setup>", "exec", dont_inherit=True), namespace)

    return load


def _load_without_input(program: str, namespace: dict[str, Any]) -> None:
    """Run the statements of the program one by one, and pass over those that ask for input or need what was asked."""
    body = ast.parse(program).body
    futures = [node for node in body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    for node in body:
        module = ast.Module([*futures, node], type_ignores=[])
        with contextlib.suppress(EOFError, NameError):
            exec(compile(module, f"<{PROGRAM}>", "exec", dont_inherit=True), namespace)


_OPERATIONS: Mapping[str, Callable[..., Any]] = {
    "call": lambda function, arguments, named: function(*arguments, **named),
    "getattr": getattr,
    "setattr": setattr,
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "len": len,
    "iter": iter,
    "next": next,
}
