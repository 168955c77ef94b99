"""Every number of a run: `metrics/rank_00000.jsonl` always, and its mirror on Weights & Biases from rank 0."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from spd_dist.errors import DataError
from spd_dist.storage.artifacts import JsonlWriter, read_jsonl

Value = float | int | str | bool


@dataclass(frozen=True)
class Product:
    """What a stage leaves behind for the stages after it and for people."""

    name: str
    """Of all versions: `subspace`, `psr-adapter`."""
    kind: str
    paths: tuple[Path, ...]
    """Files and folders."""
    metadata: Mapping[str, Any]
    """Hashes of what it was made from, and numbers worth seeing beside it."""
    is_copied: bool = True
    """Whether its files go along; else only their hashes and where they are."""


class Mirror(Protocol):
    """Where rank 0's metrics are shown, too; nothing it does may fail the run."""

    def log(self, row: Mapping[str, Value]) -> None:
        """Show one row of metrics; its first key is the step that the others are drawn over: `STAGE/[LABEL_]step`."""

    def table(self, key: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Show a table."""

    def histogram(self, key: str, values: Sequence[float]) -> None:
        """Show how values are distributed."""

    def product(self, product: Product, *, is_input: bool) -> None:
        """Show what a stage made, or that this run goes on from what an earlier one made."""

    def finish(self, exit_code: int) -> None:
        """Close the run."""


class MetricLogger:
    """Writes one line a call, flushed; keys are `STAGE/NAME_UNIT`, and each stage counts its own steps."""

    def __init__(
        self,
        folder: str | Path,
        rank: int = 0,
        mirror: Mirror | None = None,
        *,
        opening: Callable[[], Mirror | None] | None = None,
        prefix: str = "",
    ) -> None:
        """Open this rank's file to append.

        Args:
            folder: The run's `metrics/`.
            rank: Of this process.
            mirror: Given on rank 0 only.
            opening: Makes the mirror when the logger is entered: of a process, one run at a time is mirrored.
            prefix: In front of the file's name, for jobs that share a run folder, such as `task-00003_`.
        """
        self.path = Path(folder) / f"{prefix}rank_{rank:05d}.jsonl"
        self._writer = JsonlWriter(self.path)
        self._mirror, self._opening = mirror, opening
        self._label = ""

    def labelled(self, label: str) -> MetricLogger:
        """The same logger for another arm: its names carry the label (`finetune/psr_loss`), and it has its own steps.

        Close the logger itself, not this.
        """
        other = copy.copy(self)
        other._label = f"{label}_"
        return other

    def log(self, stage: str, values: Mapping[str, Value], step: int) -> None:
        """Write `values` as they were at a stage's `step`."""
        named = {f"{stage}/{self._label}{name}": value for name, value in values.items()}
        row = {name: _as_json(value) for name, value in named.items()}
        label = {"label": self._label.rstrip("_")} if self._label else {}
        self._writer.write({"time": round(time.time(), 6), "stage": stage, "step": step, **label, **row})
        if self._mirror is not None:
            self._mirror.log({f"{stage}/{self._label}step": step, **named})

    def table(self, stage: str, name: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Show rows that artifacts already hold, such as completions: on the mirror only."""
        if self._mirror is not None:
            self._mirror.table(f"{stage}/{self._label}{name}", columns, rows)

    def histogram(self, stage: str, name: str, values: Sequence[float]) -> None:
        """Show how values that artifacts already hold are distributed, such as lengths: on the mirror only."""
        if self._mirror is not None and values:
            self._mirror.histogram(f"{stage}/{self._label}{name}", values)

    def product(self, product: Product, *, is_input: bool) -> None:
        """Show what a stage made, or that this run goes on from it: on the mirror only."""
        if self._mirror is not None:
            self._mirror.product(product, is_input=is_input)

    def finish(self, exit_code: int = 0) -> None:
        """Close the file and the mirror; the mirror shows `exit_code`."""
        self._writer.close()
        if self._mirror is not None:
            self._mirror.finish(exit_code)

    def __enter__(self) -> MetricLogger:
        if self._opening is not None:
            self._mirror = self._opening()
        return self

    def __exit__(self, _: object, error: BaseException | None, trace: object) -> None:
        self.finish(0 if error is None else 1)


def read_metrics(folder: str | Path, files: str = "*.jsonl") -> list[dict[str, Any]]:
    """All ranks' rows of a run's `metrics/`, in the order of their times; or those of some files.

    Raises:
        DataError: a line is no row of metrics.
    """
    rows = [row for path in sorted(Path(folder).glob(files)) for row in _read_rows(path)]
    return sorted(rows, key=lambda row: row["time"])


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows = read_jsonl(path)
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get("time"), int | float) or type(row.get("step")) is not int:
            raise DataError(f"{path}, line {number}: no row of metrics, which has a time and a step; delete that line")
    return rows


def _as_json(value: Value) -> Value:
    """JSON has no NaN and no infinity, and a metric that became one must be seen: they are written as strings."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


Losses = Mapping[str, Mapping[str, list[float]]]
"""By arm that was fine-tuned, `steps` and the `losses` at them."""


def training_losses(run_folder: Path) -> Losses:
    """Those of a run, which all ranks have alike: rank 0's. Of a step that was done again after a kill, the last."""
    found: dict[str, dict[int, float]] = {}
    for row in read_metrics(run_folder / "metrics", "*rank_00000.jsonl"):
        for key, value in row.items():
            name = key.removeprefix("finetune/")
            is_loss = name == "loss" or (
                name.endswith("_loss") and not name.endswith(("epoch_loss", "validation_loss"))
            )
            if key != name and is_loss and isinstance(value, float):
                found.setdefault(name.removesuffix("loss").rstrip("_") or "spd", {})[row["step"]] = value
    return {
        arm: {"steps": sorted(each), "losses": [each[step] for step in sorted(each)]}
        for arm, each in sorted(found.items())
    }


def mean_losses(by_seed: Sequence[Losses]) -> Losses:
    """The means over seeds, at the steps that every seed's student did."""
    means = {}
    for arm in by_seed[0]:
        found = [losses.get(arm, {"steps": [], "losses": []}) for losses in by_seed]
        each = [dict(zip(one["steps"], one["losses"], strict=True)) for one in found]
        steps = sorted(set.intersection(*map(set, each)))
        if steps:
            means[arm] = {"steps": steps, "losses": [statistics.fmean(one[step] for one in each) for step in steps]}
    return means
