"""Training losses out of a run's metrics."""

from __future__ import annotations

from pathlib import Path

from spd_dist.runtime.metrics import read_metrics


def training_losses(run_folder: Path) -> dict[str, dict[int, float]]:
    """Loss by step of every arm that was fine-tuned; of a step that was done again after a kill, the last."""
    losses: dict[str, dict[int, float]] = {}
    for row in read_metrics(run_folder / "metrics"):
        for key, value in row.items():
            name = key.removeprefix("finetune/")
            is_loss = name == "loss" or (
                name.endswith("_loss") and not name.endswith(("epoch_loss", "validation_loss"))
            )
            if key != name and is_loss and isinstance(value, float):
                losses.setdefault(name.removesuffix("loss").rstrip("_") or "spd", {})[row["step"]] = value
    return {arm: dict(sorted(by_step.items())) for arm, by_step in sorted(losses.items())}
