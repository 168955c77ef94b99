"""Settings that are each valid and not together: a row each, for the check, `docs/compatibility.md` and a test."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spd_dist.config.adapter_combinations import OF_ADAPTERS
from spd_dist.config.combination import (
    UNPROJECTED,
    Combination,
    budget_elsewhere,
    distils_without_projection,
    holds,
    invariant_elsewhere,
    invariant_with_any_batch,
    lacks,
    loads_itself,
    parallel_without_vllm,
    quantised,
    several_greedy,
)
from spd_dist.errors import ConfigError

if TYPE_CHECKING:
    from spd_dist.config.whole import Config


def check_combinations(config: Config) -> None:
    """Refuse what does not go together.

    Raises:
        ConfigError: the first row of `COMBINATIONS` that `config` has.
    """
    for row in COMBINATIONS:
        if row.breaks(config):
            raise ConfigError(row.sentence(config))


_HALF = ("bfloat16", "float16")
_NF4 = ("model.quantization=nf4", "distributed.zero_stage=2")
_WHOLE = "model.quantization=none"
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
        holds({"project.rank": None, "project.rank_rule": "fixed"}),
        "", ("project.rank=N",), ("project.rank_rule=fixed",),
    ),
    Combination(
        ("project.directions", "project.mode"),
        holds({"project.directions": "gradient_x_activation", "project.mode": "soft"}),
        "whose gains are of the gradients' own directions", ("project.directions=gradient", "project.mode=hard"),
        ("project.directions=gradient_x_activation", "project.mode=soft"),
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
        ("data.thinking", "data.template"), holds({"data.thinking": "off", "data.template": "plain"}),
        "since it is the chat template that asks for no thought", ("data.template=chat", "data.thinking=keep"),
        ("data.thinking=off", "data.template=plain"),
    ),
    Combination(
        ("finetune.loss_on", "data.thinking"),
        holds({"finetune.loss_on": ("thought", "after_thought"), "data.thinking": ("drop", "off")}),
        "which leaves no thought to tell apart", ("finetune.loss_on=completion", "data.thinking=keep"),
        ("finetune.loss_on=thought", "data.thinking=drop"),
    ),
    Combination(
        ("finetune.loss", "finetune.mode"), holds({"finetune.loss": "distil", "finetune.mode": "full"}),
        "which changes the weights that the teacher is made of",
        ("finetune.mode=lora", "finetune.loss=cross_entropy"),
        ("finetune.loss=distil", "finetune.mode=full", "evaluate.arms=[base,spd]"),
    ),
    Combination(
        ("finetune.loss", "evaluate.arms"), distils_without_projection,
        f"where {' and '.join(UNPROJECTED)} learn of no projection, and so from no teacher",
        ("evaluate.arms=[base,spd]", "finetune.loss=cross_entropy"), ("finetune.loss=distil",),
    ),
    Combination(
        ("finetune.filter", "generate.num_samples"),
        lambda config: "agreed" in config.finetune.filter and config.generate.num_samples == 1,
        "of which one is all that there is to agree with",
        ("generate.num_samples=4", "finetune.filter=[ended,loops]"), ("finetune.filter=[agreed]",),
    ),
    Combination(
        ("generate.num_samples", "generate.temperature"), several_greedy("generate"),
        _SAME, ("generate.temperature=0.7", "generate.num_samples=1"),
        ("generate.num_samples=2", "generate.temperature=0"),
    ),
    Combination(
        ("evaluate.num_samples", "evaluate.temperature"), several_greedy("evaluate"),
        _SAME, ("evaluate.temperature=0.8", "evaluate.num_samples=1"), ("evaluate.num_samples=2",),
    ),
    Combination(
        ("generate.vllm_python", "generate.engine"), lacks("generate", "vllm", "generate.vllm_python"),
        "which runs in that environment", ("generate.vllm_python=PYTHON",), ("generate.engine=vllm",),
    ),
    Combination(
        ("generate.vllm_python", "evaluate.engine"), lacks("evaluate", "vllm", "generate.vllm_python"),
        "which runs in that environment", ("generate.vllm_python=PYTHON",), ("evaluate.engine=vllm",),
    ),
    Combination(
        ("generate.command", "generate.engine"), lacks("generate", "command", "generate.command"),
        "which runs it", ("generate.command=TEMPLATE",), ("generate.engine=command",),
    ),
    Combination(
        ("generate.command", "evaluate.engine"), lacks("evaluate", "command", "generate.command"),
        "which runs it", ("generate.command=TEMPLATE",), ("evaluate.engine=command",),
    ),
    Combination(
        ("generate.tensor_parallel", "generate.engine"), parallel_without_vllm("generate.tensor_parallel"),
        "which has none; vllm has", ("generate.vllm_python=PYTHON", "generate.tensor_parallel=1"),
        ("generate.tensor_parallel=2",),
    ),
    Combination(
        ("generate.pipeline_parallel", "generate.engine"), parallel_without_vllm("generate.pipeline_parallel"),
        "which has none; vllm has", ("generate.vllm_python=PYTHON", "generate.pipeline_parallel=1"),
        ("generate.pipeline_parallel=2",),
    ),
    *OF_ADAPTERS,
    *(
        Combination(
            (f"{section}.batch_invariant", f"{section}.engine"), invariant_elsewhere(section),
            "whose batches are its own", (f"{section}.engine=hf", f"{section}.batch_invariant=false"),
            (f"{section}.batch_invariant=true", f"{section}.engine=hf_cb"),
        )
        for section in ("generate", "evaluate")
    ),
    *(
        Combination(
            (f"{section}.batch_invariant", f"{section}.batch_size"),
            invariant_with_any_batch(section), "since the batch is then a part of the result",
            (f"{section}.batch_size=32", f"{section}.batch_invariant=false"),
            (f"{section}.batch_invariant=true", f"{section}.batch_size=auto"),
        )
        for section in ("generate", "evaluate")
    ),
    *(
        Combination(
            (f"{section}.max_thought_tokens", f"{section}.engine"), budget_elsewhere(section),
            "which keeps to none", (f"{section}.engine=hf", f"{section}.max_thought_tokens=null"),
            (f"{section}.max_thought_tokens=64", f"{section}.engine=hf_cb"),
        )
        for section in ("generate", "evaluate")
    ),
    Combination(
        ("generate.placement", "generate.engine"),
        holds({"generate.placement": "layerwise", "generate.engine": "hf_cb"}),
        "which needs whole weights on each rank", ("generate.placement=replica", "generate.engine=hf"),
        ("generate.placement=layerwise", "generate.engine=hf_cb"),
    ),
    Combination(
        ("evaluate.placement", "evaluate.engine"),
        holds({"evaluate.placement": "layerwise", "evaluate.engine": "hf_cb"}),
        "which needs whole weights on each rank", ("evaluate.placement=replica", "evaluate.engine=hf"),
        ("evaluate.placement=layerwise", "evaluate.engine=hf_cb"),
    ),
    Combination(
        ("generate.placement", "distributed.zero_stage"),
        holds({"generate.placement": "layerwise", "distributed.zero_stage": (0, 1, 2)}),
        _SHARDS, ("distributed.zero_stage=3", "generate.placement=auto"),
        ("generate.placement=layerwise", "distributed.zero_stage=2"),
    ),
    Combination(
        ("evaluate.placement", "distributed.zero_stage"),
        holds({"evaluate.placement": "layerwise", "distributed.zero_stage": (0, 1, 2)}),
        _SHARDS, ("distributed.zero_stage=3", "evaluate.placement=auto"),
        ("evaluate.placement=layerwise", "distributed.zero_stage=0"),
    ),
    Combination(
        ("generate.apply_as", "project.insertion"), holds({**_KEYS_AFTER_ROPE, "generate.apply_as": "fold"}),
        _TURNS, ("generate.apply_as=hook", "project.insertion=linear", "project.kinds=value"),
        ("generate.apply_as=fold", "project.insertion=rope"),
    ),
    Combination(
        ("generate.engine", "project.insertion"), holds({**_KEYS_AFTER_ROPE, "generate.engine": ("server", "command")}),
        f"whose model is folded, {_TURNS}",
        ("generate.engine=hf", "project.insertion=linear", "project.kinds=value"),
        ("generate.engine=command", "generate.command=PROGRAM", "project.insertion=rope"),
    ),
    Combination(
        ("finetune.offload_activations", "finetune.checkpointing"),
        holds({"finetune.offload_activations": True, "finetune.checkpointing": False}),
        "without which all activations would be moved", ("finetune.checkpointing=true",),
        ("finetune.offload_activations=true",),
    ),
    Combination(
        ("finetune.merge", "finetune.mode"), holds({"finetune.merge": True, "finetune.mode": "full"}),
        "which has no adapter to merge", ("finetune.mode=lora", "finetune.merge=false"),
        ("finetune.merge=true", "finetune.mode=full"),
    ),
    Combination(
        ("finetune.keep_best", "finetune.validation_fraction"),
        holds({"finetune.keep_best": True, "finetune.validation_fraction": 0.0}),
        _FOLLOWS, ("finetune.validation_fraction=0.05", "finetune.keep_best=false"), ("finetune.keep_best=true",),
    ),
    Combination(
        ("finetune.patience", "finetune.validation_fraction"),
        lambda config: config.finetune.patience is not None and config.finetune.validation_fraction == 0,
        _FOLLOWS, ("finetune.validation_fraction=0.05", "finetune.patience=null"), ("finetune.patience=2",),
    ),
    Combination(
        ("finetune.stop_on_train_loss", "finetune.keep_best"),
        holds({"finetune.stop_on_train_loss": True, "finetune.keep_best": True}),
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
    *(
        Combination(("model.quantization", key), quantised(breaks), why, (instead, _WHOLE), (*_NF4, *example))
        for key, breaks, why, instead, *example in (
            ("finetune.mode", holds({"finetune.mode": "full"}), "since weights of 4 bits cannot be trained",
             "finetune.mode=lora", "finetune.mode=full"),
            ("distributed.zero_stage", holds({"distributed.zero_stage": 3}), "which shards no weights of 4 bits",
             "distributed.zero_stage=2", "distributed.zero_stage=3"),
            ("finetune.merge", holds({"finetune.merge": True}), "since 4 bits would round the update away",
             "finetune.merge=false", "finetune.merge=true"),
            ("generate.apply_as", holds({"generate.apply_as": "fold"}), "since 4 bits hold no folded weights",
             "generate.apply_as=hook", "generate.apply_as=fold"),
            ("rounds", lambda config: config.rounds > 1, "since a round starts from the merged student before it",
             "rounds=1", "rounds=2", "model.dtype=float32"),
            *((f"{section}.engine", loads_itself(section), "which would load the weights whole",
               f"{section}.engine=hf", f"{section}.engine=server") for section in ("generate", "evaluate")),
        )
    ),
    Combination(
        ("mechanism.in_run", "project.insertion"),
        holds({"mechanism.in_run": True, "project.insertion": ("rope", "head")}),
        "since its controls are cut of whole linear outputs", ("mechanism.in_run=false", "project.insertion=linear"),
        ("mechanism.in_run=true", "project.insertion=rope"),
    ),
)  # fmt: skip
"""In the order in which they are looked at."""
