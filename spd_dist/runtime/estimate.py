"""How long a stage and the whole run still take, as soon as that can be known, and not before."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

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
class Part:
    """A stage that a run has to do."""

    folder: str
    """`generate`, `evaluate/spd`, ...: its place in the run folder."""
    stage: str
    """The verb: parts of one verb have one pace."""
    units: float
    """That a rank does."""
    like: str = ""
    """The verb whose pace stands in until this one has its own; none if not given."""
    units_of_like: float = 1.0
    """How many units of `like` take as long as one of these."""


class RunEstimate:
    """The seconds that a run still takes: those of the present stage, and of all that come after it."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.now: str = ""
        """The folder of the stage at work."""
        self._pace: dict[str, float] = {}

    def expect(self, parts: Iterable[Part]) -> None:
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
            if pace is None:
                return None
            total += pace * part.units
        return total
