"""The model card of a student: method, data, settings, losses, how to load it, and the base model's licence."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2

from spd_dist.models.gguf import find_gguf

IN_REPORT = "The comparison with the base model on held-out examples is in `report.json` of the run."
"""Stands in a card where a card that is pushed has the comparison itself (`spd_dist.hub.publish`)."""
THIS_FOLDER = "path/to/this/folder"
"""What a card loads the student by, until it has an address."""
LICENCE_FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE", "NOTICE", "USE_POLICY.md")


@dataclass(frozen=True)
class Card:
    """What a model card says."""

    base_model: str
    base_path: str
    """What `from_pretrained` loads it by: the same, or the folder that a GGUF file was converted to."""
    facts: Mapping[str, str]
    """Rows of its first table."""
    epochs: Sequence[Mapping[str, float]]


def write_card(card: Card, folder: Path, form: Literal["adapter", "model"]) -> None:
    """Write `README.md` to the student's folder, and the base model's licence files beside it."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {"yaml": _in_yaml, "python": json.dumps}
    template = environment.from_string(Path(__file__).with_name("card.md.j2").read_text(encoding="utf-8"))
    values: dict[str, Any] = {
        **vars(card),
        "facts": {_in_cell(name): _in_cell(value) for name, value in card.facts.items()},
        "base_name": _in_cell(card.base_model),
        "form": form,
        "in_report": IN_REPORT,
        "this_folder": THIS_FOLDER,
        "license": licence(card),
        "title": f"{_in_cell(card.base_model.rstrip('/').rpartition('/')[2])}, fine-tuned by spd_dist",
    }
    (folder / "README.md").write_text(template.render(values), encoding="utf-8")
    for name in LICENCE_FILES:
        source = Path(card.base_path) / name
        if source.is_file():
            (folder / name).write_bytes(source.read_bytes())


def _in_yaml(value: str) -> str:
    """`value` as one YAML scalar."""
    return value if re.fullmatch(r"[A-Za-z][\w./-]*", value, re.ASCII) else json.dumps(value)


def _in_cell(value: object) -> str:
    """`value` as text in a line of Markdown: no markup of it, and no other line."""
    flat = " ".join("".join(letter if letter.isprintable() else " " for letter in str(value)).split())
    return html.escape(re.sub(r"([\\`*\[\]|])", r"\\\1", flat), quote=False)


def licence(card: Card) -> str | None:
    """The licence that the base model declares, if its own card or GGUF file is at hand."""
    gguf = find_gguf(card.base_model)
    if gguf is not None:
        from gguf import GGUFReader  # an extra, that whoever names a GGUF file has

        field = GGUFReader(gguf).get_field("general.license")
        return None if field is None else field.contents()
    own_card = Path(card.base_path) / "README.md"
    if not own_card.is_file():
        return None
    header = own_card.read_text(encoding="utf-8", errors="replace").split("---")[1:2]
    found = re.search(r"^license:\s*(\S+)\s*$", header[0], re.MULTILINE) if header else None
    return found.group(1) if found else None
