"""What every stage is told about the run that it is part of: `stage(policy, data, config, context) -> result`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from spd_dist.config import Distributed, Generate
from spd_dist.distributed.heartbeat import Heartbeat
from spd_dist.distributed.world import World
from spd_dist.inference.external.vllm_process import EnginePool
from spd_dist.tracking.metrics import MetricLogger
from spd_dist.tracking.progress import Progress, RunEstimate


def _never() -> bool:
    return False


def _go_on() -> None:
    return None


@dataclass(frozen=True)
class StageContext:
    """Where a stage runs, what may stop it, and where it reports."""

    folder: Path
    """The stage's own: everything that it writes."""
    seed: int
    """The run's."""
    world: World
    distributed: Distributed = field(default_factory=Distributed)
    should_stop: Callable[[], bool] = _never
    """A collective: whether any rank was asked to stop, the same on all of them."""
    stop_if_asked: Callable[[], None] = _go_on
    """A collective: raises `StopRequested` on every rank if any was asked to stop."""
    stop_alone: Callable[[], None] = _go_on
    """Raises `StopRequested` on this rank if it was asked to stop: where ranks work without meeting."""
    progress: Progress | None = None
    """Counts what is done, if the caller has begun to count; it counts, and raises nothing."""
    metrics: MetricLogger | None = None
    """Gets the stage's numbers, on all ranks."""
    progress_seconds: float = 30.0
    """Time between two progress lines."""
    estimate: RunEstimate | None = None
    """Of the run's other stages."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What else a model card should say: the task, the arm, the hash of the config."""
    arm: str = "spd"
    """For which the stage works."""
    generate: Generate = field(default_factory=Generate)
    """How an engine with a process of its own is set up, for the stage that answers."""
    engines: EnginePool | None = None
    """Where such an engine is kept for later stages."""
    heartbeat: Heartbeat | None = None
    """Is told of every step; one of its own in `folder` if not given."""

    def begin(self, total: int, skipped: int) -> None:
        """Say how many units there are, and how many of them an earlier attempt did."""
        if self.progress is not None:
            self.progress.begin(total, skipped)

    def advance(self, units: int, tokens: int = 0) -> None:
        """Count `units` more as done."""
        if self.progress is not None:
            self.progress.advance(units, tokens)
