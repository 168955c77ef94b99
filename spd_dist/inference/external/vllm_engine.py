"""vLLM in a process of its own: one start serves probes and work, of all arms that one engine can serve.

Requests are streamed in and completions out as they end, so the engine is never drained. It runs under an interpreter
that has vllm (`generate.vllm_python`), on the untouched weights: the projection is a plugin inside it
(`inside_vllm/kv_operators.py`), a student's adapter stays beside the weights.
"""

from __future__ import annotations

import dataclasses
import json
from collections import deque
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from spd_dist.config import Generate, Model
from spd_dist.distributed.memory import free_bytes, ranks_here
from spd_dist.distributed.world import World
from spd_dist.errors import ConfigError, DataError
from spd_dist.inference.external.external_engine import decoded_of, environment_of
from spd_dist.inference.external.vllm_process import INSIDE, EnginePool, VLLMProcess, VLLMSettings, VLLMSite
from spd_dist.inference.requests import Decoded, Request
from spd_dist.inference.sampling import Sampling
from spd_dist.models.model_stats import outline_of
from spd_dist.models.policy import Policy
from spd_dist.types import KVSite, Projection, SiteOperator

NUM_OPEN = 1024
"""Requests that the engine has at once: more than it decodes together, so that it always has a next one."""
MOST_WEIGHTS = 0.85
"""Share of a device's free memory that weights may take: keys and values need the rest."""


def site_settings(site: KVSite, insertion: str) -> VLLMSite:
    """A site as the plugin finds it in vLLM's model."""
    after_rope = insertion == "rope" and site.kind == "key"
    return VLLMSite(site_name(site, insertion), site.module, site.kind, site.width, after_rope)


def site_name(site: KVSite, insertion: str) -> str:
    """What the plugin calls a site: its own name, and where its operator acts."""
    return f"{site}.rope" if insertion == "rope" and site.kind == "key" else str(site)


def matrix_of(operator: SiteOperator) -> torch.Tensor:
    """The operator as one matrix, keep * I + F w F', float32, computed in float64."""
    factor_DR = operator.factor_DR.double()
    identity_DD = torch.eye(len(factor_DR), dtype=torch.float64)
    return (operator.keep * identity_DD + factor_DR * operator.weight_R.double() @ factor_DR.T).float().contiguous()


class VLLMEngine:
    """An engine at work, for one arm's policy."""

    name = "vllm"

    def __init__(self, process: VLLMProcess, policy: Policy, projection: Projection | None, label: str) -> None:
        """Hold the engine to `projection`, by its plugin; None for the policy as it is."""
        self.process, self.policy, self.label, self.projection = process, policy, label, projection
        self.num_fed = 0
        """Tokens of completions that the model has read: all but the last of each."""
        path = None
        if projection is not None:
            path = process.folder / "operators.safetensors"
            operators = projection.operators.items()
            save_file({site_name(site, projection.insertion): matrix_of(one) for site, one in operators}, path)
        process.send({"do": "operators", "path": None if path is None else str(path)})
        num_held = process.receive("operators")
        if projection is not None and num_held != len(projection.operators):
            raise DataError(f"{label}: the plugin holds {num_held} of {len(projection.operators)} sites")

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> Generator[Decoded, None, None]:
        """Completions as they end; the engine always has more requests than it decodes together.

        To close this before its end ends the engine: its work can't be taken back.

        Raises:
            DataError: the engine failed, or answered what was not asked.
        """
        waiting, asked = deque(enumerate(requests)), {}
        settings = dataclasses.asdict(sampling) | {"eos_token_ids": list(self.policy.eos_token_ids)}
        adapter = None if self.policy.adapter is None else str(self.policy.adapter.absolute())
        try:
            while waiting or asked:
                while waiting and len(asked) < NUM_OPEN:
                    number, request = waiting.popleft()
                    asked[str(number)] = request
                    line = {"do": "request", "key": str(number), "tokens": request.tokens, "seed": request.seed}
                    self.process.send(line | {"adapter": adapter, "sampling": settings})
                key, tokens = self.process.receive("key")
                if key not in asked:
                    raise self.process.fault(f"answered {key!r}, which is no open request")
                self.num_fed += len(tokens) - 1
                yield decoded_of(self.label, asked.pop(key), tokens, sampling, self.policy)
        finally:
            if asked:
                self.process.close()

    def seen(self) -> tuple[dict[str, int], float | None]:
        """Tokens that each site projected since the engine was held to the projection, and the largest leakage.

        Raises:
            DataError: a site has not seen every token: where graphs are captured, an operator may be left out of them.
        """
        if self.projection is None:
            return {}, None
        self.process.send({"do": "seen"})
        found = self.process.receive("seen")
        kept = {site: found[site_name(site, self.projection.insertion)] for site in self.projection.operators}
        tokens = {str(site): int(seen[1]) for site, seen in kept.items()}
        missed = [name for name, count in tokens.items() if count < self.num_fed]
        if missed:
            raise DataError(
                f"{self.label}: the projection of {missed[0]} acted on {tokens[missed[0]]} tokens, and the model has "
                f"decoded {self.num_fed}; set generate.apply_as=fold, or generate.engine=hf"
            )
        return tokens, max(seen[2] for seen in kept.values())


def vllm_environment(config: Generate, world: World) -> dict[str, str]:
    """Of an engine of this rank: its devices, and on a CPU its part of the cores."""
    num_devices = config.tensor_parallel * config.pipeline_parallel
    kept = environment_of(world, num_devices=num_devices) | {"PYTHONPATH": str(INSIDE)}
    if world.device.type == "cpu":
        # vLLM would bind each rank's engine to the same cores.
        kept.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        kept["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // num_devices))
    return kept


def vllm_settings(
    policy: Policy,
    model: Model,
    projection: Projection | None,
    config: Generate,
    pool: EnginePool,
    max_length: int,
) -> VLLMSettings:
    """What an engine of this policy, and of what the pool expects beside it, is started with.

    `model` is where its weights are, `projection` what the plugin holds it to.

    Raises:
        ConfigError: an adapter that vLLM can't serve.
    """
    own = () if projection is None else tuple(site_settings(one, projection.insertion) for one in projection.operators)
    return VLLMSettings(
        model=model.name,
        revision=model.revision,
        dtype=str(policy.model.dtype).removeprefix("torch."),
        trust_remote_code=model.trust_remote_code,
        max_length=max_length,
        tensor_parallel=config.tensor_parallel,
        pipeline_parallel=config.pipeline_parallel,
        sites=tuple(sorted({*own, *pool.sites})),
        lora_rank=max(pool.lora_rank, 0 if policy.adapter is None else _rank_of(policy.adapter)),
        options=json.dumps(config.vllm_options, sort_keys=True),
    )


def _rank_of(adapter: Path) -> int:
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    if settings.get("use_dora"):
        raise ConfigError(
            "evaluate.engine=vllm serves no adapter with finetune.lora_variant=dora; set evaluate.engine=hf"
        )
    return int(settings["r"])


def check_vllm(config: Generate, policy: Policy, world: World) -> None:
    """Refuse what can't work before anything is written or started.

    Raises:
        ConfigError: no interpreter; parallel settings that don't fit the ranks of a host, or the CPU; weights that
            don't fit the devices.
    """
    if config.vllm_python is None:
        raise ConfigError("engine=vllm needs generate.vllm_python: a Python interpreter that has vllm")
    if world.device.type == "cpu" and config.pipeline_parallel > 1:
        raise ConfigError(
            f"generate.pipeline_parallel: {config.pipeline_parallel} is not valid on a CPU, where vLLM's engine dies "
            "of it; set generate.tensor_parallel"
        )
    size, here = config.tensor_parallel * config.pipeline_parallel, ranks_here(world)
    if here > 1 and here % size:
        raise ConfigError(
            f"generate.tensor_parallel * generate.pipeline_parallel: {size} is not valid with {here} ranks on a host; "
            "it must divide them, or start one rank a host"
        )
    if world.device.type != "cpu":
        torch.cuda.empty_cache()
    outline = outline_of(policy.model)
    weights, free = outline.num_parameters * policy.model.dtype.itemsize / size, free_bytes(world)
    if weights > MOST_WEIGHTS * free:
        raise ConfigError(
            f"generate.tensor_parallel: {config.tensor_parallel} is not valid: {weights / 2**30:.1f} GiB of weights a "
            f"device, and {free / 2**30:.1f} GiB are free beside what this run keeps; raise it, or set "
            "distributed.zero_stage=3"
        )


class EngineShare(NamedTuple):
    """Which part of the work a rank does; `number` is None for one whose device serves another rank's engine."""

    number: int | None
    num_shares: int


def share_of_work(config: Generate, engine: str, world: World) -> EngineShare:
    """This rank's share under `engine`: all have alike ones, but under vLLM only those that lead an engine."""
    size = config.tensor_parallel * config.pipeline_parallel if engine == "vllm" else 1
    here = ranks_here(world)
    if size == 1 or here == 1 or here % size:
        return EngineShare(world.rank, world.size)
    return EngineShare(None if world.rank % size else world.rank // size, world.size // size)
