"""A checkpoint folder as it lies on disk: where each tensor's bytes are, so that some of them can be read or rewritten.

No model is built and no file of weights is read whole.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spd_dist.errors import DataError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
OTHER_WEIGHTS = {".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".safetensors"}
"""Endings of further copies of the weights: they are left out of a folded folder, since they are not folded."""
LOADED = {".json", ".jinja", ".model", ".py", ".txt", *OTHER_WEIGHTS}
"""Endings of what a model and its tokenizer are loaded from: a README beside them changes nothing."""
WHOLE_BYTES, BLOCK_BYTES, NUM_BLOCKS = 2**20, 4096, 256
"""Larger files are told apart by blocks of them."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place in a safetensors file."""

    name: str
    file: str
    start: int
    """Of its first byte in the file."""
    dtype: str
    """As safetensors writes it."""
    shape: tuple[int, ...]

    def read(self, folder: Path) -> Tensor:
        """The tensor, from its file in `folder`."""
        dtype = DTYPES[self.dtype]
        num_bytes = math.prod(self.shape) * dtype.itemsize
        with open(folder / self.file, "rb") as file:
            file.seek(self.start)
            return torch.frombuffer(bytearray(file.read(num_bytes)), dtype=dtype).view(self.shape)

    def write_(self, folder: Path, tensor: Tensor) -> None:
        """Overwrite the tensor's bytes in its file in `folder`."""
        with open(folder / self.file, "r+b") as file:
            file.seek(self.start)
            file.write(tensor.to(DTYPES[self.dtype]).contiguous().view(torch.uint8).numpy().tobytes())


@dataclass(frozen=True)
class CheckpointFolder:
    """A folder with safetensors weights."""

    path: Path
    tensors: Mapping[str, StoredTensor]

    @property
    def files(self) -> list[str]:
        """Names of the files that hold its weights."""
        return sorted({tensor.file for tensor in self.tensors.values()})

    def find(self, parameter: str) -> StoredTensor | None:
        """The stored form of a model's parameter; some checkpoints leave out or change the first words of its name.

        Raises:
            DataError: two tensors could be meant, or its dtype is not a plain floating-point one.
        """
        words = parameter.split(".")
        for first in range(len(words)):
            suffix = ".".join(words[first:])
            if not any(word.isdigit() for word in words[first:]):
                return None
            matches = (
                [suffix] if suffix in self.tensors else [name for name in self.tensors if name.endswith("." + suffix)]
            )
            if len(matches) > 1:
                raise DataError(
                    f"--base {self.path}: {parameter} could be {' or '.join(sorted(matches))}; save the model with "
                    "save_pretrained, so that names agree"
                )
            if matches:
                return self._plain(self.tensors[matches[0]])
        return None

    def _plain(self, tensor: StoredTensor) -> StoredTensor:
        if tensor.dtype not in DTYPES:
            raise DataError(
                f"--base {self.path}: {tensor.name} is {tensor.dtype}: quantised weights cannot hold the folded values "
                "exactly; fold the unquantised checkpoint and keep these modules in 16 bits"
            )
        return tensor


def open_checkpoint(path: Path) -> CheckpointFolder:
    """The tensors of a model folder, from the headers of its safetensors files.

    Raises:
        DataError: the folder has no safetensors weights, or one that cannot be read.
    """
    if (path / INDEX).is_file():
        files = files_of(path / INDEX)
    elif (path / WEIGHTS).is_file():
        files = [WEIGHTS]
    else:
        raise DataError(
            f"--base {path} holds neither {WEIGHTS} nor {INDEX}; give a model folder with safetensors weights "
            "(model.save_pretrained writes one)"
        )
    return CheckpointFolder(path, {tensor.name: tensor for file in files for tensor in _stored(path, file)})


def _stored(path: Path, file: str) -> list[StoredTensor]:
    try:
        with open(path / file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > os.fstat(stream.fileno()).st_size:
                raise ValueError("its header is longer than the file")
            header = json.loads(stream.read(length))
        return [
            StoredTensor(name, file, 8 + length + int(entry["data_offsets"][0]), str(entry["dtype"]), _shape(entry))
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise DataError(f"--base {path}: {file} cannot be read: {error}; download the checkpoint again") from error


def _shape(entry: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(map(int, entry["shape"]))


def files_of(path: Path) -> list[str]:
    """The files that an index names: all beside it, since they are read and, for an export, written there."""
    try:
        files = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        elsewhere = [file for file in files if Path(file).name != file]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is no index of weights: {error!r}; download the checkpoint again") from error
    if elsewhere:
        raise DataError(f"{path} names {elsewhere[0]!r}, and weights lie beside their index; download the model again")
    return files


def copy_checkpoint(checkpoint: CheckpointFolder, target: Path, rewritten: set[str]) -> None:
    """Copy a folder's files: weights by hard link except those in `rewritten`, and no weights in another form."""
    for source in sorted(checkpoint.path.iterdir()):
        if not source.is_file():
            continue
        if source.name in checkpoint.files and source.name not in rewritten:
            _link(source.resolve(), target / source.name)  # the hub's cache holds links, and a link to one may break
        elif source.name in rewritten or source.suffix not in OTHER_WEIGHTS:
            shutil.copyfile(source, target / source.name)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def sampled_hash(path: Path) -> str:
    """A hash of a model's folder or file: small files whole, large ones by two blocks of each tensor.

    Training changes every tensor that it trains nearly everywhere, so two checkpoints differ in it, and of one of
    405 billion parameters it reads 10 MB.
    """
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.suffix in LOADED and file.is_file()]
    digest = hashlib.sha256()
    for file in sorted(files):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with open(file, "rb") as stream:
            for place in _sampled_places(file, size):
                stream.seek(place)
                digest.update(stream.read(BLOCK_BYTES))
    return digest.hexdigest()


def _sampled_places(file: Path, size: int) -> Sequence[int]:
    if size <= WHOLE_BYTES:
        return range(0, size, BLOCK_BYTES)
    if file.suffix == ".safetensors":
        with suppress(DataError):  # a broken header is found when the weights are loaded
            edges = sorted({size, *(tensor.start for tensor in _stored(file.parent, file.name))})
            middles = [(start + stop) // 2 for start, stop in itertools.pairwise(edges)]
            return [*range(0, edges[0], BLOCK_BYTES), *edges, *middles]
    return [size * number // NUM_BLOCKS for number in range(NUM_BLOCKS)]
