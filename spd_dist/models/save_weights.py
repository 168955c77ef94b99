"""Write trained weights of whole or sharded models: gathered one by one, written by rank 0, as transformers reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from spd_dist.distributed.uneven_work import on_main
from spd_dist.distributed.world import World
from spd_dist.distributed.zero import gathered
from spd_dist.errors import DataError

SHARD_BYTES = 4 * 2**30
INDEX = "model.safetensors.index.json"


def whole_tensors(parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Each parameter whole, on the CPU, on every rank; gathered one at a time, so that one at a time is in memory."""
    for name, parameter in parameters.items():
        with gathered([parameter]):
            yield name, parameter.detach().to("cpu", copy=True)


def stored_parameters(model: PreTrainedModel) -> dict[str, Tensor]:
    """The parameters and buffers that a checkpoint holds, by name; tied ones once."""
    names = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in names}
    return {**dict(model.named_parameters()), **buffers}


def save_model(
    model: PreTrainedModel,
    tensors: Iterable[tuple[str, Tensor]],
    folder: Path,
    *,
    world: World,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `tensors` as sharded safetensors, with the configuration of `model`. A collective.

    Raises:
        DataError: the disk is full or may not be written.
    """
    writer = ShardWriter(folder, shard_bytes, holds=world.is_main)
    for name, tensor in tensors:  # each gathered by all ranks, and kept by one
        writer.add(name, tensor)

    def finish() -> None:
        writer.finish()
        model.config.save_pretrained(folder)
        if model.generation_config is not None:  # pyright: ignore[reportUnnecessaryComparison]  # of remote code
            model.generation_config.save_pretrained(folder)

    writer.flush()
    on_main("saving the model", finish)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write one safetensors file that transformers and peft read.

    Raises:
        DataError: the disk is full or may not be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be written: {error}; make room and start the same command again") from error


class ShardWriter:
    """Collects tensors up to `shard_bytes`, which rank 0 then writes: all ranks know when, and wait for it."""

    def __init__(self, folder: Path, shard_bytes: int, *, holds: bool) -> None:
        """`holds` on the rank that writes; the others count."""
        self.folder, self.shard_bytes, self.holds = folder, shard_bytes, holds
        self.held: dict[str, Tensor] = {}
        self.num_held_bytes = 0
        self.shards: list[list[str]] = []
        self.total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor. A collective, in which a shard may be written.

        Raises:
            DataError: on all ranks, the disk is full or may not be written.
        """
        if self.num_held_bytes and self.num_held_bytes + _num_bytes(tensor) > self.shard_bytes:
            self.flush()
        self.num_held_bytes += _num_bytes(tensor)
        if self.holds:
            self.held[name] = tensor

    def flush(self) -> None:
        """Write what is held as a shard. A collective, with the errors of `add`."""
        number = len(self.shards) + 1
        on_main("saving weights", lambda: save_tensors(self.held, self._part(number)))
        self.shards.append(list(self.held))
        self.total_bytes += self.num_held_bytes
        self.held, self.num_held_bytes = {}, 0

    def finish(self) -> None:
        """Name the shards as transformers does, and write their index."""
        count = len(self.shards)
        weight_map = {}
        for number, names in enumerate(self.shards, 1):
            final = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.safetensors"


def load_saved_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of `folder`, as a user of plain transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@torch.no_grad()
def probe_logits(model: nn.Module, tokens: tuple[int, ...], device: torch.device) -> Tensor:
    """The logits after each of `tokens`, in float32 on the CPU: to compare a model with what was saved of it."""
    training = model.training
    model.eval()
    logits = model(input_ids=torch.tensor([tokens], device=device), use_cache=False).logits
    model.train(training)
    return logits[0].float().cpu()
