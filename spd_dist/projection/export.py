"""Write a projected policy that any engine loads: a folded checkpoint, streamed from the base model's files, or a LoRA
adapter, op(W) = W + (F w) (F' W), so that the base model's files stay as they are.

Shapes: D width of a site, I input features, O output features, R columns of all operators of a module.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from spd_dist.errors import ConfigError, DataError
from spd_dist.models.checkpoint_files import (
    DTYPES,
    CheckpointFolder,
    StoredTensor,
    copy_checkpoint,
    open_checkpoint,
)
from spd_dist.projection.fold import check_fold_kept, fold_, fold_plan
from spd_dist.projection.operators import (
    Target,
    as_update,
    check_projection,
    parts_by_module,
    projection_hash,
    targets,
)
from spd_dist.projection.parity import Parity, check_parity, load_float32
from spd_dist.types import Projection

RECORD = "spd_fold.json"
MAX_RANK = 512
"""Of what engines serve."""
LATENT = "kv_b_proj"


@dataclass(frozen=True)
class Rewrite:
    """A stored tensor that a target's output is linear in."""

    target: Target
    tensor: StoredTensor
    dim: int
    """Of the output features."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    tensors: tuple[str, ...]
    parity: Parity | None
    """None: it was not asked for."""


def export_folded(base: Path, projection: Projection, out: Path, *, check: bool = True) -> Exported:
    """Write to `out` the model folder `base` with `projection` in its weights.

    Only the tensors of the sites are read and rewritten, in float64 and rounded once; other weights are hard-linked or
    copied. The model is built only for the `check`: logits against the hooked base, in float32.

    Raises:
        DataError: a folder that cannot be folded or written, or logits that differ.
        ConfigError: a fold that would not be exact.
    """
    checkpoint = open_checkpoint(base)
    rewrites = plan_rewrites(checkpoint, projection)
    with new_folder(out) as folder:
        copy_checkpoint(checkpoint, folder, {rewrite.tensor.file for rewrite in rewrites})
        for rewrite in rewrites:
            weight = rewrite.tensor.read(base)
            check_fold_kept(weight, rewrite.dim, rewrite.target.parts)
            fold_(weight, rewrite.dim, rewrite.target.parts)
            rewrite.tensor.write_(folder, weight)
        parity = (
            check_parity(base, projection, partial(load_float32, folder), stored_dtype(rewrites)) if check else None
        )
        write_record(folder, checkpoint, projection, rewrites, {"form": "folded", "parity": parity})
    return Exported(out, tuple(rewrite.tensor.name for rewrite in rewrites), parity)


def plan_rewrites(checkpoint: CheckpointFolder, projection: Projection) -> list[Rewrite]:
    """The stored tensors that the projection changes, found on a model without weights.

    Raises:
        DataError: a tensor is missing, quantised or of another shape; or the folder is folded already.
        ConfigError: a fold that would not be exact.
    """
    if (checkpoint.path / RECORD).is_file():
        raise DataError(f"--base {checkpoint.path} is folded already ({RECORD}); give the untouched model")
    check_projection(projection)
    model = _without_weights(checkpoint.path)
    found = targets(model, parts_by_module(projection.operators))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rewrites = []
    for target, outputs in zip(found, fold_plan(model, found, projection.insertion), strict=True):
        for parameter, dim in outputs:
            name = names[id(parameter)]
            tensor = checkpoint.find(name)
            if tensor is None or tensor.shape != tuple(parameter.shape):
                stored = f"is {tensor.shape}" if tensor else "is missing"
                raise DataError(
                    f"--base {checkpoint.path}: {name} must be {tuple(parameter.shape)} and {stored}: the weights are "
                    "quantised, or stored in another form than the model's; save it unquantised with save_pretrained"
                )
            rewrites.append(Rewrite(target, tensor, dim))
    return rewrites


def _without_weights(base: Path) -> nn.Module:
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"--base {base}: config.json does not describe a causal LM: {error}") from error


def stored_dtype(rewrites: list[Rewrite]) -> torch.dtype:
    """The coarsest dtype among the rewritten tensors."""
    dtypes = {DTYPES[rewrite.tensor.dtype] for rewrite in rewrites}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


@contextmanager
def new_folder(out: Path) -> Generator[Path]:
    """A folder beside `out` that takes its name when the body is done, and is removed if it fails.

    Raises:
        ConfigError: `out` exists.
    """
    if out.exists():
        raise ConfigError(f"--out {out} exists; give a new folder, or remove it")
    partial_folder = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir(parents=True)
    try:
        yield partial_folder
        partial_folder.rename(out)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)


def write_record(
    folder: Path, checkpoint: CheckpointFolder, projection: Projection, rewrites: list[Rewrite], facts: dict[str, Any]
) -> None:
    """Write `spd_fold.json`: what was made from what, so that nobody has to guess or folds twice."""
    tensors: dict[str, list[str]] = {}
    for rewrite in rewrites:
        tensors.setdefault(rewrite.target.name, []).append(rewrite.tensor.name)
    parity = facts["parity"]
    record = facts | {
        "parity": None if parity is None else parity._asdict(),
        "definition": {"linear": "linear_output", "head": "linear_output_per_head", "rope": "linear_output"}[
            projection.insertion
        ],
        "base": str(checkpoint.path),
        "base_sha256": {file: _sha256(checkpoint.path / file) for file in checkpoint.files},
        "projection_sha256": projection_hash(projection),
        "dtype": str(stored_dtype(rewrites)).removeprefix("torch."),
        "slots": [asdict(site) | {"tensors": tensors[site.module]} for site in sorted(projection.operators)],
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def export_adapter(base: Path, projection: Projection, out: Path, *, check: bool = True) -> Exported:
    """Write to `out` a PEFT adapter that turns the model folder `base` into the projected policy.

    All modules get one rank, the largest that one needs, and alpha = rank: some engines know no rank per module.

    Raises:
        ConfigError: a bias, latent attention, or more than 512 directions change; `--form folded` covers the first two.
        DataError: a base that cannot be read, or logits that differ.
    """
    checkpoint = open_checkpoint(base)
    rewrites = plan_rewrites(checkpoint, projection)
    _refuse_as_adapter(rewrites)
    pairs = {rewrite.target.name: _adapter_factors(rewrite, base) for rewrite in rewrites}
    rank = max((down_RI.shape[0] for down_RI, _ in pairs.values()), default=0)
    if not 1 <= rank <= MAX_RANK:
        raise ConfigError(
            f"--form adapter: the projection changes {rank} directions of a module, and an adapter holds 1 to "
            f"{MAX_RANK}; write --form folded"
        )
    with new_folder(out) as folder:
        _write_adapter(folder, base, pairs, rank)
        load = partial(_load_adapter, base, folder)
        parity = check_parity(base, projection, load, torch.float32) if check else None
        write_record(folder, checkpoint, projection, rewrites, {"form": "adapter", "rank": rank, "parity": parity})
    return Exported(out, tuple(rewrite.tensor.name for rewrite in rewrites), parity)


def _refuse_as_adapter(rewrites: list[Rewrite]) -> None:
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


def _adapter_factors(rewrite: Rewrite, base: Path) -> tuple[Tensor, Tensor]:
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


def _write_adapter(folder: Path, base: Path, pairs: dict[str, tuple[Tensor, Tensor]], rank: int) -> None:
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
