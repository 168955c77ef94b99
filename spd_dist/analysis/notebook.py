"""What a notebook shows of a subspace or a report: a table in HTML, with nothing in it that runs."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def visible(text: str) -> str:
    """`text` with what a page must not hold, or what turns the order of what it shows, as the number of the letter."""
    return _UNSEEN.sub(lambda found: f"[U+{ord(found[0]):04X}]", text)


def table_html(title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], notes: Iterable[str] = ()) -> str:
    """A table with a title and lines below it, every text escaped.

    Numbers that are not whole have three digits; `notes` stand below the table.
    """
    head = "".join(f"<th>{_text(name)}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    below = "".join(f"<p>{_text(note)}</p>" for note in notes)
    return (
        f"<div><p><strong>{_text(title)}</strong></p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{below}</div>"
    )


def _text(value: object) -> str:
    return html.escape(visible(f"{value:.3f}" if isinstance(value, float) else str(value)))
