"""What is kept of an arm, a line each: its answers, and what the projection changes at tokens that it wrote."""

from __future__ import annotations

from pathlib import Path

from spd_dist.storage.keyed_parts import read_lines
from spd_dist.types import Answer, TokenEffects

TOKEN_EFFECTS = "token_effects"
"""The folder of these, in a run's."""


def answers_path(folder: Path, arm: str, task: str) -> Path:
    """Where an arm's answers end up, in the order of the test set."""
    return folder / arm / f"{task}.jsonl"


def router_path(merged: Path) -> Path:
    """Where it says how the routers of a mixture of experts spread the prompts, beside the answers."""
    return merged.with_suffix(".router.json")


def read_answers(path: Path) -> list[Answer]:
    """The answers of a file; a torn last line is none.

    Raises:
        DataError: the file is missing, or a line is not an answer.
    """
    return read_lines(path, Answer)


def effects_path(folder: Path, arm: str) -> Path:
    """Where those of an arm's completions end up, in the order of the corpus."""
    return folder / f"{arm}.jsonl"


def read_effects(path: Path) -> list[TokenEffects]:
    """The token effects of a file.

    Raises:
        DataError: the file is missing, or a line is none of them.
    """
    return read_lines(path, TokenEffects)
