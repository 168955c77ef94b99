"""Answers made up for tests of what is said about them."""

from __future__ import annotations

import dataclasses

from spd_dist.types import Answer

PLAIN = Answer("", "#### 4", "4", "4", True, "stop", 10, "4", "4", True, True, False)


def answers(num_correct: int, num: int = 200, first: int = 0, **changes: object) -> list[Answer]:
    """`num_correct` right from `first` on, the others wrong, with another output."""
    right = range(first, first + num_correct)
    return [
        dataclasses.replace(PLAIN, id=f"p{i}", correct=i in right, output=f"#### {i in right}", **changes)
        for i in range(num)
    ]
