"""Training losses out of a run's metrics."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from spd_dist.runtime.metrics import read_metrics

Losses = Mapping[str, Mapping[str, Sequence[float]]]
"""By arm that was fine-tuned, `steps` and the `losses` at them."""


def training_losses(run_folder: Path) -> Losses:
    """Those of a run; of a step that was done again after a kill, the last."""
    found: dict[str, dict[int, float]] = {}
    for row in read_metrics(run_folder / "metrics"):
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
