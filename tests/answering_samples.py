"""Answers with votes, for tests of what several samples and several arms say together."""

from __future__ import annotations

from spd_dist.types import Answer


def answer(key: str, sample: int, vote: str | None, correct: bool) -> Answer:
    """One that ended, with nothing else to tell."""
    return Answer(
        id=key, output="", extracted=vote, gold="1", correct=correct, finish_reason="stop", num_tokens=1, strict=None,
        lenient=vote, strict_correct=False, lenient_correct=correct, is_repetitive=False, sample=sample, vote=vote,
        reason="right" if correct else "other value",
    )  # fmt: skip
