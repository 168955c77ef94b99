"""Write a projection as a LoRA adapter: op(W) = W + (F w) (F' W), so the base model's files stay as they are.

Shapes: D width of a site, I input features, O output features, R columns of all operators of a module.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from spd_dist.errors import ConfigError
from spd_dist.models.checkpoint_files import open_checkpoint
from spd_dist.projection.folded_export import Exported, Rewrite, new_folder, plan_rewrites, write_record
from spd_dist.projection.operators import as_update
from spd_dist.projection.parity import check_parity, load_float32
from spd_dist.types import Projection

MAX_RANK = 512
"""Of what engines serve."""
LATENT = "kv_b_proj"


def export_adapter(base: Path, projection: Projection, out: Path, *, check: bool = True) -> Exported:
    """Write to `out` a PEFT adapter that turns the model folder `base` into the projected policy.

    All modules get one rank, the largest that one needs, and alpha = rank: some engines know no rank per module.

    Raises:
        ConfigError: a bias, latent attention, or more than 512 directions change; `--form folded` covers the first two.
        DataError: a base that cannot be read, or logits that differ.
    """
    checkpoint = open_checkpoint(base)
    rewrites = plan_rewrites(checkpoint, projection)
    _refuse(rewrites)
    pairs = {rewrite.target.name: _factors(rewrite, base) for rewrite in rewrites}
    rank = max((down_RI.shape[0] for down_RI, _ in pairs.values()), default=0)
    if not 1 <= rank <= MAX_RANK:
        raise ConfigError(
            f"--form adapter: the projection changes {rank} directions of a module, and an adapter holds 1 to "
            f"{MAX_RANK}; write --form folded"
        )
    with new_folder(out) as folder:
        _write(folder, base, pairs, rank)
        load = partial(_load_adapter, base, folder)
        parity = check_parity(base, projection, load, torch.float32) if check else None
        write_record(folder, checkpoint, projection, rewrites, {"form": "adapter", "rank": rank, "parity": parity})
    return Exported(out, tuple(rewrite.tensor.name for rewrite in rewrites), parity)


def _refuse(rewrites: list[Rewrite]) -> None:
    for rewrite in rewrites:
        name = rewrite.target.name
        if len(rewrite.tensor.shape) == 1:
            raise ConfigError(
                f"--form adapter: {name} has a bias, which an adapter does not change; write --form folded"
            )
        if name.rpartition(".")[2] == LATENT:
            raise ConfigError(
                f"--form adapter: engines absorb {name} into latent attention, adapter left out; write --form folded"
            )


def _factors(rewrite: Rewrite, base: Path) -> tuple[Tensor, Tensor]:
    """`down_RI` = F' W and `up_OR` = F w at the sites' columns: float64 inside, float32 on disk."""
    weight_OI = rewrite.tensor.read(base).double()
    downs, ups = [], []
    for part in rewrite.target.parts:
        update = as_update(part.apply.operator)
        factor_DR = update.factor_DR.double()
        downs.append(factor_DR.T @ part.columns.read(weight_OI.T).T)
        up_RO = torch.zeros(factor_DR.shape[1], len(weight_OI), dtype=torch.float64)
        part.columns.write_(up_RO, (factor_DR * update.weight_R).T)
        ups.append(up_RO.T)
    return torch.cat(downs).float(), torch.cat(ups, 1).float()


def _write(folder: Path, base: Path, pairs: dict[str, tuple[Tensor, Tensor]], rank: int) -> None:
    tensors = {}
    for name, (down_RI, up_OR) in pairs.items():
        missing = rank - len(down_RI)
        tensors[f"base_model.model.{name}.lora_A.weight"] = nn.functional.pad(down_RI, (0, 0, 0, missing)).contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = nn.functional.pad(up_OR, (0, missing)).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        target_modules=sorted(pairs),
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base),
        inference_mode=True,
    )
    config.save_pretrained(str(folder))


def _load_adapter(base: Path, folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(load_float32(base), folder).eval()
