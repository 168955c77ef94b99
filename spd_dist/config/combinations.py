"""Settings that are each valid and not together: a row each, for the check, `docs/compatibility.md` and a test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spd_dist.config.engines import engine_of
from spd_dist.errors import ConfigError

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
            f"{first}: {_shown(value_of(config, first))} is not valid with "
            f"{second}={_shown(value_of(config, second))}{self.why and ', '}{self.why}; set {' or '.join(self.instead)}"
        )


def check_combinations(config: Config) -> None:
    """Refuse what does not go together.

    Raises:
        ConfigError: the first row of `COMBINATIONS` that `config` has.
    """
    for row in COMBINATIONS:
        if row.breaks(config):
            raise ConfigError(row.sentence(config))


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


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _is(wanted: Mapping[str, Any]) -> Callable[[Config], bool]:
    """Whether all keys have these values; of a tuple, one of them."""
    keys = {key: value if isinstance(value, tuple) else (value,) for key, value in wanted.items()}
    return lambda config: all(value_of(config, key) in values for key, values in keys.items())


def _several_greedy(section: str) -> Callable[[Config], bool]:
    def breaks(config: Config) -> bool:
        return value_of(config, f"{section}.num_samples") > 1 and value_of(config, f"{section}.temperature") == 0

    return breaks


def _budget_elsewhere(section: str) -> Callable[[Config], bool]:
    def breaks(config: Config) -> bool:
        return (
            value_of(config, f"{section}.max_thought_tokens") is not None
            and value_of(config, f"{section}.engine") != "hf"
        )

    return breaks


def _invariant_elsewhere(section: str) -> Callable[[Config], bool]:
    def breaks(config: Config) -> bool:
        return value_of(config, f"{section}.batch_invariant") and value_of(config, f"{section}.engine") != "hf"

    return breaks


def _invariant_with_any_batch(section: str) -> Callable[[Config], bool]:
    def breaks(config: Config) -> bool:
        return value_of(config, f"{section}.batch_invariant") and value_of(config, f"{section}.batch_size") == "auto"

    return breaks


def _lacks(section: str, engine: str, key: str) -> Callable[[Config], bool]:
    return lambda config: value_of(config, f"{section}.engine") == engine and value_of(config, key) is None


def _parallel_without_vllm(key: str) -> Callable[[Config], bool]:
    def breaks(config: Config) -> bool:
        engines = {value_of(config, f"{section}.engine") for section in ("generate", "evaluate")}
        return value_of(config, key) > 1 and "vllm" not in engines

    return breaks


_HALF = ("bfloat16", "float16")
_KEYS_AFTER_ROPE = {"project.insertion": "rope", "project.kinds": ("both", "key")}


_SAME = "since all of them would be the same"
_SHARDS = "since only ZeRO-3 shards the weights that it walks through"
_FOLLOWS = "since it follows the validation loss"
_TURNS = "since the map of a key would turn with its position, and so cannot be folded into weights"
_JUDGE = "since both would choose the epoch that is kept"
_BARE = "since only a chat has it"

COMBINATIONS = (
    Combination(
        ("project.rank", "project.rank_rule"),
        _is({"project.rank": None, "project.rank_rule": "fixed"}),
        "", ("project.rank=N",), ("project.rank_rule=fixed",),
    ),
    Combination(
        ("data.system", "data.template"),
        lambda config: config.data.template == "plain" and config.data.system is not None,
        _BARE, ("data.template=chat", "data.system=null"), ("data.template=plain", "data.system=Hello"),
    ),
    Combination(
        ("data.template_options", "data.template"),
        lambda config: config.data.template == "plain" and bool(config.data.template_options),
        _BARE, ("data.template=chat",), ("data.template=plain", "data.template_options={enable_thinking: false}"),
    ),
    Combination(
        ("data.thinking", "data.template"), _is({"data.thinking": "off", "data.template": "plain"}),
        "since it is the chat template that asks for no thought", ("data.template=chat", "data.thinking=keep"),
        ("data.thinking=off", "data.template=plain"),
    ),
    Combination(
        ("finetune.loss_on", "data.thinking"),
        _is({"finetune.loss_on": ("thought", "after_thought"), "data.thinking": ("drop", "off")}),
        "which leaves no thought to tell apart", ("finetune.loss_on=completion", "data.thinking=keep"),
        ("finetune.loss_on=thought", "data.thinking=drop"),
    ),
    Combination(
        ("generate.num_samples", "generate.temperature"), _several_greedy("generate"),
        _SAME, ("generate.temperature=0.7", "generate.num_samples=1"),
        ("generate.num_samples=2", "generate.temperature=0"),
    ),
    Combination(
        ("evaluate.num_samples", "evaluate.temperature"), _several_greedy("evaluate"),
        _SAME, ("evaluate.temperature=0.8", "evaluate.num_samples=1"), ("evaluate.num_samples=2",),
    ),
    Combination(
        ("generate.vllm_python", "generate.engine"), _lacks("generate", "vllm", "generate.vllm_python"),
        "which runs in that environment", ("generate.vllm_python=PYTHON",), ("generate.engine=vllm",),
    ),
    Combination(
        ("generate.vllm_python", "evaluate.engine"), _lacks("evaluate", "vllm", "generate.vllm_python"),
        "which runs in that environment", ("generate.vllm_python=PYTHON",), ("evaluate.engine=vllm",),
    ),
    Combination(
        ("generate.command", "generate.engine"), _lacks("generate", "command", "generate.command"),
        "which runs it", ("generate.command=TEMPLATE",), ("generate.engine=command",),
    ),
    Combination(
        ("generate.command", "evaluate.engine"), _lacks("evaluate", "command", "generate.command"),
        "which runs it", ("generate.command=TEMPLATE",), ("evaluate.engine=command",),
    ),
    Combination(
        ("generate.tensor_parallel", "generate.engine"), _parallel_without_vllm("generate.tensor_parallel"),
        "which has none; vllm has", ("generate.vllm_python=PYTHON", "generate.tensor_parallel=1"),
        ("generate.tensor_parallel=2",),
    ),
    Combination(
        ("generate.pipeline_parallel", "generate.engine"), _parallel_without_vllm("generate.pipeline_parallel"),
        "which has none; vllm has", ("generate.vllm_python=PYTHON", "generate.pipeline_parallel=1"),
        ("generate.pipeline_parallel=2",),
    ),
    Combination(
        ("finetune.lora_variant", "evaluate.engine"),
        _is({"finetune.mode": "lora", "finetune.lora_variant": "dora", "evaluate.engine": "vllm"}),
        "which serves plain adapters alone", ("finetune.lora_variant=rslora", "evaluate.engine=hf"),
        ("finetune.lora_variant=dora", "generate.vllm_python=PYTHON"),
    ),
    *(
        Combination(
            (f"{section}.batch_invariant", f"{section}.engine"), _invariant_elsewhere(section),
            "whose batches are its own", (f"{section}.engine=hf", f"{section}.batch_invariant=false"),
            (f"{section}.batch_invariant=true", f"{section}.engine=hf_cb"),
        )
        for section in ("generate", "evaluate")
    ),
    *(
        Combination(
            (f"{section}.batch_invariant", f"{section}.batch_size"),
            _invariant_with_any_batch(section), "since the batch is then a part of the result",
            (f"{section}.batch_size=32", f"{section}.batch_invariant=false"),
            (f"{section}.batch_invariant=true", f"{section}.batch_size=auto"),
        )
        for section in ("generate", "evaluate")
    ),
    *(
        Combination(
            (f"{section}.max_thought_tokens", f"{section}.engine"), _budget_elsewhere(section),
            "which keeps to none", (f"{section}.engine=hf", f"{section}.max_thought_tokens=null"),
            (f"{section}.max_thought_tokens=64", f"{section}.engine=hf_cb"),
        )
        for section in ("generate", "evaluate")
    ),
    Combination(
        ("generate.placement", "generate.engine"),
        _is({"generate.placement": "layerwise", "generate.engine": "hf_cb"}),
        "which needs whole weights on each rank", ("generate.placement=replica", "generate.engine=hf"),
        ("generate.placement=layerwise", "generate.engine=hf_cb"),
    ),
    Combination(
        ("evaluate.placement", "evaluate.engine"),
        _is({"evaluate.placement": "layerwise", "evaluate.engine": "hf_cb"}),
        "which needs whole weights on each rank", ("evaluate.placement=replica", "evaluate.engine=hf"),
        ("evaluate.placement=layerwise", "evaluate.engine=hf_cb"),
    ),
    Combination(
        ("generate.placement", "distributed.zero_stage"),
        _is({"generate.placement": "layerwise", "distributed.zero_stage": (0, 1, 2)}),
        _SHARDS, ("distributed.zero_stage=3", "generate.placement=auto"),
        ("generate.placement=layerwise", "distributed.zero_stage=2"),
    ),
    Combination(
        ("evaluate.placement", "distributed.zero_stage"),
        _is({"evaluate.placement": "layerwise", "distributed.zero_stage": (0, 1, 2)}),
        _SHARDS, ("distributed.zero_stage=3", "evaluate.placement=auto"),
        ("evaluate.placement=layerwise", "distributed.zero_stage=0"),
    ),
    Combination(
        ("generate.apply_as", "project.insertion"), _is({**_KEYS_AFTER_ROPE, "generate.apply_as": "fold"}),
        _TURNS, ("generate.apply_as=hook", "project.insertion=linear", "project.kinds=value"),
        ("generate.apply_as=fold", "project.insertion=rope"),
    ),
    Combination(
        ("generate.engine", "project.insertion"), _is({**_KEYS_AFTER_ROPE, "generate.engine": ("server", "command")}),
        f"whose model is folded, {_TURNS}",
        ("generate.engine=hf", "project.insertion=linear", "project.kinds=value"),
        ("generate.engine=command", "generate.command=PROGRAM", "project.insertion=rope"),
    ),
    Combination(
        ("finetune.merge", "finetune.mode"), _is({"finetune.merge": True, "finetune.mode": "full"}),
        "which has no adapter to merge", ("finetune.mode=lora", "finetune.merge=false"),
        ("finetune.merge=true", "finetune.mode=full"),
    ),
    Combination(
        ("finetune.keep_best", "finetune.validation_fraction"),
        _is({"finetune.keep_best": True, "finetune.validation_fraction": 0.0}),
        _FOLLOWS, ("finetune.validation_fraction=0.05", "finetune.keep_best=false"), ("finetune.keep_best=true",),
    ),
    Combination(
        ("finetune.patience", "finetune.validation_fraction"),
        lambda config: config.finetune.patience is not None and config.finetune.validation_fraction == 0,
        _FOLLOWS, ("finetune.validation_fraction=0.05", "finetune.patience=null"), ("finetune.patience=2",),
    ),
    Combination(
        ("finetune.stop_on_train_loss", "finetune.keep_best"),
        _is({"finetune.stop_on_train_loss": True, "finetune.keep_best": True}),
        _JUDGE, ("finetune.keep_best=false", "finetune.stop_on_train_loss=false"),
        ("finetune.stop_on_train_loss=true", "finetune.keep_best=true", "finetune.validation_fraction=0.05"),
    ),
    Combination(
        ("finetune.stop_on_train_loss", "finetune.patience"),
        lambda config: config.finetune.stop_on_train_loss and config.finetune.patience is not None,
        "since both would say when to stop", ("finetune.patience=null", "finetune.stop_on_train_loss=false"),
        ("finetune.stop_on_train_loss=true", "finetune.patience=2", "finetune.validation_fraction=0.05"),
    ),
    Combination(
        ("rounds", "model.dtype"),
        lambda config: config.rounds > 1 and config.finetune.mode == "lora" and config.model.dtype in _HALF,
        "since a round starts from the merged student before it, and rounding would take most of its update away",
        ("model.dtype=float32", "finetune.mode=full", "rounds=1"), ("rounds=2", "model.dtype=bfloat16"),
    ),
    Combination(
        ("mechanism.in_run", "project.insertion"),
        _is({"mechanism.in_run": True, "project.insertion": ("rope", "head")}),
        "since its controls are cut of whole linear outputs", ("mechanism.in_run=false", "project.insertion=linear"),
        ("mechanism.in_run=true", "project.insertion=rope"),
    ),
)  # fmt: skip
"""In the order in which they are looked at."""
