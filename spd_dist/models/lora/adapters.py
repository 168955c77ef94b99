"""LoRA adapters by peft: put on a policy whole or sharded by ZeRO-3, taken off, saved and loaded."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from spd_dist.config import Finetune
from spd_dist.distributed.zero import gather_as_one, gathered, is_sharded
from spd_dist.errors import DataError
from spd_dist.models.lora.adapter_files import check_fits, naming_adapter, read_adapter
from spd_dist.models.lora.initial_values import InputSums, begin_in_subspace_, initial_factors, is_taken_off
from spd_dist.models.lora.keyed_dropout import TokenKeys, use_keyed_dropout
from spd_dist.models.lora.quantised_base import whole_weight
from spd_dist.models.lora.target_modules import check_targets, peft_targets
from spd_dist.models.save_weights import save_tensors
from spd_dist.types import Subspace

ADAPTER = "default"


TAKEN_OFF = "taken_off"
"""The frozen adapter that takes off what the trained one begins at (`initial_values.py`)."""


def add_adapters(
    model: PreTrainedModel,
    config: Finetune,
    *,
    generator: torch.Generator,
    inputs: Mapping[str, InputSums] | None = None,
    start: Path | Subspace | None = None,
) -> PeftModel:
    """`model` with trainable adapters at `config.lora_targets`, everything else frozen; `model` itself is changed.

    The weights come from `generator`, so every rank makes the same; peft reads the true shapes of sharded modules.
    `inputs` are what the modules are given, where `reads_inputs` asks for it. With `start`, the folder of an adapter
    that was made by the same `config`, the weights are its; with a subspace, those at its sites begin in it.

    Raises:
        ConfigError: a target is not in the model, or experts that are one tensor would be passed by.
        DataError: the adapter of `start` is broken, or of other settings.
    """
    check_targets(model, config)
    targets = peft_targets(model, config)  # before there are adapters, which are linear modules, too
    # peft initialises from the global generator; ours overwrites it below.
    with torch.random.fork_rng(devices=[]), _peft_gathers(model):
        adapted = get_peft_model(model, _peft_config(targets, config), autocast_adapter_dtype=False)
        if is_taken_off(config):
            adapted.add_adapter(TAKEN_OFF, _peft_config(targets, config, dropout=False), autocast_adapter_dtype=False)
            tuner: Any = adapted.base_model
            tuner.set_adapter([ADAPTER, TAKEN_OFF])  # which lets both be trained
            adapted.requires_grad_(False)
            for _, layer in lora_layers(adapted):
                matrix(layer.lora_A).requires_grad_(True)
                matrix(layer.lora_B).requires_grad_(True)
    _let_layers_read_weights(adapted)
    _keep_order_of_parameters(adapted)
    with torch.no_grad():
        if isinstance(start, Path):
            _begin_as_(adapted, start)
            return adapted
        for name, layer in lora_layers(base_model(adapted)):
            sites = {} if start is None else {site: part for site, part in start.sites.items() if site.module == name}
            if sites and not matrix(layer.lora_A).is_meta:
                matrix(layer.lora_A).zero_()
                begin_in_subspace_(matrix(layer.lora_B), sites)
            else:
                _initialise_(name, layer, config, generator, (inputs or {}).get(name))
    return adapted


def _begin_as_(adapted: PeftModel, folder: Path) -> None:
    """Write the weights of a saved adapter into fresh ones; where one part is taken off again, both parts."""
    saved = read_adapter(folder)
    parts = {ADAPTER: saved}
    if TAKEN_OFF in adapted.peft_config:
        halves = {name: tensor.chunk(2, dim=int(".lora_B." in name)) for name, tensor in saved.items()}
        parts = {each: {name: pair[k] for name, pair in halves.items()} for k, each in enumerate((ADAPTER, TAKEN_OFF))}
    for adapter, tensors in parts.items():
        own = get_peft_model_state_dict(adapted, adapter_name=adapter, save_embedding_layers=False)
        if {name: tuple(one.shape) for name, one in own.items()} != {n: tuple(one.shape) for n, one in tensors.items()}:
            raise DataError(f"{folder} is an adapter of other settings: {_first_unlike(own, tensors)}; train it again")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def _first_unlike(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """A name whose shapes differ, with both."""

    def shape(tensors: Mapping[str, Tensor], name: str) -> str:
        return str(tuple(tensors[name].shape)) if name in tensors else "nothing"

    names = sorted(wanted.keys() | found.keys())
    name = next(name for name in names if shape(wanted, name) != shape(found, name))
    return f"{name} is {shape(found, name)}, and would be {shape(wanted, name)}"


def _peft_config(targets: list[str], config: Finetune, *, dropout: bool = True) -> LoraConfig:
    return LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # pyright: ignore[reportArgumentType]  # peft divides by it, whole or not
        lora_dropout=config.lora_dropout if dropout else 0.0,
        target_modules=targets,
        target_parameters=list(config.lora_parameters) or None,
        use_rslora=config.lora_variant == "rslora",
        use_dora=config.lora_variant == "dora",
        task_type="CAUSAL_LM",
    )


def _initialise_(
    name: str, layer: LoraLayer, config: Finetune, generator: torch.Generator, inputs: InputSums | None
) -> None:
    """Write the initial weights of one layer; sharded base weights are gathered for it, by all ranks."""
    down, up = matrix(layer.lora_A), matrix(layer.lora_B)
    if down.is_meta:
        return
    if isinstance(layer, ParamWrapper) or config.lora_init in ("default", "spd"):
        if config.lora_init == "gaussian":
            down.copy_(torch.randn(down.shape, generator=generator) / config.lora_rank)
            return
        bound = down.shape[1] ** -0.5  # kaiming_uniform_ with a = sqrt(5), as peft
        down.copy_(torch.rand(down.shape, generator=generator).mul_(2 * bound).sub_(bound))
        return
    plain: Any = layer.get_base_layer()
    with gathered([plain.weight]):
        scaling, weight_OI = layer.scaling[ADAPTER], whole_weight(plain)
        factors = initial_factors(weight_OI, config, scaling, generator=generator, sums=inputs)
    down.copy_(factors.down_RI)
    up.copy_(factors.up_OR)
    if TAKEN_OFF in layer.lora_A:
        matrix(layer.lora_A, TAKEN_OFF).copy_(down)
        matrix(layer.lora_B, TAKEN_OFF).copy_(-up)


def key_dropout(adapted: PeftModel) -> TokenKeys:
    """Make the adapters' dropout independent of batches and ranks; returns the keys that the training loop sets."""
    return use_keyed_dropout((layer.lora_dropout, ADAPTER) for _, layer in lora_layers(adapted))


@contextmanager
def without_adapters(layers: Iterable[LoraLayer]) -> Generator[None]:
    """Within this context the layers are the base model's; PEFT's own way would also stop training the adapters."""
    layers = list(layers)
    for layer in layers:
        vars(layer)["_disable_adapters"] = True
    try:
        yield
    finally:
        for layer in layers:
            vars(layer)["_disable_adapters"] = False


def remove_adapters(adapted: PeftModel) -> nn.Module:
    """The base model as it was, without adapters and with `requires_grad` of every parameter restored to false."""
    if _reads_sharded_weights(adapted):
        base_model(adapted).disable_input_require_grads()
    return adapted.unload()


def base_model(adapted: PeftModel) -> PreTrainedModel:
    """The model that the adapters are in: ours are always of transformers."""
    return cast("PreTrainedModel", adapted.get_base_model())


def adapter_parameters(adapted: PeftModel) -> dict[str, nn.Parameter]:
    """The trainable parameters by name."""
    return {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}


def saved_parameters(adapted: PeftModel) -> dict[str, nn.Parameter]:
    """All parameters that `save_adapter` takes, by name."""
    return {name: parameter for name, parameter in adapted.named_parameters() if ".lora_" in name}


def save_adapter(adapted: PeftModel, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write the PEFT format: `adapter_config.json` and `adapter_model.safetensors` of whole `tensors`.

    With a part that is taken off again, both are one adapter of twice the rank.
    """
    state = get_peft_model_state_dict(adapted, state_dict=dict(tensors), save_embedding_layers=False)
    config = copy.copy(cast("LoraConfig", adapted.peft_config[ADAPTER]))
    if TAKEN_OFF in adapted.peft_config:
        taken = get_peft_model_state_dict(
            adapted, state_dict=dict(tensors), adapter_name=TAKEN_OFF, save_embedding_layers=False
        )
        state = {name: torch.cat([state[name], taken[name]], dim=int(".lora_B." in name)) for name in state}
        # The scale is alpha over the rank, or over its root: it must stay what it was.
        config.lora_alpha *= 2**0.5 if config.use_rslora else 2  # pyright: ignore[reportAttributeAccessIssue]
        config.r *= 2
    save_tensors(state, folder / "adapter_model.safetensors")
    config.inference_mode = True
    config.save_pretrained(str(folder))


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """`model` with the frozen adapter of `folder`, in eval mode; `model` itself is changed.

    Raises:
        DataError: there is none, it is broken, or it is another model's.
    """
    tensors = read_adapter(folder)
    with torch.random.fork_rng(devices=[]), _peft_gathers(model), naming_adapter(folder):
        adapted = PeftModel.from_pretrained(
            model,
            str(folder),
            autocast_adapter_dtype=False,
            torch_device="cpu",  # or every rank opens the first GPU
        ).eval()
    check_fits(adapted, tensors, folder)
    _let_layers_read_weights(adapted)
    _keep_order_of_parameters(adapted)
    return adapted


def lora_layers(adapted: nn.Module) -> list[tuple[str, LoraLayer]]:
    """The layers with an adapter, by name, in the model's order."""
    return [(name, module) for name, module in adapted.named_modules() if isinstance(module, LoraLayer)]


def matrix(matrices: nn.ModuleDict, adapter: str = ADAPTER) -> nn.Parameter:
    """One of an adapter's two matrices."""
    return cast("nn.Parameter", matrices[adapter].weight)


@contextmanager
def _peft_gathers(model: nn.Module) -> Generator[None]:
    """Let peft gather the shards of a base weight that it must read (DoRA): it does so while such an object lives."""
    sharding = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}}) if is_sharded(model) else None
    try:
        yield
    finally:
        del sharding


def _let_layers_read_weights(adapted: PeftModel) -> None:
    """DoRA's layers need the norm of the weight inside their base layer, those of experts the weight itself."""
    if _reads_sharded_weights(adapted):
        kinds = [LoraLayer] if _is_dora(adapted) else [ParamWrapper]
        for kind in kinds:
            gather_as_one(adapted, kind)
        # ZeRO-3 takes such a module's gradients when its input has one; without it, before they are there.
        base_model(adapted).enable_input_require_grads()


def _reads_sharded_weights(adapted: PeftModel) -> bool:
    has_experts = any(isinstance(layer, ParamWrapper) for _, layer in lora_layers(adapted))
    return (_is_dora(adapted) or has_experts) and is_sharded(adapted)


def _is_dora(adapted: PeftModel) -> bool:
    config = adapted.peft_config[ADAPTER]
    return isinstance(config, LoraConfig) and config.use_dora


def _keep_order_of_parameters(adapted: PeftModel) -> None:
    """Keep the experts' parameters in their order: peft takes each out and puts it back last, at every call."""
    for _, layer in lora_layers(adapted):
        if isinstance(layer, ParamWrapper):
            plain = layer.get_base_layer()
            layer.register_forward_hook(_ordered(plain, list(vars(plain)["_parameters"])), always_call=True)


def _ordered(plain: nn.Module, names: list[str]) -> Any:
    def restore(*_: object) -> None:
        parameters = vars(plain)["_parameters"]
        for name in names if all(name in parameters for name in names) else ():  # an outer layer still has one
            if isinstance(parameters, OrderedDict):  # ZeRO-3's, whose other ways to an entry gather it
                parameters.move_to_end(name)
            else:
                parameters[name] = parameters.pop(name)

    return restore
