"""What a GGUF file says of itself, read before anything is done with it: each fault has a sentence of its own.

The format: magic, version, two counts, the metadata, the table of tensors, padding, and what is in them.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spd_dist.errors import DataError

MAGIC, VERSIONS = b"GGUF", (2, 3)
STRING, ARRAY = 8, 9
FORMATS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
"""Of a value, by its type."""
ALIGNMENT = 32
MAX_DIMS = 8  # more than any tensor has: a header that is none is noticed
AGAIN = "download it again, or give another file"


class StoredBlocks(NamedTuple):
    """A tensor of the file, as its table has it."""

    name: str
    num_weights: int
    quantisation: int
    start: int
    """Of its bytes, behind the header."""


@dataclass(frozen=True)
class GGUFHeader:
    """What the checks and the conversion need to know of a file."""

    architecture: str
    num_parts: int
    """Files that the model was split into."""
    tensors: tuple[StoredBlocks, ...]
    num_bytes: int
    """Of the header, up to where the tensors begin."""


class _Damaged(Exception):
    """What is there is no header, or goes on behind the end of the file."""


def check_gguf(path: Path) -> GGUFHeader:
    """The header of a file that is whole and whose tensors can be de-quantized.

    Raises:
        DataError: it is no GGUF file, of another version, cut, damaged, or of a quantisation that is not known; or the
            package that knows them is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise DataError(f"model.name: {path} is read by gguf, which is not installed; pip install gguf accelerate")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        _check_start(start, path)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                header = _Reader(data).header()
            except (_Damaged, UnicodeDecodeError, RecursionError) as error:
                raise DataError(
                    f"model.name: {path} is cut or damaged: no whole header is in its {size:,} bytes; {AGAIN}"
                ) from error
    needed = header.num_bytes + max(tensor.start + _num_bytes(tensor, path) for tensor in header.tensors)
    if size < needed:
        raise DataError(f"model.name: {path} is cut: it has {size:,} bytes, and its tensors need {needed:,}; {AGAIN}")
    return header


def _check_start(start: bytes, path: Path) -> None:
    if start[:4] != MAGIC:
        found = f"begins with {start[:4]!r}" if start else "is empty"
        raise DataError(
            f"model.name: {path} is no GGUF file: it {found}, where one begins with {MAGIC!r}; {AGAIN}, a model folder "
            "or the name of a model on the hub"
        )
    version = int.from_bytes(start[4:], "little")
    if len(start) == 8 and version not in VERSIONS:
        raise DataError(
            f"model.name: {path} is of version {version} of GGUF, and 2 and 3 are read; give a file that a newer "
            "llama.cpp has written, or the model folder that it was made of"
        )


def _num_bytes(tensor: StoredBlocks, path: Path) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # an extra, that whoever names a GGUF file has

    names = {kind.value: kind.name for kind in GGMLQuantizationType}
    if tensor.quantisation not in names or not _is_readable(GGMLQuantizationType(tensor.quantisation)):
        raise DataError(
            f"model.name: {path}: {tensor.name} is in {names.get(tensor.quantisation, f'type {tensor.quantisation}')}, "
            f"which gguf {importlib.metadata.version('gguf')} can't de-quantize; give a file of another quantisation, "
            f"such as Q4_K_M, Q8_0 or F16, or pip install -U gguf"
        )
    block, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.quantisation)]
    return tensor.num_weights // block * num_bytes


def _is_readable(quantisation: Any) -> bool:
    """Whether one block of it can be de-quantized: the package has no list."""
    from gguf import GGML_QUANT_SIZES, dequantize

    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[quantisation][1]), np.uint8), quantisation)
    except NotImplementedError:
        return False
    return True


class _Reader:
    """Reads one thing after the other."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.place = data, 8

    def header(self) -> GGUFHeader:
        num_tensors, num_values = self.number("<Q"), self.number("<Q")
        values = dict(self.named_value() for _ in range(num_values))
        tensors = tuple(self.tensor() for _ in range(num_tensors))
        alignment = values.get("general.alignment", ALIGNMENT)
        architecture, num_parts = values.get("general.architecture"), values.get("split.count", 1)
        if (
            not tensors
            or not isinstance(architecture, str)
            or not isinstance(alignment, int)
            or alignment < 1
            or not isinstance(num_parts, int)
        ):
            raise _Damaged
        return GGUFHeader(architecture, num_parts, tensors, -(-self.place // alignment) * alignment)

    def named_value(self) -> tuple[str, Any]:
        return self.string(), self.value(self.number("<I"))

    def tensor(self) -> StoredBlocks:
        name, num_dims = self.string(), self.number("<I")
        if num_dims > MAX_DIMS:
            raise _Damaged
        count = math.prod(self.number("<Q") for _ in range(num_dims))
        return StoredBlocks(name, count, self.number("<I"), self.number("<Q"))

    def number(self, form: str) -> Any:
        start = self.place
        self.skip(struct.calcsize(form))
        return struct.unpack_from(form, self.data, start)[0]

    def string(self) -> str:
        length = self.number("<Q")
        self.skip(length)
        return self.data[self.place - length : self.place].decode("utf-8")

    def skip(self, num_bytes: int) -> None:
        self.place += num_bytes
        if self.place > len(self.data):
            raise _Damaged

    def value(self, kind: int) -> Any:
        """A value; of an array nothing is kept."""
        if kind == STRING:
            return self.string()
        if kind in FORMATS:
            return self.number(FORMATS[kind])
        if kind != ARRAY:
            raise _Damaged
        inner, length = self.number("<I"), self.number("<Q")
        if inner in FORMATS:
            self.skip(length * struct.calcsize(FORMATS[inner]))
            return None
        for _ in range(length):  # each takes 8 bytes or more, so that a wrong length ends with the file
            self.value(inner)
        return None
