"""Messages between the sides of a sandbox: plain data arrives as it was, and nothing else arrives at all."""

from __future__ import annotations

import datetime
import json
import math
import os
import socket
import struct
import subprocess
import sys
from collections import Counter, OrderedDict, deque, namedtuple
from collections.abc import Iterator
from decimal import Decimal
from enum import IntEnum
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sandboxes import usable_sandbox

from spd_dist.sandbox.inside import enter
from spd_dist.sandbox.inside.confine import call
from spd_dist.sandbox.inside.wire import MAX_MESSAGE_BYTES, Channel, Ended, decode, encode
from spd_dist.sandbox.isolation import Namespaces

NUMBERS = st.integers() | st.floats(allow_nan=False) | st.complex_numbers(allow_nan=False)
LEAVES = st.none() | st.booleans() | st.text() | st.binary() | NUMBERS
HASHABLE = st.recursive(LEAVES, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=4)
VALUES = st.recursive(
    HASHABLE | st.sets(HASHABLE, max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(HASHABLE, inner, max_size=3),
    max_leaves=8,
)

Point = namedtuple("Point", "x y")


class Level(IntEnum):
    """An integer with a name."""

    HIGH = 3


class Sly(list):
    """A list that says that it equals everything, and that it is empty."""

    def __eq__(self, other: object) -> bool:
        return True

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    __hash__ = None


def no_number(value: object) -> int:
    raise AssertionError(f"{value!r} is plain")


def there_and_back(value: Any) -> Any:
    """As the other side gets it."""
    return decode(json.loads(json.dumps(encode(value, no_number))), no_number)


def same(left: Any, right: Any) -> bool:
    """Equal, of the same types all the way down."""
    if type(left) is not type(right) or left != right:
        return False
    if isinstance(left, dict):
        return all(same(*pair) for pair in zip(left.items(), right.items(), strict=True))
    return not isinstance(left, list | tuple) or all(same(*pair) for pair in zip(left, right, strict=True))


@given(VALUES)
def test_plain_data_arrives_as_it_was(value):
    assert same(there_and_back(value), value)


@pytest.mark.parametrize(
    "value",
    [
        10**10_000, -(7**9999), math.inf, -math.inf, range(1, 9, 2), bytearray(b"1"), Fraction(1, 3), Decimal("1.10"),
        deque([1, 2]), Counter("aab"), OrderedDict([(2, 1), (1, 2)]), datetime.date(2020, 2, 29),
        datetime.timedelta(1, 2, 3), "\ud800", str, type(None),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_so_does_what_is_rare(value):
    assert same(there_and_back(value), value)


def test_nan_stays_nan():
    assert math.isnan(there_and_back([math.nan])[0])


def test_a_subclass_counts_as_what_it_derives_from():
    assert same(there_and_back([Point(1, 2), Level.HIGH, Sly([1])]), [(1, 2), 3, [1]])


def test_what_is_not_plain_is_known_by_its_number():
    thing = object()
    assert encode([thing], {thing: 7}.__getitem__) == ["list", [["object", 7]]]
    assert decode(["list", [["object", 7]]], {7: thing}.__getitem__) == [thing]


@pytest.mark.parametrize(
    "forged", [["made", "os.system", ["ls"]], ["type", "exec"], ["list"], ["eval", "1"], ["object", "x"], []]
)
def test_what_encodes_nothing_is_refused(forged):
    with pytest.raises(ValueError, match="encodes nothing"):
        decode(forged, no_number)


def test_messages_are_limited_and_end():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel = Channel(ours)
        with pytest.raises(ValueError, match=r"a message of \d+ bytes is too long: at most 8388608 are sent"):
            channel.send("x" * MAX_MESSAGE_BYTES)
        channel.send({"a": [1]})
        assert Channel(theirs).receive() == {"a": [1]}
        theirs.sendall(struct.pack("!I", MAX_MESSAGE_BYTES + 1))
        with pytest.raises(ValueError, match=r"a message of 8388609 bytes is too long: at most 8388608 are received"):
            channel.receive()
        theirs.sendall(struct.pack("!I", 4) + b'"')
        theirs.close()
        with pytest.raises(Ended, match="the other side has ended"):
            channel.receive()
        with pytest.raises(Ended, match="the other side has ended"):
            channel.send(1)


def test_a_call_to_the_kernel_that_fails_says_which():
    with pytest.raises(OSError, match="prctl: Invalid argument"):
        call("prctl", 9999, 0, 0, 0, 0)
    with pytest.raises(OSError, match=r"umount2\(b'/nowhere', 0\): No such file or directory"):
        enter.check("umount2", "/nowhere", 0)


@pytest.mark.parametrize(
    ("host", "user", "message"),
    [(1, None, "the process 1 is gone"), (os.getpid(), os.geteuid(), "no user could be mapped into the new user")],
    ids=["another host process", "own user"],
)
def test_entering_fails_aloud(host, user, message):
    usable_sandbox(isolations=[Namespaces()])
    command = [sys.executable, "-I", "-S", enter.__file__, json.dumps({"host": host, "user": user}), "true"]
    outcome = subprocess.run(command, check=False, capture_output=True, text=True)
    assert outcome.returncode == 1
    assert message in outcome.stderr
