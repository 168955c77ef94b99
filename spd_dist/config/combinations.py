"""Settings that are each valid and not together: a row each, for the check, `docs/compatibility.md` and a test."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spd_dist.config.adapter_combinations import OF_ADAPTERS
from spd_dist.config.combination import UNPROJECTED, Combination, above, is_set, other_than, without_projection
from spd_dist.config.sections import Project
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
_NO_VLLM = {"generate.engine": other_than("vllm"), "evaluate.engine": other_than("vllm")}


_SAME = "since all of them would be the same"
_SHARDS = "since only ZeRO-3 shards the weights that it walks through"
_FOLLOWS = "since it follows the validation loss"
_TURNS = "since the map of a key would turn with its position, and so cannot be folded into weights"
_JUDGE = "since both would choose the epoch that is kept"
_BARE = "since only a chat has it"

COMBINATIONS = (
    Combination(
        ("project.rank", "project.rank_rule"),
        {"project.rank": None, "project.rank_rule": "fixed"},
        "", ("project.rank=N",), ("project.rank_rule=fixed",),
    ),
    *(
        Combination(
            ("project.rank_rule", f"project.{key}"),
            {f"project.{key}": other_than(default), "project.rank_rule": other_than(rule)},
            "which it does not read",
            (f"project.rank_rule={rule}", f"project.{key}={unset}"), (f"project.{key}={given}",),
        )
        for key, rule, default, unset, given in (
            ("rank", "fixed", Project.rank, "null", 16),
            ("fraction", "fraction", Project.fraction, Project.fraction, 0.25),
            ("energy", "energy", Project.energy, Project.energy, 0.9),
        )
    ),
    Combination(
        ("project.match_kl", "project.mode"),
        {"project.match_kl": True, "project.mode": other_than("random")},
        "since only a random subspace is matched to another", ("project.mode=random", "project.match_kl=false"),
        ("project.match_kl=true",),
    ),
    Combination(
        ("project.directions", "project.mode"),
        {"project.directions": ("gradient_x_activation", "activation"), "project.mode": "soft"},
        "whose gains are of the gradients' own directions", ("project.directions=gradient", "project.mode=hard"),
        ("project.directions=gradient_x_activation", "project.mode=soft"),
    ),
    Combination(
        ("project.directions", "project.centered"),
        {"project.directions": ("gradient_x_activation", "activation"), "project.centered": True},
        "since only the gradients' own moments are taken about their mean",
        ("project.directions=gradient", "project.centered=false"),
        ("project.directions=activation", "project.centered=true"),
    ),
    Combination(
        ("data.system", "data.template"),
        {"data.system": is_set, "data.template": "plain"},
        _BARE, ("data.template=chat", "data.system=null"), ("data.template=plain", "data.system=Hello"),
    ),
    Combination(
        ("data.template_options", "data.template"),
        {"data.template_options": bool, "data.template": "plain"},
        _BARE, ("data.template=chat",), ("data.template=plain", "data.template_options={enable_thinking: false}"),
    ),
    Combination(
        ("data.thinking", "data.template"), {"data.thinking": "off", "data.template": "plain"},
        "since it is the chat template that asks for no thought", ("data.template=chat", "data.thinking=keep"),
        ("data.thinking=off", "data.template=plain"),
    ),
    Combination(
        ("finetune.loss_on", "data.thinking"),
        {"finetune.loss_on": ("thought", "after_thought"), "data.thinking": ("drop", "off")},
        "which leaves no thought to tell apart", ("finetune.loss_on=completion", "data.thinking=keep"),
        ("finetune.loss_on=thought", "data.thinking=drop"),
    ),
    Combination(
        ("finetune.loss", "evaluate.arms"), {"finetune.loss": "distil", "evaluate.arms": without_projection},
        f"where {' and '.join(UNPROJECTED)} learn of no projection, and so from no teacher",
        ("evaluate.arms=[base,spd]", "finetune.loss=cross_entropy"), ("finetune.loss=distil",),
    ),
    Combination(
        ("finetune.filter", "generate.num_samples"),
        {"finetune.filter": lambda rules: "agreed" in rules, "generate.num_samples": 1},
        "of which one is all that there is to agree with",
        ("generate.num_samples=4", "finetune.filter=[ended,loops]"), ("finetune.filter=[agreed]",),
    ),
    Combination(
        ("generate.contrast", "generate.engine"),
        {"generate.contrast": other_than(1), "generate.engine": other_than("hf")},
        "which has one policy", ("generate.engine=hf", "generate.contrast=1"),
        ("generate.contrast=2", "generate.engine=hf_cb"),
    ),
    Combination(
        ("generate.contrast", "generate.apply_as"),
        {"generate.contrast": other_than(1), "generate.apply_as": "fold"},
        "which leaves the policy as it was nowhere", ("generate.apply_as=hook", "generate.contrast=1"),
        ("generate.contrast=2", "generate.apply_as=fold"),
    ),
    Combination(
        ("generate.num_samples", "generate.temperature"), {"generate.num_samples": above(1), "generate.temperature": 0},
        _SAME, ("generate.temperature=0.7", "generate.num_samples=1"),
        ("generate.num_samples=2", "generate.temperature=0"),
    ),
    Combination(
        ("evaluate.num_samples", "evaluate.temperature"), {"evaluate.num_samples": above(1), "evaluate.temperature": 0},
        _SAME, ("evaluate.temperature=0.8", "evaluate.num_samples=1"), ("evaluate.num_samples=2",),
    ),
    *(
        Combination(
            (key, f"{section}.engine"), {key: None, f"{section}.engine": engine},
            why, (f"{key}={value}",), (f"{section}.engine={engine}",),
        )
        for key, engine, why, value in (
            ("generate.vllm_python", "vllm", "which runs in that environment", "PYTHON"),
            ("generate.command", "command", "which runs it", "TEMPLATE"),
        )
        for section in ("generate", "evaluate")
    ),
    *(
        Combination(
            (key, "generate.engine"), {key: above(1)} | _NO_VLLM,
            "which has none; vllm has", ("generate.vllm_python=PYTHON", f"{key}=1"), (f"{key}=2",),
        )
        for key in ("generate.tensor_parallel", "generate.pipeline_parallel")
    ),
    *OF_ADAPTERS,
    *(
        Combination(
            (f"{section}.batch_invariant", f"{section}.engine"),
            {f"{section}.batch_invariant": True, f"{section}.engine": other_than("hf")},
            "whose batches are its own", (f"{section}.engine=hf", f"{section}.batch_invariant=false"),
            (f"{section}.batch_invariant=true", f"{section}.engine=hf_cb"),
        )
        for section in ("generate", "evaluate")
    ),
    *(
        Combination(
            (f"{section}.batch_invariant", f"{section}.batch_size"),
            {f"{section}.batch_invariant": True, f"{section}.batch_size": "auto"},
            "since the batch is then a part of the result",
            (f"{section}.batch_size=32", f"{section}.batch_invariant=false"),
            (f"{section}.batch_invariant=true", f"{section}.batch_size=auto"),
        )
        for section in ("generate", "evaluate")
    ),
    *(
        Combination(
            ("generate.compile", key), {"generate.compile": True, key: values},
            reason, (f"{key}={remedy}", "generate.compile=false"), ("generate.compile=true", f"{key}={given}"),
        )
        for key, values, reason, remedy, given in (
            ("generate.engine", other_than("hf"), "whose passes are its own", "hf", "hf_cb"),
            ("generate.placement", "layerwise", "whose weights come and go", "replica", "layerwise"),
            ("generate.batch_invariant", True, "since the first passes are not compiled", "false", "true"),
            ("evaluate.batch_invariant", True, "since the first passes are not compiled", "false", "true"),
        )
    ),
    *(
        Combination(
            (f"{section}.max_thought_tokens", f"{section}.engine"),
            {f"{section}.max_thought_tokens": is_set, f"{section}.engine": other_than("hf")},
            "which keeps to none", (f"{section}.engine=hf", f"{section}.max_thought_tokens=null"),
            (f"{section}.max_thought_tokens=64", f"{section}.engine=hf_cb"),
        )
        for section in ("generate", "evaluate")
    ),
    *(
        Combination(
            (f"{section}.placement", f"{section}.engine"),
            {f"{section}.placement": "layerwise", f"{section}.engine": "hf_cb"},
            "which needs whole weights on each rank", (f"{section}.placement=replica", f"{section}.engine=hf"),
            (f"{section}.placement=layerwise", f"{section}.engine=hf_cb"),
        )
        for section in ("generate", "evaluate")
    ),
    *(
        Combination(
            (f"{section}.placement", "distributed.zero_stage"),
            {f"{section}.placement": "layerwise", "distributed.zero_stage": (0, 1, 2)},
            _SHARDS, ("distributed.zero_stage=3", f"{section}.placement=auto"),
            (f"{section}.placement=layerwise", "distributed.zero_stage=2"),
        )
        for section in ("generate", "evaluate")
    ),
    Combination(
        ("generate.apply_as", "project.insertion"), {**_KEYS_AFTER_ROPE, "generate.apply_as": "fold"},
        _TURNS, ("generate.apply_as=hook", "project.insertion=linear", "project.kinds=value"),
        ("generate.apply_as=fold", "project.insertion=rope"),
    ),
    Combination(
        ("generate.engine", "project.insertion"), {**_KEYS_AFTER_ROPE, "generate.engine": ("server", "command")},
        f"whose model is folded, {_TURNS}",
        ("generate.engine=hf", "project.insertion=linear", "project.kinds=value"),
        ("generate.engine=command", "generate.command=PROGRAM", "project.insertion=rope"),
    ),
    Combination(
        ("finetune.offload_activations", "finetune.checkpointing"),
        {"finetune.offload_activations": True, "finetune.checkpointing": False},
        "without which all activations would be moved", ("finetune.checkpointing=true",),
        ("finetune.offload_activations=true",),
    ),
    Combination(
        ("finetune.merge", "finetune.mode"), {"finetune.merge": True, "finetune.mode": "full"},
        "which has no adapter to merge", ("finetune.mode=lora", "finetune.merge=false"),
        ("finetune.merge=true", "finetune.mode=full"),
    ),
    Combination(
        ("finetune.keep_best", "finetune.validation_fraction"),
        {"finetune.keep_best": True, "finetune.validation_fraction": 0.0},
        _FOLLOWS, ("finetune.validation_fraction=0.05", "finetune.keep_best=false"), ("finetune.keep_best=true",),
    ),
    Combination(
        ("finetune.patience", "finetune.validation_fraction"),
        {"finetune.patience": is_set, "finetune.validation_fraction": 0},
        _FOLLOWS, ("finetune.validation_fraction=0.05", "finetune.patience=null"), ("finetune.patience=2",),
    ),
    Combination(
        ("finetune.stop_on_train_loss", "finetune.keep_best"),
        {"finetune.stop_on_train_loss": True, "finetune.keep_best": True},
        _JUDGE, ("finetune.keep_best=false", "finetune.stop_on_train_loss=false"),
        ("finetune.stop_on_train_loss=true", "finetune.keep_best=true", "finetune.validation_fraction=0.05"),
    ),
    Combination(
        ("finetune.stop_on_train_loss", "finetune.patience"),
        {"finetune.stop_on_train_loss": True, "finetune.patience": is_set},
        "since both would say when to stop", ("finetune.patience=null", "finetune.stop_on_train_loss=false"),
        ("finetune.stop_on_train_loss=true", "finetune.patience=2", "finetune.validation_fraction=0.05"),
    ),
    Combination(
        ("rounds", "model.dtype"),
        {"rounds": above(1), "finetune.mode": "lora", "model.dtype": _HALF},
        "since a round starts from the merged student before it, and rounding would take most of its update away",
        ("model.dtype=float32", "finetune.mode=full", "rounds=1"), ("rounds=2", "model.dtype=bfloat16"),
    ),
    *(
        Combination(
            ("model.quantization", key), {"model.quantization": "nf4", key: value},
            why, (instead, _WHOLE), (*_NF4, *example),
        )
        for key, value, why, instead, *example in (
            ("finetune.mode", "full", "since weights of 4 bits cannot be trained",
             "finetune.mode=lora", "finetune.mode=full"),
            ("distributed.zero_stage", 3, "which shards no weights of 4 bits",
             "distributed.zero_stage=2", "distributed.zero_stage=3"),
            ("finetune.merge", True, "since 4 bits would round the update away",
             "finetune.merge=false", "finetune.merge=true"),
            ("generate.apply_as", "fold", "since 4 bits hold no folded weights",
             "generate.apply_as=hook", "generate.apply_as=fold"),
            ("rounds", above(1), "since a round starts from the merged student before it",
             "rounds=1", "rounds=2", "model.dtype=float32"),
            *((f"{section}.engine", other_than("hf", "hf_cb"), "which would load the weights whole",
               f"{section}.engine=hf", f"{section}.engine=server") for section in ("generate", "evaluate")),
        )
    ),
    Combination(
        ("mechanism.in_run", "project.insertion"),
        {"mechanism.in_run": True, "project.insertion": ("rope", "head")},
        "since its controls are cut of whole linear outputs", ("mechanism.in_run=false", "project.insertion=linear"),
        ("mechanism.in_run=true", "project.insertion=rope"),
    ),
)  # fmt: skip
"""In the order in which they are looked at."""
