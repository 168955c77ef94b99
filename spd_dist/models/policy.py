"""Load a policy: any Hugging Face causal LM by hub name, folder or GGUF file; under ZeRO-3 its weights load sharded."""

from __future__ import annotations

import dataclasses
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # pyright: ignore[reportPrivateImportUsage]  # httpx's
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from spd_dist.config import Distributed, Model
from spd_dist.distributed.collectives import gather_objects, together
from spd_dist.distributed.uneven_work import wait_for_all_ranks
from spd_dist.distributed.world import World
from spd_dist.distributed.zero import DeepSpeedEngine, end_engine, frozen_engine, sharding_settings, weights_fingerprint
from spd_dist.errors import DataError, named_path
from spd_dist.models.checkpoint_files import files_of
from spd_dist.models.gguf import converted, find_gguf, is_gguf
from spd_dist.models.gguf_header import check_gguf
from spd_dist.models.lora import keep_codes_, load_adapter, quantised
from spd_dist.models.model_stats import in_a_line, is_of_files

WEIGHTS = ("*.safetensors", "*.bin")


class Reachable(NamedTuple):
    """What a policy is, and where its weights are."""

    architecture: str
    num_bytes: int
    """Of the weights on disk; 0 if they are on the hub only."""
    where: str


def locate_model(config: Model) -> Reachable:
    """The policy of `config`, as this host sees it.

    Raises:
        DataError: no weights here and none on the hub, a configuration that can't be read, or a cut GGUF file.
    """
    gguf = find_gguf(config.name)
    if gguf is not None:
        check_gguf(gguf)
        return Reachable("GGUF", gguf.stat().st_size, str(gguf))
    named = named_path(config.name)
    folder = named if named.is_dir() else _in_cache(config)
    if folder is None:
        return Reachable(_architecture(config.name, config), 0, "the hub, to be downloaded")
    files = [file for pattern in WEIGHTS for file in folder.glob(pattern)]
    if not files:
        raise DataError(f"model.name: {folder} holds no weights ({' or '.join(WEIGHTS)})")
    return Reachable(_architecture(str(folder), config), sum(file.stat().st_size for file in files), str(folder))


def _in_cache(config: Model) -> Path | None:
    try:
        kinds = [*WEIGHTS, "*.json"]
        found = snapshot_download(config.name, local_files_only=True, revision=config.revision, allow_patterns=kinds)
        return Path(found)
    except (OSError, ValueError):  # not there, or not even a name of the hub
        return None


def _ask_hub(config: Model) -> None:
    """See that the hub has the model; without a network its own library asks six times, for 23 s."""
    try:
        get_hf_file_metadata(hf_hub_url(config.name, "config.json", revision=config.revision))
    except HTTPError as error:
        if not isinstance(error, HfHubHTTPError) or error.response.status_code in (401, 403, 404):
            raise OSError(f"{config.name}: {error}") from error  # the hub's other answers are worth asking again


def _architecture(source: str, config: Model) -> str:
    try:
        found = _read(AutoConfig, source, config)
    except DataError as error:
        raise DataError(
            f"model.name: {source} is no folder here, not in this host's cache and not to be had from the hub "
            f"({str(error.__cause__ or error).splitlines()[0]}); download it online, with HF_HOME on a shared disk"
        ) from error.__cause__
    return (found.architectures or [type(found).__name__])[0]


@dataclass
class Policy:
    """A model that answers, and what its tokens mean."""

    model: PreTrainedModel
    """The module to call. Where it is sharded, every rank calls it the same number of times, in the same order."""
    tokenizer: PreTrainedTokenizerFast
    engine: DeepSpeedEngine | None
    """Holds the shards of `model`; None if every rank has all of it."""
    name: str
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    fingerprint: str
    """Of the weights as they were loaded: the same at every world size and sharding."""
    origin: Model | None = None
    """What another program loads the same weights from: a folder or a name of the hub, with its revision."""
    adapter: Path | None = None
    """The folder of the LoRA adapter beside the weights, if there is one."""

    def release(self) -> None:
        """Take ZeRO's hooks off the module; its parameters stay sharded, ready for another engine."""
        if self.engine is not None:
            end_engine(self.engine)
            self.engine = None


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on an accelerator and float32 on the CPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def load_policy(config: Model, distributed: Distributed, world: World) -> Policy:
    """The policy of `config`, frozen and in eval mode: sharded by ZeRO-3 if `distributed.zero_stage` is 3, else whole.

    Raises:
        DataError: no such model, or one whose files can't be read.
    """
    source = prepare_model(config)
    with together("reading the model's configuration"):
        settings, tokenizer = (_read(kind, source, config) for kind in (AutoConfig, AutoTokenizer))
        dtype = resolve_dtype(config.dtype, world.device)
        options: dict[str, Any] = {"config": settings, "dtype": dtype}
        if (stored := quantised(config, dtype)) is not None:
            options |= {"quantization_config": stored, "device_map": {"": world.device}}
    sharded = distributed.zero_stage == 3
    # transformers keeps a weak reference: while this object lives, from_pretrained loads into ZeRO-3 shards.
    sharding = HfDeepSpeedConfig(sharding_settings(distributed, dtype)) if sharded else None
    options |= {} if config.attention == "auto" else {"attn_implementation": config.attention}
    model = load_model(config, source, options, None if sharded else world.device)
    del sharding
    keep_codes_(model.eval().requires_grad_(False))
    engine = frozen_engine(model, distributed, dtype) if sharded else None
    eos = eos_token_ids(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos[0]
    origin = dataclasses.replace(config, name=source)
    return Policy(model, tokenizer, engine, config.name, eos, pad, weights_fingerprint(model), origin)


def load_model(config: Model, source: str, options: dict[str, Any], device: torch.device | None) -> PreTrainedModel:
    """The model of `source` on a device, tensor by tensor: its host never holds it. Without a device, in shards."""
    if device is not None and device.type != "cpu":  # peft takes a map to the CPU for layers that wait on the host
        options = {"device_map": {"": device}, **options}
    return _read(AutoModelForCausalLM, source, config, options)


def prepare_model(config: Model) -> str:
    """What transformers loads for `model.name`: a GGUF file is converted if it never was, a model of the hub fetched.

    A collective. One rank a host asks the hub, and none of them if the host's cache has the model. Hosts may take
    unlike times for it, and none waits in a collective meanwhile.

    Raises:
        DataError: a GGUF file that can't be converted, or a cache not written; the hub has no such model, or is silent.
    """
    if is_gguf(config.name):
        with wait_for_all_ranks("converting the model"):
            return _local_source(config)
    if not Path(config.name).exists():
        hosts = gather_objects(socket.gethostname())
        is_first = not dist.is_initialized() or hosts.index(socket.gethostname()) == dist.get_rank()
        with wait_for_all_ranks("fetching the model"):
            if is_first and not _is_cached(config):
                _fetch(config)
        _fetched.add((config.name, config.revision))
    return config.name


_fetched: set[tuple[str, str | None]] = set()
"""Models of the hub that this host has: read from its cache, with no question to the hub."""
BESIDE_WEIGHTS = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken")


def _is_cached(config: Model) -> bool:
    """Whether the cache holds weights, all of those that their index names."""
    folder = _in_cache(config)
    if folder is None or not (folder / "config.json").exists():
        return False
    indices = [*folder.glob("*.index.json")]
    named = {name for file in indices for name in files_of(file)}
    return all((folder / name).exists() for name in named) and any(next(folder.glob(kind), None) for kind in WEIGHTS)


def _fetch(config: Model) -> None:
    try:
        _ask_hub(config)
        names = HfApi().list_repo_files(config.name, revision=config.revision)
        weights = WEIGHTS[:1] if any(name.endswith(".safetensors") for name in names) else WEIGHTS
        snapshot_download(config.name, revision=config.revision, allow_patterns=[*weights, *BESIDE_WEIGHTS])
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"model.name: {config.name} is no folder here, not whole in this host's cache and not to be had from the "
            f"hub ({reason}); correct it, or download it where there is a network, with HF_HOME on a shared disk"
        ) from error


def load_replica(config: Model, distributed: Distributed, world: World, *, adapter: Path | None = None) -> Policy:
    """The policy of `config` whole on every rank, with a LoRA adapter beside its weights if one is given.

    It is never merged: bfloat16 weights would round most of an update away (`docs/precision.md`).

    Raises:
        DataError: no such model or adapter.
    """
    policy = load_policy(config, dataclasses.replace(distributed, zero_stage=0), world)
    if adapter is not None:
        with together("loading the adapter"):
            load_adapter(policy.model, adapter)
        policy.model.requires_grad_(False)
        policy.adapter = adapter
    return policy


def load_adapted(config: Model, distributed: Distributed, world: World, *, adapter: Path) -> Policy:
    """The policy of `config` sharded, with a LoRA adapter beside its weights: for models that no rank holds whole.

    Raises:
        DataError: no such model or adapter.
    """
    policy = load_policy(config, distributed, world)
    policy.release()
    with together("loading the adapter"):
        load_adapter(policy.model, adapter)
    policy.engine = frozen_engine(policy.model, distributed, policy.model.dtype)
    policy.adapter = adapter
    return policy


def load_settings(config: Model) -> PretrainedConfig:
    """The model's own configuration alone: of a hub name, a folder, a GGUF file, or a config.json.

    Raises:
        DataError: no such model.
    """
    return _read(AutoConfig, _local_source(config), config)


def load_tokenizer(config: Model) -> PreTrainedTokenizerFast:
    """The policy's tokenizer alone.

    Raises:
        DataError: no such model, or one without a tokenizer.
    """
    return _read(AutoTokenizer, _local_source(config), config)


def _local_source(config: Model) -> str:
    gguf = find_gguf(config.name)
    if gguf is not None:
        return str(converted(gguf, config.cache_dir))
    folder = named_path(config.name)
    return str(folder) if folder.is_dir() else config.name


def _read(reader: Any, source: str, model: Model, settings: dict[str, Any] | None = None) -> Any:
    options: dict[str, Any] = {"trust_remote_code": model.trust_remote_code, **(settings or {})}
    options |= {} if model.revision is None else {"revision": model.revision}
    options |= {"local_files_only": True} if (source, model.revision) in _fetched else {}
    if source.startswith(("/", "./", "../", "~")) and not Path(source).exists():
        raise DataError(f"model.name: {model.name}: no such folder or file (from {Path.cwd()}); correct the path")
    try:
        if "local_files_only" not in options and not Path(source).exists() and _in_cache(model) is None:
            _ask_hub(model)
        return reader.from_pretrained(source, **options)
    except Exception as error:
        if not is_of_files(error):
            raise
        raise DataError(f"model.name: {model.name} can't be loaded by {reader.__name__}: {in_a_line(error)}") from error


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """Every token that ends a sequence, by the model's generation config and by the tokenizer."""
    settings: Any = model.generation_config  # remote code may leave None there
    declared = settings.eos_token_id if settings is not None else None
    from_model: list[Any] = declared if isinstance(declared, list) else [declared]
    found = [token for token in [*from_model, cast("int | None", tokenizer.eos_token_id)] if token is not None]
    if not found or not all(isinstance(token, int) for token in found):
        raise DataError(
            "model.name: neither the model nor its tokenizer names an end-of-sequence token; set tokenizer.eos_token"
        )
    return tuple(sorted(set(found)))
