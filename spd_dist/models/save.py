"""Write trained weights from whole or sharded models: gathered one by one, written by rank 0, as transformers reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

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


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    world: World,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write `model` as sharded safetensors with its configuration and tokenizer. A collective.

    Raises:
        DataError: the disk is full or may not be written.
    """
    names = model.state_dict().keys()
    buffers = {
        name: nn.Parameter(buffer, requires_grad=False) for name, buffer in model.named_buffers() if name in names
    }
    writer = ShardWriter(folder, shard_bytes) if world.is_main else None
    for name, tensor in whole_tensors(dict(model.named_parameters()) | buffers):
        if writer is not None:
            writer.add(name, tensor)
    with together("saving the model"):
        if writer is not None:
            writer.finish()
            model.config.save_pretrained(folder)
            model.generation_config.save_pretrained(folder)
            tokenizer.save_pretrained(folder)


class ShardWriter:
    """Collects tensors up to `shard_bytes`, then writes them. The first failure is kept for `finish`.

    It must not be raised before: the other ranks are waiting for this one to take part in the next gather.
    """

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.held: dict[str, Tensor] = {}
        self.shards: list[list[str]] = []
        self.total_bytes = 0
        self.failure: Exception | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor."""
        if self.held and sum(map(_num_bytes, self.held.values())) + _num_bytes(tensor) > self.shard_bytes:
            self._write()
        self.held[name] = tensor.contiguous()

    def finish(self) -> None:
        """Write what is held and the index.

        Raises:
            DataError: a shard could not be written.
        """
        self._write()
        if self.failure is not None:
            raise DataError(
                f"{self.folder} cannot be written: {self.failure}; make room and start the same command again"
            )
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
                self.folder.mkdir(parents=True, exist_ok=True)
                save_file(self.held, self._part(len(self.shards)), {"format": "pt"})
            except (OSError, SafetensorError) as error:
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
