"""The arms of a comparison: which policy answers, and what it learned from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Arm:
    """How one arm's policy comes to be."""

    name: str
    trains: bool
    """Whether it is fine-tuned on completions of its own."""
    projects: bool
    """Whether its completions (its answers, if it does not train) come from the projected policy."""
    sentence: str

    def stage(self, verb: str) -> str:
        """The folder of one of its stages: the method's own arm at the top of the run, the others beside each other."""
        return verb if self.name == "spd" else f"arms/{self.name}/{verb}"


ARMS = {
    arm.name: arm
    for arm in (
        Arm("base", trains=False, projects=False, sentence="the untouched model"),
        Arm("psr", trains=True, projects=False, sentence="plain self-retraining: no projection"),
        Arm("ssd", trains=True, projects=False, sentence="simple self-distillation: arXiv 2604.01193's sampling"),
        Arm("spd", trains=True, projects=True, sentence="self-policy distillation"),
        Arm("projected", trains=False, projects=True, sentence="the projected model itself, not fine-tuned"),
    )
}


def chosen(names: Iterable[str]) -> list[Arm]:
    """The arms of `evaluate.arms`, in their order."""
    return [ARMS[name] for name in names]
