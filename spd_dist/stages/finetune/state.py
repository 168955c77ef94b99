"""Where a training stands: what a checkpoint holds beside weights and optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class State:
    """Counts and losses; plain data, so that it is saved as JSON."""

    step: int = 0
    """Optimizer steps done."""
    nll: float = 0.0
    num_targets: int = 0
    """Both summed over the steps of this epoch so far."""
    epochs: list[dict[str, float]] = field(default_factory=list)
    best_loss: float | None = None
    best_step: int | None = None
    num_worse_epochs: int = 0
    stopped_early: bool = False

    def took_step(self, loss: float, num_targets: int) -> None:
        """Count a step with its mean loss."""
        self.step += 1
        self.nll += loss * num_targets
        self.num_targets += num_targets

    def ended_epoch(self, validation_loss: float | None) -> dict[str, float]:
        """Close the epoch; returns its losses."""
        losses = {"loss": self.nll / max(1, self.num_targets)}
        losses |= {} if validation_loss is None else {"validation_loss": validation_loss}
        self.nll, self.num_targets = 0.0, 0
        self.epochs.append({"epoch": len(self.epochs) + 1, **losses})
        return losses

    def judge(self, loss: float, patience: int | None) -> bool:
        """Whether `loss` is the lowest so far; after `patience` epochs without a lower one, training stops."""
        is_best = self.best_loss is None or loss < self.best_loss
        if is_best:
            self.best_loss, self.best_step, self.num_worse_epochs = loss, self.step, 0
        else:
            self.num_worse_epochs += 1
        self.stopped_early = patience is not None and self.num_worse_epochs >= patience
        return is_best
