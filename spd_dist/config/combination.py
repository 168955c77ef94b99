"""Two keys whose values cannot work together: a row of `combinations.py`, and the words that such a row is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spd_dist.config.engines import engine_of

if TYPE_CHECKING:
    from spd_dist.config.whole import Config


@dataclass(frozen=True)
class Combination:
    """Two keys whose values cannot work together."""

    keys: tuple[str, str]
    values: Mapping[str, Any]
    """What a config that has it holds, by dotted key: a value, a tuple of such values, or a function that says so."""
    why: str
    instead: tuple[str, ...]
    """Overrides, each of which alone puts it right."""
    example: tuple[str, ...]
    """Overrides of the defaults that have it."""

    def breaks(self, config: Config) -> bool:
        """Whether a config has it."""
        return all(_fits(value_of(config, key), wanted) for key, wanted in self.values.items())

    def sentence(self, config: Config) -> str:
        """Both keys with their values, the rule, and what to change."""
        first, second = self.keys
        return (
            f"{first}: {shown(value_of(config, first))} is not valid with "
            f"{second}={shown(value_of(config, second))}{self.why and ', '}{self.why}; set {' or '.join(self.instead)}"
        )


def _fits(value: Any, wanted: Any) -> bool:
    if callable(wanted):
        return bool(wanted(value))
    return value in wanted if isinstance(wanted, tuple) else value == wanted


def value_of(config: Config, key: str) -> Any:
    """The value of a dotted key; of a section's engine the one that `auto` would take."""
    generate = config.generate
    if key == "generate.engine":
        return engine_of(generate.engine, generate.vllm_python, generate.command)
    if key == "evaluate.engine":
        return engine_of(config.evaluate.engine, generate.vllm_python, None)
    value: Any = config
    for name in key.split("."):
        value = vars(value)[name]
    return value


def shown(value: Any) -> str:
    """As it would be written in an override."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return f"[{','.join(map(shown, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def is_set(value: Any) -> bool:
    """Whether a key has a value at all."""
    return value is not None


def above(bound: float) -> Callable[[Any], bool]:
    """Whether a number is larger."""
    return lambda value: value > bound


def other_than(*values: Any) -> Callable[[Any], bool]:
    """Whether a value is none of these."""
    return lambda value: value not in values


UNPROJECTED = ("psr", "ssd", "termination", "supervised")
"""The arms of `spd_dist/arms.py` with a student and without a projection."""


def without_projection(arms: Sequence[str]) -> bool:
    """Whether an arm's student would learn of a teacher's distribution, and has no projection to make one of."""
    parts = [name.partition("@") for name in arms]
    return not all("finetune.loss=" in rest for base, _, rest in parts if base in UNPROJECTED)
