"""Messages between the sides of a sandbox: JSON behind a length, and Python's plain data as JSON."""

from __future__ import annotations

import importlib
import json
import math
import socket
import struct
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any


class Outcome:
    """What became of a block of foreign code: nothing that it raises gets out, `SystemExit` neither."""

    error: BaseException | None = None
    message = ""

    def __enter__(self) -> Outcome:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.error = error
        if error is not None:
            self.message = " ".join(str(argument)[:200] for argument in error.args[:2] if isinstance(argument, str))
        return True


MAX_MESSAGE_BYTES = 8 * 2**20
_HEADER = struct.Struct("!I")
_MAX_BITS = 8192
"""Wider integers are written in base 16: Python refuses to read very long ones in base 10."""


class Ended(Exception):
    """The other side is gone."""


class Channel:
    """One end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        """Take over `connection`."""
        self._connection = connection

    def send(self, message: Any) -> None:
        """Send what JSON can hold.

        Raises:
            ValueError: it is too long.
            Ended: nobody will read it.
        """
        body = json.dumps(message).encode()
        if len(body) > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of {len(body)} bytes is too long: at most {MAX_MESSAGE_BYTES} are sent")
        try:
            self._connection.sendall(_HEADER.pack(len(body)) + body)
        except ConnectionError as error:
            raise Ended("the other side has ended") from error

    def receive(self) -> Any:
        """Wait for the next message.

        Raises:
            Ended: none will come.
            ValueError: what came is no message.
        """
        (length,) = _HEADER.unpack(self._exactly(_HEADER.size))
        if length > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of {length} bytes is too long: at most {MAX_MESSAGE_BYTES} are received")
        return json.loads(self._exactly(length))

    def _exactly(self, length: int) -> bytes:
        received = bytearray()
        while len(received) < length:
            try:
                block = self._connection.recv(min(length - len(received), 2**16))
            except ConnectionError as error:
                raise Ended("the other side has ended") from error
            if not block:
                raise Ended("the other side has ended")
            received += block
        return bytes(received)


_ARGUMENTS: Mapping[str, Callable[[Any], list[Any]]] = {
    "collections.Counter": lambda value: [dict(value)],
    "collections.OrderedDict": lambda value: [list(value.items())],
    "collections.deque": lambda value: [list(value)],
    "datetime.date": lambda value: [value.year, value.month, value.day],
    "datetime.timedelta": lambda value: [value.days, value.seconds, value.microseconds],
    "decimal.Decimal": lambda value: [str(value)],
    "fractions.Fraction": lambda value: [value.numerator, value.denominator],
}
"""Types of the standard library that count as plain: the arguments that make an equal value."""


def encode(value: Any, number_of: Callable[[Any], int]) -> Any:
    """`value` as JSON can hold it; `number_of` gives the number of an object that is not plain data.

    A subclass counts as what it derives from, so that no comparison of its own goes with it.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value) if value.bit_length() <= _MAX_BITS else ["int", hex(value)]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else ["float", str(float(value))]
    if isinstance(value, str):
        return str.__str__(value)
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    if name in _ARGUMENTS:
        return ["made", name, [encode(argument, number_of) for argument in _ARGUMENTS[name](value)]]
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            items = vars(kind)["__iter__"](value)  # and not by an `__iter__` of a subclass
            return [kind.__name__, [encode(item, number_of) for item in items]]
    if isinstance(value, dict):
        return ["dict", [[encode(key, number_of), encode(item, number_of)] for key, item in dict.items(value)]]
    return _encode_rare(value, number_of)


def _encode_rare(value: Any, number_of: Callable[[Any], int]) -> Any:
    if isinstance(value, complex):
        return ["complex", [encode(value.real, number_of), encode(value.imag, number_of)]]
    if isinstance(value, bytes | bytearray):
        return [type(value).__name__ if type(value) in (bytes, bytearray) else "bytes", bytes(value).hex()]
    if isinstance(value, range):
        return ["range", [value.start, value.stop, value.step]]
    if isinstance(value, type) and _TYPES.get(value.__name__) is value:
        return ["type", value.__name__]
    if type(value).__module__ == "numpy" and "item" in dir(value) and not value.shape:
        return encode(value.item(), number_of)
    return ["object", number_of(value)]


def decode(value: Any, object_of: Callable[[int], Any]) -> Any:
    """What `encode` was given; `object_of` gives the object of a number.

    Raises:
        ValueError: it is nothing that `encode` gives.
    """
    if not isinstance(value, list):
        return value
    match value:
        case ["object", int(number)]:
            return object_of(number)
        case ["made", str(name), list(arguments)] if name in _ARGUMENTS:
            module, _, kind = name.rpartition(".")
            made = vars(importlib.import_module(module))[kind]
            return made(*(decode(argument, object_of) for argument in arguments))
        case ["dict", list(pairs)]:
            return {decode(key, object_of): decode(item, object_of) for key, item in pairs}
        case [("list" | "tuple" | "set" | "frozenset" | "complex" | "range") as kind, list(items)]:
            decoded = [decode(item, object_of) for item in items]
            return _OF_ITEMS[kind](decoded) if kind in _OF_ITEMS else _OF_ARGUMENTS[kind](*decoded)
        case ["type", str(name)] if name in _TYPES:
            return _TYPES[name]
        case [("int" | "float" | "bytes" | "bytearray") as kind, str(text)]:
            return _OF_TEXT[kind](text)
        case _:
            raise ValueError(f"{str(value)[:80]!r} encodes nothing")


_TYPES: Mapping[str, type] = {
    kind.__name__: kind
    for kind in (bool, bytes, complex, dict, float, frozenset, int, list, object, set, str, tuple, type(None))
}
_OF_ITEMS: Mapping[str, Callable[[list[Any]], Any]] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
_OF_ARGUMENTS: Mapping[str, Callable[..., Any]] = {"complex": complex, "range": range}
_OF_TEXT: Mapping[str, Callable[[str], Any]] = {
    "int": lambda text: int(text, 16),
    "float": float,
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
}
