"""Two keys whose values cannot work together, and the predicates that such a row is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spd_dist.config.engines import engine_of

if TYPE_CHECKING:
    from spd_dist.config.whole import Config


@dataclass(frozen=True)
class Combination:
    """Two keys whose values cannot work together."""

    keys: tuple[str, str]
    breaks: Callable[[Config], bool]
    """Whether a config has it."""
    why: str
    instead: tuple[str, ...]
    """Overrides, each of which alone puts it right."""
    example: tuple[str, ...]
    """Overrides of the defaults that have it."""

    def sentence(self, config: Config) -> str:
        """Both keys with their values, the rule, and what to change."""
        first, second = self.keys
        return (
            f"{first}: {shown(value_of(config, first))} is not valid with "
            f"{second}={shown(value_of(config, second))}{self.why and ', '}{self.why}; set {' or '.join(self.instead)}"
        )


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


def holds(wanted: Mapping[str, Any]) -> Callable[[Config], bool]:
    """Whether all keys have these values; of a tuple, one of them."""
    keys = {key: value if isinstance(value, tuple) else (value,) for key, value in wanted.items()}
    return lambda config: all(value_of(config, key) in values for key, values in keys.items())


def several_greedy(section: str) -> Callable[[Config], bool]:
    """Whether a section draws several samples without a temperature."""

    def breaks(config: Config) -> bool:
        return value_of(config, f"{section}.num_samples") > 1 and value_of(config, f"{section}.temperature") == 0

    return breaks


def budget_elsewhere(section: str) -> Callable[[Config], bool]:
    """Whether a section bounds thoughts on an engine that cannot."""

    def breaks(config: Config) -> bool:
        return (
            value_of(config, f"{section}.max_thought_tokens") is not None
            and value_of(config, f"{section}.engine") != "hf"
        )

    return breaks


def invariant_elsewhere(section: str) -> Callable[[Config], bool]:
    """Whether a section wants batch invariance of an engine that has none."""

    def breaks(config: Config) -> bool:
        return value_of(config, f"{section}.batch_invariant") and value_of(config, f"{section}.engine") != "hf"

    return breaks


def invariant_with_any_batch(section: str) -> Callable[[Config], bool]:
    """Whether a section wants batch invariance with a batch that nobody named."""

    def breaks(config: Config) -> bool:
        return value_of(config, f"{section}.batch_invariant") and value_of(config, f"{section}.batch_size") == "auto"

    return breaks


UNPROJECTED = ("psr", "ssd", "termination", "supervised")
"""The arms of `spd_dist/arms.py` with a student and without a projection."""


def distils_without_projection(config: Config) -> bool:
    """Whether a student that is to learn a teacher's distribution has no projection to make one of."""
    arms = [name.partition("@") for name in config.evaluate.arms]
    unprojected = [rest for base, _, rest in arms if base in UNPROJECTED]
    return config.finetune.loss == "distil" and not all("finetune.loss=" in rest for rest in unprojected)


def lacks(section: str, engine: str, key: str) -> Callable[[Config], bool]:
    """Whether a section has an engine whose key is not set."""
    return lambda config: value_of(config, f"{section}.engine") == engine and value_of(config, key) is None


def parallel_without_vllm(key: str) -> Callable[[Config], bool]:
    """Whether devices are to share a model, on engines that know no such thing."""

    def breaks(config: Config) -> bool:
        engines = {value_of(config, f"{section}.engine") for section in ("generate", "evaluate")}
        return value_of(config, key) > 1 and "vllm" not in engines

    return breaks


def adapts_experts(breaks: Callable[[Config], bool]) -> Callable[[Config], bool]:
    """Whether it breaks, and experts get an adapter, too."""
    return lambda config: config.finetune.mode == "lora" and bool(config.finetune.lora_parameters) and breaks(config)


def quantised(breaks: Callable[[Config], bool]) -> Callable[[Config], bool]:
    """Whether it breaks, and the base weights have few bits."""
    return lambda config: config.model.quantization != "none" and breaks(config)


def loads_itself(section: str) -> Callable[[Config], bool]:
    """Whether a section has an engine that loads the weights by itself."""
    return lambda config: value_of(config, f"{section}.engine") not in ("hf", "hf_cb")
