"""Which modules and parameters get an adapter: by names, patterns, all linear ones, and experts in one tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from spd_dist.config import Finetune
from spd_dist.distributed.zero import whole_shape
from spd_dist.errors import ConfigError
from spd_dist.models.lora.quantised_base import width_of

ALL_LINEAR = "all-linear"
PATTERN = "regex:"


def check_targets(model: PreTrainedModel, config: Finetune) -> None:
    """See that every target is in the model, and no expert is passed by. A model on the meta device will do.

    Raises:
        ConfigError: a target that is not there, experts that it cannot reach, or a rank that its weights have not.
    """
    modules = adapted_modules(model, config)
    _check_parameters(model, config)
    fused = _fused_experts(model)
    passed_by = sorted({one for one in config.lora_targets for word in fused if word in one or one == ALL_LINEAR})
    if passed_by and not config.lora_parameters:
        names = ",".join(sorted({".".join(name.split(".")[-2:]) for name in fused_parameters(model)}))
        raise ConfigError(
            f"finetune.lora_targets: {passed_by} would get no adapter in the experts of this model, whose weights are "
            f"one tensor for all of them; set finetune.lora_parameters=[{names}] and finetune.lora_dropout=0, or name "
            "modules outside of the experts, as q_proj, or set finetune.mode=full"
        )
    _check_rank(modules, config)


def adapted_modules(model: PreTrainedModel, config: Finetune) -> dict[str, nn.Module]:
    """The linear modules that `finetune.lora_targets` means, by their whole names.

    Raises:
        ConfigError: an entry means none, or is no regular expression.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    head = model.get_output_embeddings()
    meant = {target: {name for name in linear if _means(target, name)} for target in config.lora_targets}
    if ALL_LINEAR in meant:  # but for the head, as in the paper that found it best (QLoRA, arXiv 2305.14314)
        meant[ALL_LINEAR] = {name for name, module in linear.items() if module is not head}
    missing = [target for target, names in meant.items() if not names]
    if missing or not (config.lora_targets or config.lora_parameters):
        known = sorted({name.rpartition(".")[2] for name in linear})
        raise ConfigError(f"finetune.lora_targets: {missing} are no linear modules of this model, which has {known}")
    chosen = {name for names in meant.values() for name in names}
    return {name: module for name, module in linear.items() if name in chosen}


def peft_targets(model: PreTrainedModel, config: Finetune) -> list[str]:
    """`target_modules` of peft: the names as they are given, or whole ones where a pattern chose them."""
    if all(target != ALL_LINEAR and not target.startswith(PATTERN) for target in config.lora_targets):
        return list(config.lora_targets)
    return list(adapted_modules(model, config))


def fused_parameters(model: PreTrainedModel) -> list[str]:
    """Names of the weights that hold all experts of a layer in one tensor."""
    return [name for name, weight in model.named_parameters() if len(whole_shape(weight)) == 3]


def _means(target: str, name: str) -> bool:
    if not target.startswith(PATTERN):
        return name == target or name.endswith(f".{target}")
    try:
        return re.fullmatch(target.removeprefix(PATTERN), name) is not None
    except re.error as error:
        raise ConfigError(
            f"finetune.lora_targets: {target!r} is not valid, {error}; write a regular expression of whole names, as "
            r"'regex:.*layers\.[0-3]\.self_attn\.[qv]_proj'"
        ) from error


def _fused_experts(model: PreTrainedModel) -> set[str]:
    """First words of the weights that hold all experts of a layer in one tensor: `gate`, `up`, `down`."""
    names = {name.rpartition(".")[2] for name in fused_parameters(model)}
    return {word for name in names for word in name.split("_") if word in ("gate", "up", "down")}


def _check_parameters(model: PreTrainedModel, config: Finetune) -> None:
    """PEFT adapts parameters that are no module's weight one by one; ours are experts in one tensor."""
    known = fused_parameters(model)
    missing = [one for one in config.lora_parameters if not any(_means(one, name) for name in known)]
    if missing:
        short = sorted({".".join(name.split(".")[-2:]) for name in known})
        raise ConfigError(
            f"finetune.lora_parameters: {missing} are no weights of experts in one tensor; this model has "
            f"{short or 'none'}; set finetune.lora_parameters={f'[{short[0]}]' if short else '[]'}"
        )
    quantised = model.config.to_dict().get("quantization_config")
    if config.lora_parameters and quantised:
        raise ConfigError(
            f"finetune.lora_parameters: {list(config.lora_parameters)} are not valid with this model.name, whose "
            f"experts are stored as {quantised.get('quant_method', 'quantised')}, which no adapter reaches; name a "
            "checkpoint in bfloat16, or set finetune.lora_parameters=[]"
        )


def _check_rank(modules: Mapping[str, nn.Module], config: Finetune) -> None:
    if config.lora_init not in ("eva", "olora", "pissa", "corda"):
        return
    for name, module in modules.items():
        width = width_of(module)
        if config.lora_rank > width:
            raise ConfigError(
                f"finetune.lora_rank: {config.lora_rank} is not valid with finetune.lora_init={config.lora_init}, "
                f"since {name} has no more than {width} directions; set finetune.lora_rank={width} or "
                "finetune.lora_init=default"
            )
