"""A stage's progress, for people and for metrics: units done, tokens/s, time left of the stage and of the run."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from spd_dist.tracking.console import Bars, terminal
from spd_dist.tracking.metrics import MetricLogger

log = logging.getLogger(__name__)

MIN_UNITS = 3
STEADY_FRACTION = 0.5
"""An estimate that moved by more of itself, since half of what is done was done, is none yet."""
NEXT_FRACTION = 0.05
"""What a stage is seen again after, of what it had done: a million units leave a few hundred sights."""


class StageEstimate:
    """The seconds that a unit of a stage takes, from those that were done."""

    def __init__(self) -> None:
        self._seen: list[tuple[int, float]] = []

    def observe(self, units: int, seconds: float) -> None:
        """Note that this attempt has done `units` in `seconds`."""
        last = self._seen[-1][0] if self._seen else 0
        if units >= MIN_UNITS and units >= last + max(1.0, NEXT_FRACTION * last):
            self._seen.append((units, seconds / units))

    def seconds_a_unit(self, units: int, seconds: float) -> float | None:
        """The pace so far; None before three units, and while it moves by more than half."""
        if units < MIN_UNITS or seconds <= 0:
            return None
        now = seconds / units
        before = [pace for count, pace in self._seen if units / 2 <= count < units]
        is_steady = bool(before) and all(abs(pace - now) <= STEADY_FRACTION * now for pace in before)
        return now if is_steady else None


@dataclass(frozen=True)
class RunPart:
    """A stage that a run has to do."""

    folder: str
    """`generate`, `evaluate/spd`, ...: its place in the run folder."""
    stage: str
    """The verb: parts of one verb have one pace."""
    units: float | None
    """That a rank does; None while nobody knows how many there are."""
    like: str = ""
    """The verb whose pace stands in until this one has its own; none if not given."""
    units_of_like: float = 1.0
    """How many units of `like` take as long as one of these."""


class RunEstimate:
    """The seconds that a run still takes: those of the present stage, and of all that come after it."""

    def __init__(self) -> None:
        self.parts: list[RunPart] = []
        self.now: str = ""
        """The folder of the stage at work."""
        self._pace: dict[str, float] = {}

    def expect(self, parts: Iterable[RunPart]) -> None:
        """Learn what the run has to do."""
        self.parts = list(parts)

    def finish(self, folder: str) -> None:
        """Forget a part that is complete."""
        self.parts = [part for part in self.parts if part.folder != folder]

    def measure(self, stage: str, seconds_a_unit: float) -> None:
        """Learn the pace of a verb."""
        self._pace[stage] = seconds_a_unit

    def seconds_left(self, seconds_of_stage: float) -> float | None:
        """What is left of the run if so much is left of its present stage; None while a later pace is unknown."""
        total = seconds_of_stage
        for part in self.parts:
            if part.folder == self.now:
                continue
            pace = self._pace.get(part.stage)
            if pace is None and part.like in self._pace:
                pace = self._pace[part.like] * part.units_of_like
            if pace is None or part.units is None:
                return None
            total += pace * part.units
        return total


METRICS_SECONDS = 5.0
"""Between two rows of the metrics, if lines come no more often."""
BAR_SECONDS = 0.2
"""Between two looks of the bars."""


@dataclass(frozen=True)
class ProgressReports:
    """Where a stage's progress is said."""

    metrics: MetricLogger | None = None
    """Gets the counts, beside the log."""
    every_seconds: float = 30.0
    """Time between two lines."""
    beat: Callable[[str], None] | None = None
    """Told after each unit how far this rank is, as of `Heartbeat.beat`."""
    run: RunEstimate | None = None
    """The run's other stages, so that its whole time can be told."""


class Progress:
    """Counts a stage's units, and says now and then how far it is: `with Progress(...) as progress: ...`.

    On a terminal it draws bars, in a log file it writes lines.
    """

    def __init__(
        self,
        stage: str,
        total: int | None,
        unit: str,
        reports: ProgressReports | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the clock.

        Without a `total` it is not known how many units this rank will do; `unit` is in the plural: `examples`.
        """
        self.stage, self.total, self.unit = stage, total, unit
        self.done, self.tokens, self.skipped = 0, 0, 0
        self._reports, self._clock, self._estimate = reports or ProgressReports(), clock, StageEstimate()
        self._bars = Bars(terminal())
        self._started = self._said = self._logged = self._drawn = clock()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return self._clock() - self._started

    def advance(self, units: int = 1, tokens: int = 0) -> None:
        """Count what was just done."""
        self.done += units
        self.tokens += tokens
        self._estimate.observe(self.done - self.skipped, self.seconds)
        now = self._clock()
        if now - self._logged >= min(METRICS_SECONDS, self._reports.every_seconds):
            self._logged = now
            self._log_metrics()
        if self._bars.are_drawn:
            if now - self._drawn >= BAR_SECONDS:
                self._drawn = now
                self._draw()
        elif now - self._said >= self._reports.every_seconds and self.done != self.total:  # else "done" comes at once
            self._said = now
            log.info("%s: %s", self.stage, ", ".join([self._counted(), *self._speed(), *self._time_left()]))
        if self._reports.beat is not None:
            self._reports.beat(f"{self.stage}, {self._counted()}")

    def begin(self, total: int, skipped: int) -> None:
        """Learn, once the work is planned, how much there is and how much of it an earlier attempt did."""
        self.total = total
        self.skip(skipped)

    def skip(self, units: int) -> None:
        """Count what an earlier attempt did: it is done, and it took no time."""
        self.done += units
        self.skipped += units

    def _draw(self) -> None:
        self._bars.show(self.stage, self.done, self.total, ", ".join([self._counted(), *self._speed()]))
        stage_left, run_left = self._seconds_left()
        words = [] if stage_left is None else [f"{self.stage} {clock_time(stage_left)} left"]
        words += [] if run_left is None else [f"all {clock_time(run_left)} left"]
        self._bars.show_run(self.seconds, run_left, ", ".join(words))

    def _counted(self) -> str:
        return f"{self.done}{'' if self.total is None else f'/{self.total}'} {self.unit}"

    def _speed(self) -> list[str]:
        if self.tokens:
            return [f"{self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s"]
        return [f"{(self.done - self.skipped) / max(self.seconds, 1e-9):,.2f} {self.unit}/s"]

    def _seconds_left(self) -> tuple[float | None, float | None]:
        """Of the stage and of the run; None where it is not known."""
        pace = self._estimate.seconds_a_unit(self.done - self.skipped, self.seconds)
        if pace is None or self.total is None:
            return None, None
        left = pace * max(0, self.total - self.done)
        if self._reports.run is None:
            return left, None
        self._reports.run.measure(self.stage, pace)
        return left, self._reports.run.seconds_left(left)

    def _time_left(self) -> list[str]:
        stage, run = self._seconds_left()
        words = [] if stage is None else [f"ETA {clock_time(stage)}"]
        return words if run is None else [*words, f"of the run {clock_time(run)}"]

    def _log_metrics(self) -> None:
        if self._reports.metrics is None:
            return
        values = {"done_count": self.done, "elapsed_seconds": round(self.seconds, 3)}
        if self.tokens:
            values["tokens_per_second"] = round(self.tokens / max(self.seconds, 1e-9), 1)
        self._reports.metrics.log(self.stage, values, self.done)

    def __enter__(self) -> Progress:
        if self.skipped < (self.total or 1):
            log.info("%s: starts, %s", self.stage, self.unit if self.total is None else f"{self.total} {self.unit}")
        self._bars.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, trace: object) -> None:
        self._bars.stop()
        self._seconds_left()
        word = "done" if error is None else "stopped"
        parts = [self._counted(), *(self._speed() if self.tokens else []), f"{self.seconds:.1f} s"]
        log.info("%s: %s, %s", self.stage, word, ", ".join(parts))
        self._log_metrics()


def clock_time(seconds: float) -> str:
    """Seconds as 0:42, 12:05 or 3:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
