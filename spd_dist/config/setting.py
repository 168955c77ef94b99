"""A field of a section: its default, its bounds and its sentence, in one place."""

from __future__ import annotations

from dataclasses import field
from typing import Any

Bound = float | None


def setting(default: Any, sentence: str, *, at_least: Bound = None, at_most: Bound = None, above: Bound = None) -> Any:
    """A field with its meaning and its bounds; `spd_dist.overrides` enforces them."""
    bounds = {"at_least": at_least, "at_most": at_most, "above": above}
    metadata = {"sentence": sentence} | {rule: bound for rule, bound in bounds.items() if bound is not None}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)
