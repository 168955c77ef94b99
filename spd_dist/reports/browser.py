"""The completions of `report.html`, arms side by side: data inside of the page, that its script shows one at a time.

The page stays one file that loads nothing. Rows stand in blocks of JSON that no browser runs, and that the script reads
when one of theirs is looked at; it alone may run, known by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from pathlib import Path

from markupsafe import Markup

from spd_dist.analysis.notebook import visible
from spd_dist.storage.answers import TOKEN_EFFECTS, effects_path, read_effects
from spd_dist.storage.completions import finished_corpus, open_corpora
from spd_dist.storage.keyed_parts import Key
from spd_dist.storage.tables import column_of
from spd_dist.types import Completion, Json, TokenEffects

MOST_COMPLETIONS = 10_000
"""On a page, of all arms together."""
MOST_CHARACTERS = 16_000_000
ROWS_A_BLOCK = 64
NATS = 1000
"""The page has thousandths of them."""


@dataclass(frozen=True)
class Written:
    """What one arm wrote."""

    name: str
    """Over its column."""
    corpus: Sequence[Completion]
    effects: Mapping[Key, TokenEffects]
    """Of those whose tokens are coloured."""


@dataclass(frozen=True)
class Browser:
    """What a page holds of completions."""

    head: Markup
    """JSON: arms and keys."""
    blocks: list[Markup]
    """JSON: the rows, `ROWS_A_BLOCK` each."""
    sentence: str
    """How many there are, of how many."""
    script: Markup
    script_hash: str
    """As a Content-Security-Policy has it."""


def written_by(
    run_folder: Path, arms: Iterable[str], of: str = "", iterations: Mapping[str, Sequence[str]] | None = None
) -> list[Written]:
    """The corpora of a run, of those arms that wrote one, and what is known of their tokens.

    With `of`, the run's name stands behind theirs; `iterations` are those of arms that learn from their student.

    Raises:
        DataError: a corpus or the effects are corrupt.
    """
    found: list[Written] = []
    for arm in arms:
        corpus = corpus_of(run_folder, (iterations or {}).get(arm, [arm]))
        if corpus is not None:
            scored = effects_path(run_folder / TOKEN_EFFECTS, arm)
            effects = read_effects(scored) if scored.exists() else []
            by_key = {(one.id, one.sample): one for one in effects}
            found.append(Written(f"{arm} of {of}" if of else arm, corpus, by_key))
    return found


def corpus_of(run_folder: Path, names: Sequence[str]) -> Sequence[Completion] | None:
    """What an arm wrote, under the names of all of its iterations; None where it wrote nothing.

    Raises:
        DataError: it is corrupt.
    """
    folders = ("generate" if name == "spd" else f"arms/{name}/generate" for name in names)
    files = [file for folder in folders if (file := finished_corpus(run_folder / folder / "completions")) is not None]
    return open_corpora(files) if files else None


def browser(columns: Sequence[Written], prompts: Mapping[str, str]) -> Browser | None:
    """The rows of a page; None if no arm wrote anything. Of more than a page may hold, a sample.

    Rows are those of the first column; `prompts` has what was asked, by the prompt's id.
    """
    if not columns:
        return None
    first, *_ = columns
    places = [_places(column.corpus) for column in columns]
    keys = list(places[0])
    coloured = [index for index, key in enumerate(keys) if key in first.effects]
    most = most_rows(columns)
    spread = range(len(keys)) if len(keys) <= most else (index * len(keys) // most for index in range(most))
    chosen = [keys[index] for index in sorted({*coloured, *spread})]
    rows = [_row(columns, places, key, prompts.get(key[0], "")) for key in chosen]
    head = {
        "arms": [column.name for column in columns],
        "rows_a_block": ROWS_A_BLOCK,
        "keys": [list(key) for key in chosen],
        "coloured": [index for index, key in enumerate(chosen) if key in first.effects],
        "has_samples": any(sample for _, sample in chosen),
    }
    script = files("spd_dist.reports").joinpath("browser.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    sentence = f"All {len(keys)} prompts and samples"
    if len(chosen) < len(keys):
        sentence = f"{len(chosen)} of {len(keys)} prompts and samples, evenly spread: a page holds no more"
    blocks = [embedded(rows[start : start + ROWS_A_BLOCK]) for start in range(0, len(rows), ROWS_A_BLOCK)]
    return Browser(embedded(head), blocks, sentence, Markup(script), f"sha256-{digest}")


def most_rows(columns: Sequence[Written]) -> int:
    """How many rows a page may hold: by their number, and by the length of the first hundreds."""
    texts = [one.text for column in columns for one in islice(column.corpus, 200)]
    mean = sum(map(len, texts)) / max(1, len(texts))
    return max(1, min(MOST_COMPLETIONS, int(MOST_CHARACTERS / max(1.0, mean))) // len(columns))


def _places(corpus: Sequence[Completion]) -> dict[Key, int]:
    keys = zip(column_of(corpus, "id"), column_of(corpus, "sample"), strict=True)
    return {key: index for index, key in enumerate(keys)}


def _row(columns: Sequence[Written], places: Sequence[Mapping[Key, int]], key: Key, question: str) -> dict[str, Json]:
    arms: list[Json] = [
        None if key not in place else _entry(column.corpus[place[key]], column.effects.get(key))
        for column, place in zip(columns, places, strict=True)
    ]
    return {"question": question, "arms": arms}


def _entry(completion: Completion, effects: TokenEffects | None) -> dict[str, Json]:
    told: dict[str, Json] = {"num_tokens": len(completion.tokens), "finish_reason": completion.finish_reason}
    if effects is None:
        return {**told, "text": completion.text}
    pairs = zip(effects.base_nll, effects.projected_nll, strict=True)
    change: list[Json] = [round(NATS * (base - projected)) for base, projected in pairs]
    base_nll: list[Json] = [round(NATS * base) for base in effects.base_nll]
    return {**told, "pieces": list(effects.pieces), "base": base_nll, "change": change}


_MARKS = {ord(letter): f"\\u{ord(letter):04x}" for letter in "<>&\u2028\u2029"}


def embedded(value: Json) -> Markup:
    """Data as JSON that may stand in a page, whatever its texts are: none of them ends the element that it is in."""
    text = json.dumps(_shown(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.translate(_MARKS))


def _shown(value: Json) -> Json:
    """The same, with letters that a page must not hold by their numbers."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, Mapping):
        return {name: _shown(item) for name, item in value.items()}
    if isinstance(value, Sequence):
        return [_shown(item) for item in value]
    return value
