"""A mirror that remembers what it was shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from spd_dist.tracking.metrics import Product


class Recorder:
    """In the place of W&B."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.tables: list[tuple[str, list[str], list[list[Any]]]] = []
        self.histograms: list[tuple[str, list[float]]] = []
        self.products: list[tuple[str, bool]] = []
        self.exit_code: int | None = None

    def log(self, row: Mapping[str, Any]) -> None:
        """Note a row."""
        self.rows.append(dict(row))

    def table(self, key: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Note a table."""
        self.tables.append((key, list(columns), [list(row) for row in rows]))

    def histogram(self, key: str, values: Sequence[float]) -> None:
        """Note a histogram."""
        self.histograms.append((key, list(values)))

    def product(self, product: Product, *, is_input: bool) -> None:
        """Note a product."""
        self.products.append((product.name, is_input))

    def finish(self, exit_code: int) -> None:
        """Note the end."""
        self.exit_code = exit_code
