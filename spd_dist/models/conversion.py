"""From a GGUF file to a folder of float32 safetensors, and whether such a folder is whole.

Nothing here asks which rank it runs on: `save_pretrained` writes weights on rank 0 of torch.distributed only, and any
rank may be the one that converts. So transformers reads, and what is written is written here, then read back. It is
given the file's whole path and not its name: of that name it would take one in the working directory.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import math
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub import save_torch_state_dict
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from spd_dist.errors import DataError
from spd_dist.models.checkpoint_files import DTYPES, INDEX, WEIGHTS, CheckpointFolder, open_checkpoint
from spd_dist.models.gguf_header import GGUFHeader
from spd_dist.models.model_stats import FOREIGN_FAULTS, first_line, meta_model
from spd_dist.models.save_weights import stored_parameters

log = logging.getLogger(__name__)

SHARD_BYTES = 4 * 2**30
NEEDED = ("config.json", "tokenizer.json", "tokenizer_config.json")
MADE_OF = "give the model folder or hub name that it was made of"


def read_settings(gguf: Path, header: GGUFHeader) -> PretrainedConfig:
    """The configuration of the model of a GGUF file.

    Raises:
        DataError: transformers does not read this architecture.
    """
    with _reading(gguf, header):
        return AutoConfig.from_pretrained(str(gguf.parent), gguf_file=str(gguf))


def read_gguf(
    gguf: Path, header: GGUFHeader, settings: PretrainedConfig
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a GGUF file, de-quantized to float32, and its tokenizer.

    Raises:
        DataError: transformers can't read it, or the file lacks some of its weights.
    """
    with _reading(gguf, header):
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=str(gguf))
        # With output_loading_info it gives two things, which its type does not say.
        read: Any = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent), gguf_file=str(gguf), config=settings, dtype=torch.float32, output_loading_info=True
        )
        model, found = read
    lacking = sorted([*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])])
    if lacking:
        parts = f"it is one of {header.num_parts} parts: join them (llama-gguf-split --merge)"
        raise DataError(
            f"model.name: {gguf} lacks {len(lacking)} tensors of a {settings.model_type} model, as {lacking[0]}; "
            f"{parts if header.num_parts > 1 else MADE_OF}"
        )
    num_read = sum(parameter.numel() for parameter in stored_parameters(model).values())
    num_unused = sum(tensor.num_weights for tensor in header.tensors) - num_read
    if num_unused > 0:
        log.warning("%s: %d of its numbers have no place in transformers' %s", gguf, num_unused, type(model).__name__)
    return model, tokenizer


@contextlib.contextmanager
def _reading(gguf: Path, header: GGUFHeader) -> Generator[None]:
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the bars of libraries; what they log has its own way
            yield
    except (*FOREIGN_FAULTS, OSError, ImportError) as error:
        raise DataError(
            f"model.name: {gguf}: transformers {transformers.__version__} can't read it as a causal language model of "
            f"architecture {header.architecture!r} ({first_line(error)}); {MADE_OF}, or pip install -U transformers "
            "gguf accelerate"
        ) from error


def write_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a model of float32 into an empty folder, as transformers loads it.

    Raises:
        OSError, SafetensorError: the disk is full or may not be written.
    """
    # What fails inside of tokenizers has no type of its own, so that a full disk is met here.
    fast = cast("PreTrainedTokenizerFast", tokenizer)  # GGUF files give no other
    (folder / "tokenizer.json").write_text(fast.backend_tokenizer.to_str(), encoding="utf-8")
    tokenizer.save_pretrained(folder)
    config: Any = copy.deepcopy(model.config)
    if "quantization_config" in vars(config):
        del config.quantization_config  # the weights are plain float32 from here on
    config.architectures, config.dtype = [type(model).__name__], torch.float32
    config.save_pretrained(folder)
    if model.generation_config is not None:  # pyright: ignore[reportUnnecessaryComparison]  # of classes that can't
        model.generation_config.save_pretrained(folder)
    weights = {name: tensor.detach() for name, tensor in stored_parameters(model).items()}
    save_torch_state_dict(weights, folder, max_shard_size=shard_bytes)
    mode = (folder / "config.json").stat().st_mode
    for file in folder.iterdir():
        if file.stat().st_mode != mode:
            file.chmod(mode)  # safetensors lets nobody else read its files
        _sync(file)
    _sync(folder)


def check_written(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Read back what was written: files, and names, dtypes and shapes of all tensors as the model has them.

    That is asked twice: of the model that was read, and of the one that the written config describes.

    Raises:
        DataError: something is not as it was given to be written.
    """
    problem = why_incomplete(folder)
    if problem is not None:
        raise _not_as_written(folder, problem)
    found = {name: (tensor.dtype, tensor.shape) for name, tensor in open_checkpoint(folder).tensors.items()}
    config = AutoConfig.from_pretrained(folder)
    for wanted in (model, meta_model(config, torch.float32)):
        expected = {name: ("F32", tuple(tensor.shape)) for name, tensor in stored_parameters(wanted).items()}
        different = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        if different:
            name = different[0]
            raise _not_as_written(folder, f"{name} is {found.get(name)}, and not {expected.get(name)}")
    if AutoTokenizer.from_pretrained(folder).get_vocab() != tokenizer.get_vocab():
        raise _not_as_written(folder, "the tokenizer has other tokens")


def _not_as_written(folder: Path, problem: str) -> DataError:
    return DataError(
        f"model.cache_dir: {folder} does not hold what was written ({problem}); set model.cache_dir=FOLDER on another "
        "disk, or report this with the name of the GGUF file"
    )


def why_incomplete(folder: Path) -> str | None:
    """What a converted folder lacks, or None: told from lengths and headers, in no time."""
    if not os.path.isdir(folder):  # nor where this user may not look, which `Path.is_dir` raises
        return "it is not there"
    empty = [name for name in NEEDED if not os.path.isfile(folder / name) or os.path.getsize(folder / name) == 0]
    if empty:
        return f"it holds no {empty[0]}"
    if not ((folder / WEIGHTS).is_file() or (folder / INDEX).is_file()):
        return "it holds no weights"
    try:
        checkpoint = open_checkpoint(folder)
        lacking = _indexed(folder) - checkpoint.tensors.keys()
        ends = _ends(checkpoint)
    except (DataError, OSError, KeyError, TypeError, ValueError) as error:
        return f"its weights cannot be read ({first_line(error)})"
    if lacking:
        return f"its weights lack {min(lacking)}"
    lengths = {file: (folder / file).stat().st_size for file in checkpoint.files}
    cut = [f"{file} has {lengths[file]:,} bytes, not {end:,}" for file, end in ends.items() if lengths[file] != end]
    return cut[0] if cut else None


def _ends(checkpoint: CheckpointFolder) -> dict[str, int]:
    """How long each file of weights is by its own header."""
    ends: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        num_bytes = DTYPES[tensor.dtype].itemsize * math.prod(tensor.shape)
        ends[tensor.file] = max(ends.get(tensor.file, 0), tensor.start + num_bytes)
    return ends


def _indexed(folder: Path) -> set[str]:
    if not (folder / INDEX).is_file():
        return set()
    return set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"])


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
