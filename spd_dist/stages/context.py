"""What a stage is told about the run that it is part of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from spd_dist.config import Distributed
from spd_dist.distributed.heartbeat import Heartbeat
from spd_dist.distributed.world import World
from spd_dist.tracking.metrics import MetricLogger
from spd_dist.tracking.progress import RunEstimate


def _never() -> bool:
    return False


@dataclass(frozen=True)
class StageContext:
    """Where one fine-tuning runs, and whom it tells."""

    folder: Path
    """Gets `adapter/` or `model/`, and `checkpoints/`."""
    seed: int
    world: World
    distributed: Distributed = field(default_factory=Distributed)
    should_stop: Callable[[], bool] = _never
    """Asked before every step; one rank's yes stops all of them, at the same step, after a checkpoint."""
    metrics: MetricLogger | None = None
    """Gets the numbers of every step and epoch, on all ranks."""
    progress_seconds: float = 30.0
    """Time between two progress lines."""
    estimate: RunEstimate | None = None
    """Of the run's other stages."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What else the model card should say: the task, the arm, the hash of the config."""
    heartbeat: Heartbeat | None = None
    """Told of every step; one of its own in `folder` if not given."""
