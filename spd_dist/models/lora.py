"""LoRA adapters by peft: put on a policy whole or sharded by ZeRO-3, taken off, saved and loaded; their dropout."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.other import transpose
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import HfDeepSpeedConfig
from transformers.pytorch_utils import Conv1D

from spd_dist.config import Finetune
from spd_dist.distributed.zero import gather_as_one, gathered, is_sharded, whole_shape
from spd_dist.errors import ConfigError, DataError
from spd_dist.models.save_weights import save_tensors, stored_parameters

_INT32 = 2**32
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B - _INT32)  # of the finaliser lowbias32, whose bias is near the least known


@dataclass
class TokenKeys:
    """The keys of the micro-batch in flight, shared by all dropout modules of a model."""

    key_BT: Tensor | None = None


class KeyedDropout(nn.Module):
    """`nn.Dropout` with masks drawn by hashing; the identity in eval mode."""

    def __init__(self, fraction: float, keys: TokenKeys, module_key: int) -> None:
        super().__init__()
        self.fraction = fraction
        self.keys = keys
        self.module_key = module_key

    def forward(self, x_BTD: Tensor) -> Tensor:
        """`x_BTD` with features dropped and the others scaled by 1 / (1 - fraction).

        Raises:
            ConfigError: the input's rows are not the micro-batch's tokens, as in a mixture's experts.
        """
        if not self.training or self.fraction == 0:
            return x_BTD
        key_BT = self.keys.key_BT
        if key_BT is None or x_BTD.shape[:-1].numel() != key_BT.numel():
            raise ConfigError(
                f"finetune.lora_dropout={self.fraction}: a module whose input rows are not the tokens of the batch "
                f"(got {tuple(x_BTD.shape)}) cannot have dropout; set finetune.lora_dropout=0"
            )
        drop_BTD = self._drop(key_BT, x_BTD.shape[-1]).view_as(x_BTD)
        return x_BTD.masked_fill(drop_BTD, 0.0) * (1 / (1 - self.fraction)) if self.fraction < 1 else x_BTD * 0

    def _drop(self, key_BT: Tensor, width: int) -> Tensor:
        feature_D = torch.arange(width, dtype=torch.int32, device=key_BT.device) + self.module_key
        bits_BTD = key_BT.unsqueeze(-1) ^ mixed_(mixed_(feature_D))
        return _rounds_(bits_BTD) < round(self.fraction * _INT32) - _INT32 // 2


def mixed_(x: Tensor) -> Tensor:
    """A bijection of int32 that spreads every bit over all others, in place."""
    _rounds_(x)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def _rounds_(x: Tensor) -> Tensor:
    """The same without its last step, which only the low bits need."""
    for multiplier, shift in zip(_MULTIPLIERS, (16, 15), strict=True):
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (32 - shift)) - 1))  # a shift of int32 repeats the sign
        x.mul_(multiplier)
    return x


def token_key(sequence_seed_BT: Tensor, position_BT: Tensor) -> Tensor:
    """The int32 key of each token, from its sequence's seed of this step (any int64) and its position there."""
    low_BT = (sequence_seed_BT & 0xFFFFFFFF).to(torch.int32)
    high_BT = (sequence_seed_BT >> 32).to(torch.int32)
    return mixed_(mixed_(mixed_(position_BT.to(torch.int32)) ^ low_BT) ^ high_BT)


def use_keyed_dropout(modules: Iterable[tuple[nn.ModuleDict, str]]) -> TokenKeys:
    """Replace each named `nn.Dropout` by a `KeyedDropout`; returns the keys that the training loop sets.

    The order of `modules` numbers them, so it must be the same in every run.
    """
    keys = TokenKeys()
    for index, (parent, name) in enumerate(modules):
        dropout = parent[name]
        if isinstance(dropout, nn.Dropout):
            # Modules are 2**20 features apart: no two share a hash input.
            parent[name] = KeyedDropout(dropout.p, keys, (index << 20) % 2**31)
    return keys


ADAPTER = "default"


def _fused_experts(model: nn.Module) -> set[str]:
    """First words of the weights that hold all experts of a layer in one tensor: `gate`, `up`, `down`."""
    names = {name.rpartition(".")[2] for name, weight in model.named_parameters() if len(whole_shape(weight)) == 3}
    return {word for name in names for word in name.split("_") if word in ("gate", "up", "down")}


def add_adapters(model: PreTrainedModel, config: Finetune, *, generator: torch.Generator) -> PeftModel:
    """`model` with trainable adapters at `config.lora_targets`, everything else frozen; `model` itself is changed.

    The weights come from `generator`, so every rank makes the same; peft reads the true shapes of sharded modules.

    Raises:
        ConfigError: no module of the model has one of the names, or experts that are one tensor have it.
    """
    linear = (nn.Linear, Conv1D)
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, linear)}
    missing = [target for target in config.lora_targets if target not in names]
    if missing or not config.lora_targets:
        raise ConfigError(
            f"finetune.lora_targets: {missing} are no linear modules of this model, which has {sorted(names)}"
        )
    passed_by = [target for target in config.lora_targets for fused in _fused_experts(model) if fused in target]
    if passed_by:
        raise ConfigError(
            f"finetune.lora_targets: {sorted(set(passed_by))} would get no adapter in the experts of this model, whose "
            "weights are one tensor for all of them; name modules outside of the experts, as q_proj, or set "
            "finetune.mode=full"
        )
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # pyright: ignore[reportArgumentType]  # peft divides by it, whole or not
        lora_dropout=config.lora_dropout,
        target_modules=list(config.lora_targets),
        use_rslora=config.lora_variant == "rslora",
        use_dora=config.lora_variant == "dora",
        task_type="CAUSAL_LM",
    )
    # peft initialises from the global generator; ours overwrites it below.
    with torch.random.fork_rng(devices=[]), _peft_gathers(model):
        adapted = get_peft_model(model, lora, autocast_adapter_dtype=False)
    _let_dora_read_base_weights(adapted)
    for _, layer in _layers(adapted):
        weight_RD = _matrix(layer.lora_A)
        bound = weight_RD.shape[1] ** -0.5  # kaiming_uniform_ with a = sqrt(5), as peft
        with torch.no_grad():
            weight_RD.copy_(torch.rand(weight_RD.shape, generator=generator).mul_(2 * bound).sub_(bound))
    return adapted


def key_dropout(adapted: PeftModel) -> TokenKeys:
    """Make the adapters' dropout independent of batches and ranks; returns the keys that the training loop sets."""
    return use_keyed_dropout((layer.lora_dropout, ADAPTER) for _, layer in _layers(adapted))


def remove_adapters(adapted: PeftModel) -> nn.Module:
    """The base model as it was, without adapters and with `requires_grad` of every parameter restored to false."""
    if _is_sharded_dora(adapted):
        base_model(adapted).disable_input_require_grads()
    return adapted.unload()


def base_model(adapted: PeftModel) -> PreTrainedModel:
    """The model that the adapters are in: ours are always of transformers."""
    return cast("PreTrainedModel", adapted.get_base_model())


def adapter_parameters(adapted: PeftModel) -> dict[str, nn.Parameter]:
    """The trainable parameters by name."""
    return {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}


def save_adapter(adapted: PeftModel, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write the PEFT format: `adapter_config.json` and `adapter_model.safetensors` of whole `tensors`."""
    state = get_peft_model_state_dict(adapted, state_dict=dict(tensors), save_embedding_layers=False)
    save_tensors(state, folder / "adapter_model.safetensors")
    config = adapted.peft_config[ADAPTER]
    training, config.inference_mode = config.inference_mode, True
    config.save_pretrained(str(folder))
    config.inference_mode = training


def load_adapter(model: PreTrainedModel, folder: Path) -> PeftModel:
    """`model` with the frozen adapter of `folder`, in eval mode; `model` itself is changed."""
    with torch.random.fork_rng(devices=[]), _peft_gathers(model):
        adapted = PeftModel.from_pretrained(
            model,
            str(folder),
            autocast_adapter_dtype=False,
            torch_device="cpu",  # or every rank opens the first GPU
        ).eval()
    _let_dora_read_base_weights(adapted)
    return adapted


LEAST_KEPT = 0.9
"""Share of an update that must survive the rounding of the weight it is added to."""


def merged_tensors(adapted: PeftModel, kept: dict[str, float] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The base model's stored tensors with the adapters merged in, whole, on the CPU, one at a time. A collective.

    Updates are added in float32 at least, and the sum is rounded once, to the base weight's dtype.

    Args:
        adapted: The model.
        kept: Gets of each merged weight 1 - |rounded update - update| / |update| (Frobenius).
    """
    model = base_model(adapted)
    layers = {f"{name}.base_layer.weight": layer for name, layer in _layers(model)}
    for name, parameter in stored_parameters(model).items():
        if ".lora_" in name:
            continue
        layer = layers.get(name)
        with gathered([parameter] if layer is None else cast("nn.Module", layer).parameters()), torch.no_grad():
            tensor = parameter.detach()
            if layer is not None:
                merged = _merged_weight(layer)
                base, tensor = tensor, merged.to(tensor.dtype)
                if kept is not None:
                    lost = (tensor - merged).norm() / (merged - base).norm().clamp(min=1e-30)
                    kept[name.replace(".base_layer.", ".")] = 1 - lost.item()
            yield name.replace(".base_layer.", "."), tensor.to("cpu", copy=True)


def check_kept(kept: Mapping[str, float], dtype: torch.dtype) -> tuple[str, float]:
    """The weight that kept least of its update, and how much.

    Raises:
        DataError: too little: the merged model would be nearly the base model again.
    """
    name, fraction = min(kept.items(), key=lambda item: item[1])
    if fraction < LEAST_KEPT:
        raise DataError(
            f"finetune.merge: rounded to {str(dtype).removeprefix('torch.')}, {name} keeps {fraction:.0%} of its "
            f"update, less than {LEAST_KEPT:.0%}; start again in this run_dir with finetune.merge=false (training goes "
            "on from its checkpoint) and use the adapter beside the base model, or train with model.dtype=float32"
        )
    return name, fraction


def _merged_weight(layer: LoraLayer) -> Tensor:
    """In float32, or the base weight's dtype if that is wider."""
    plain: Any = layer.get_base_layer()
    base: Tensor = plain.weight.detach()
    is_transposed = isinstance(plain, Conv1D)
    dtype = torch.promote_types(base.dtype, torch.float32)
    down_RD, up_OR = (_matrix(matrices).detach().to(dtype) for matrices in (layer.lora_A, layer.lora_B))
    weight = base.to(dtype) + transpose(up_OR @ down_RD, is_transposed) * layer.scaling[ADAPTER]
    if ADAPTER not in layer.lora_variant:
        return weight
    rows_OD = transpose(weight, is_transposed)
    scale_O = _matrix(layer.lora_magnitude_vector).detach().to(dtype) / rows_OD.norm(dim=1)
    return transpose(rows_OD * scale_O[:, None], is_transposed)


def _matrix(matrices: nn.ModuleDict) -> nn.Parameter:
    return cast("nn.Parameter", matrices[ADAPTER].weight)


@contextmanager
def _peft_gathers(model: nn.Module) -> Generator[None]:
    """Let peft gather the shards of a base weight that it must read (DoRA): it does so while such an object lives."""
    sharding = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}}) if is_sharded(model) else None
    try:
        yield
    finally:
        del sharding


def _let_dora_read_base_weights(adapted: PeftModel) -> None:
    """DoRA's layers need the norm of the weight inside their base layer."""
    if _is_sharded_dora(adapted):
        gather_as_one(adapted, LoraLayer)
        # ZeRO-3 takes such a module's gradients when its input has one; without it, before they are there.
        base_model(adapted).enable_input_require_grads()


def _is_sharded_dora(adapted: PeftModel) -> bool:
    config = adapted.peft_config[ADAPTER]
    return isinstance(config, LoraConfig) and config.use_dora and is_sharded(adapted)


def _layers(adapted: nn.Module) -> list[tuple[str, LoraLayer]]:
    return [(name, module) for name, module in adapted.named_modules() if isinstance(module, LoraLayer)]
