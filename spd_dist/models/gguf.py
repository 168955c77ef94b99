"""GGUF files: converted once into a cached folder of safetensors, which then loads as any checkpoint does."""

from __future__ import annotations

import copy
import fcntl
import hashlib
import importlib.util
import os
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spd_dist.errors import DataError

PACKAGE = "package:"


def find_gguf(name: str) -> Path | None:
    """The GGUF file that `name` means, or None: a path that ends in .gguf, or `package:NAME` for one in a package.

    Raises:
        DataError: the package is not installed or holds no GGUF file, or the file is missing.
    """
    if name.startswith(PACKAGE):
        return _in_package(name.removeprefix(PACKAGE))
    path = Path(name).expanduser()
    if path.suffix != ".gguf":
        return None
    if not path.is_file():
        raise DataError(f"model.name: {name} is no file; give the path of a GGUF file, a model folder or a hub name")
    return path


def _in_package(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"model.name: package:{package} is not installed; pip install -e '.[quickstart]'")
    found = sorted(path for folder in spec.submodule_search_locations for path in Path(folder).rglob("*.gguf"))
    if not found:
        raise DataError(f"model.name: package:{package} holds no .gguf file; name a package that does, or a path")
    return found[0]


def converted(gguf: Path, cache_dir: str | None) -> Path:
    """The folder with the de-quantized float32 weights and the tokenizer of `gguf`, made at the first call.

    Processes that call it at once wait for the first one.
    """
    cache = Path(cache_dir).expanduser() if cache_dir else Path.home() / ".cache" / "spd_dist"
    folder = cache / f"{gguf.stem}-{_digest(gguf)}"
    cache.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
            shutil.rmtree(unfinished, ignore_errors=True)
            _convert(gguf, unfinished)
            unfinished.rename(folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = copy.deepcopy(quantized.config)
    del config.quantization_config  # the weights are plain float32 from here on
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]
