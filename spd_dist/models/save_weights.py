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

from spd_dist.distributed.collectives import together
from spd_dist.distributed.world import World
from spd_dist.distributed.zero import gathered
from spd_dist.errors import DataError

SHARD_BYTES = 4 * 2**30
INDEX = "model.safetensors.index.json"


def whole_tensors(parameters: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
    """Each parameter whole, on the CPU, on every rank; gathered one at a time, so that one at a time is in memory."""
    for name, parameter in parameters.items():
        with gathered([parameter]):
            yield name, parameter.detach().to("cpu", copy=True)


def stored_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
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
    writer = ShardWriter(folder, shard_bytes)
    for name, tensor in tensors:  # each gathered by all ranks, and kept by one
        if world.is_main:
            writer.add(name, tensor)
    with together("saving the model"):
        if world.is_main:
            writer.finish()
            model.config.save_pretrained(folder)
            if model.generation_config is not None:
                model.generation_config.save_pretrained(folder)


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
    """Collects tensors up to `shard_bytes`, then writes them. The first failure is kept for `finish`.

    It must not be raised before: the other ranks are waiting for this one to take part in the next gather.
    """

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.held: dict[str, Tensor] = {}
        self.shards: list[list[str]] = []
        self.total_bytes = 0
        self.failure: DataError | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor."""
        if self.held and sum(map(_num_bytes, self.held.values())) + _num_bytes(tensor) > self.shard_bytes:
            self._write()
        self.held[name] = tensor

    def finish(self) -> None:
        """Write what is held and the index.

        Raises:
            DataError: a shard could not be written.
        """
        self._write()
        if self.failure is not None:
            raise self.failure
        count = len(self.shards)
        weight_map = {}
        for number, names in enumerate(self.shards, 1):
            final = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self.folder / final)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _write(self) -> None:
        if self.failure is None and self.held:
            self.shards.append(list(self.held))
            self.total_bytes += sum(map(_num_bytes, self.held.values()))
            try:
                save_tensors(self.held, self._part(len(self.shards)))
            except DataError as error:
                self.failure = error
        self.held = {}

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
