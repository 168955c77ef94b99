"""Whether a policy can be loaded on this host, without loading its weights."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download
from transformers import AutoConfig

from spd_dist.config import Model
from spd_dist.errors import DataError
from spd_dist.models.gguf import find_gguf
from spd_dist.models.gguf_header import check_gguf

WEIGHTS = ("*.safetensors", "*.bin")


class Reachable(NamedTuple):
    """What a policy is, and where its weights are."""

    architecture: str
    num_bytes: int
    """Of the weights on disk; 0 if they are on the hub only."""
    where: str


def find_model(config: Model) -> Reachable:
    """The policy of `config`, as this host sees it.

    Raises:
        DataError: it has no weights here and none on the hub, or its configuration can't be read, or it is a GGUF file
            that is not whole.
    """
    gguf = find_gguf(config.name)
    if gguf is not None:
        check_gguf(gguf)
        return Reachable("GGUF", gguf.stat().st_size, str(gguf))
    folder = Path(config.name).expanduser()
    if not folder.is_dir():
        folder = _in_cache(config)
    if folder is None:
        return Reachable(_architecture(config.name, config), 0, "the hub, to be downloaded")
    files = [file for pattern in WEIGHTS for file in folder.glob(pattern)]
    if not files:
        raise DataError(f"model.name: {folder} holds no weights ({' or '.join(WEIGHTS)})")
    return Reachable(_architecture(str(folder), config), sum(file.stat().st_size for file in files), str(folder))


def _in_cache(config: Model) -> Path | None:
    try:
        wanted = {"revision": config.revision, "allow_patterns": [*WEIGHTS, "*.json"]}
        return Path(snapshot_download(config.name, local_files_only=True, **wanted))
    except (OSError, ValueError):  # not there, or not even a name of the hub
        return None


def _architecture(source: str, config: Model) -> str:
    try:
        found = AutoConfig.from_pretrained(source, revision=config.revision, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise DataError(
            f"model.name: {source} is no folder here, not in this host's cache and not to be had from the hub "
            f"({str(error).splitlines()[0]}); download it where there is a network, with HF_HOME on a shared disk"
        ) from error
    return (found.architectures or [type(found).__name__])[0]
