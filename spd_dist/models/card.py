"""The model card of a student: method, data, settings, losses, how to load it, and the base model's licence."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2

LICENCE_FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE", "NOTICE", "USE_POLICY.md")


@dataclass(frozen=True)
class Card:
    """What a model card says."""

    base_model: str
    base_folder: Path | None
    """Where the base model's files are, if they are at hand: for its licence."""
    loss_on: str
    facts: Mapping[str, str]
    """Rows of its first table."""
    epochs: Sequence[Mapping[str, float]]


def write_card(card: Card, folder: Path, form: Literal["adapter", "model"]) -> None:
    """Write `README.md` to the student's folder, and the base model's licence files beside it."""
    template = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True).from_string(
        Path(__file__).with_name("card.md.j2").read_text(encoding="utf-8")
    )
    values: dict[str, Any] = {
        **vars(card),
        "form": form,
        "license": licence(card.base_folder),
        "title": f"{card.base_model.rstrip('/').rpartition('/')[2]}, distilled from itself",
    }
    (folder / "README.md").write_text(template.render(values), encoding="utf-8")
    for name in LICENCE_FILES if card.base_folder else ():
        if (card.base_folder / name).is_file():
            (folder / name).write_bytes((card.base_folder / name).read_bytes())


def licence(base_folder: Path | None) -> str | None:
    """The licence that the base model's own card declares, if that card is at hand."""
    if base_folder is None or not (base_folder / "README.md").is_file():
        return None
    header = (base_folder / "README.md").read_text(encoding="utf-8").split("---")[1:2]
    found = re.search(r"^license:\s*(\S+)\s*$", header[0], re.MULTILINE) if header else None
    return found.group(1) if found else None
