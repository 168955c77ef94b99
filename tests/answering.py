"""Answers made up for tests of what is said about them."""

from __future__ import annotations

import dataclasses

from spd_dist.types import Answer

PLAIN = Answer("", "#### 4", "4", "4", True, "stop", 10, "4", "4", True, True, False)


def answers(num_correct: int, num: int = 200, **changes: object) -> list[Answer]:
    """The first `num_correct` right, the others wrong, with another output."""
    return [
        dataclasses.replace(PLAIN, id=f"p{i}", correct=i < num_correct, output=f"#### {i < num_correct}", **changes)
        for i in range(num)
    ]
