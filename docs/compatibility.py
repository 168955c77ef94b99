"""Writes `docs/compatibility.md` from the table that the config is checked by: `python docs/compatibility.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spd_dist.config.combinations import COMBINATIONS
from spd_dist.errors import ConfigError
from spd_dist.overrides import load_config

PAGE = Path(__file__).with_suffix(".md")
FEATURES = {
    "the defaults": (),
    "4-bit base weights": ("model.quantization=nf4", "distributed.zero_stage=2"),
    "packing": ("finetune.packing=true",),
    "activation checkpointing": ("finetune.checkpointing=true", "calibrate.checkpointing=true"),
    "activations in host memory": ("finetune.checkpointing=true", "finetune.offload_activations=true"),
    "DoRA": ("finetune.lora_variant=dora",),
    "adapters from singular vectors (PiSSA)": ("finetune.lora_init=pissa",),
    "adapters from activations (EVA)": ("finetune.lora_init=eva",),
    "adapters in experts": ("finetune.lora_parameters=[experts.down_proj]", "finetune.lora_dropout=0"),
    "a merged student": ("finetune.merge=true",),
    "validation, the best epoch": ("finetune.validation_fraction=0.05", "finetune.keep_best=true"),
    "learning a projected teacher's distributions": ("finetune.loss=distil", "evaluate.arms=[base,spd]"),
    "completions that end and agree": ("finetune.filter=[ended,agreed]", "generate.num_samples=4"),
    "two rounds, float32": ("rounds=2", "model.dtype=float32"),
    "two rounds, bfloat16": ("rounds=2", "model.dtype=bfloat16"),
    "sharded decoding": ("generate.placement=layerwise", "evaluate.placement=layerwise"),
    "batch-invariant samples": ("generate.batch_invariant=true",),
    "batch-invariant answers": ("evaluate.batch_invariant=true",),
    "several samples a prompt": ("generate.num_samples=4",),
    "a corpus by an array of jobs": ("generate.num_tasks=4",),
    "projection folded into weights": ("generate.apply_as=fold",),
    "projection after RoPE": ("project.insertion=rope",),
    "projection of values alone, after RoPE of keys": ("project.insertion=rope", "project.kinds=value"),
    "a budget for thoughts": ("generate.max_thought_tokens=64",),
    "tensor parallel": ("generate.tensor_parallel=2",),
    "directions by gradient x activation": ("project.directions=gradient_x_activation",),
    "sampling away from the policy": ("generate.contrast=2",),
    "projection by KV head": ("project.insertion=head",),
}
COLUMNS = {
    "lora": ("finetune.mode=lora",),
    "full": ("finetune.mode=full",),
    "qlora": ("model.quantization=nf4", "distributed.zero_stage=2"),
    **{f"ZeRO {stage}": (f"distributed.zero_stage={stage}",) for stage in range(4)},
    "hf": ("generate.engine=hf",),
    "hf_cb": ("generate.engine=hf_cb",),
    "vllm": ("generate.vllm_python=PYTHON",),
    "server": ("generate.engine=server",),
    "command": ("generate.command=PROGRAM",),
}


def rule_of(overrides: Sequence[str]) -> int | None:
    """The number of the row that refuses these overrides, from 1; None if they go together."""
    try:
        load_config([], overrides)
    except ConfigError as error:
        told = str(error)
        pairs = [(f"{row.keys[0]}: ", f" with {row.keys[1]}=") for row in COMBINATIONS]
        return next(number for number, pair in enumerate(pairs, 1) if told.startswith(pair[0]) and pair[1] in told)
    return None


def page() -> str:
    """The whole page."""
    lines = [
        "# What goes together",
        "",
        "Made by `python docs/compatibility.py` from the table that the config is checked by",
        "(`spd_dist/config/combinations.py`), before a model is loaded. A test holds both to each other.",
        "",
        f"| | {' | '.join(COLUMNS)} |",
        f"|---|{':-:|' * len(COLUMNS)}",
    ]
    for name, words in FEATURES.items():
        cells = [rule_of([*words, *column]) for column in COLUMNS.values()]
        lines.append(f"| {name} | {' | '.join('yes' if cell is None else f'no ({cell})' for cell in cells)} |")
    lines += [
        "",
        "Each column is set alone, all else by default (LoRA, ZeRO-3, the engine hf). What depends on the model is",
        "found when it is there: attention that packing leaks through, keys that RoPE turns otherwise, tied weights.",
        "",
        "| | these two | do not go together | set instead |",
        "|--:|---|---|---|",
    ]
    for number, row in enumerate(COMBINATIONS, 1):
        both, instead = ", ".join(f"`{key}`" for key in row.keys), " or ".join(f"`{word}`" for word in row.instead)
        lines.append(f"| {number} | {both} | {row.why or 'as `' + row.example[0] + '` needs it'} | {instead} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
