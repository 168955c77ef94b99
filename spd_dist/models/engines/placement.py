"""Where a sharded policy's weights are while it decodes: whole on every rank, or gathered layer by layer in step."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel

from spd_dist.config import Config, Distributed, Generate, Model
from spd_dist.distributed.collectives import all_ranks, together
from spd_dist.distributed.lockstep import LockStep
from spd_dist.distributed.memory import free_bytes
from spd_dist.distributed.pace import at_any_pace
from spd_dist.distributed.world import World
from spd_dist.distributed.zero import full_replica
from spd_dist.errors import ConfigError
from spd_dist.models.meta import meta_model
from spd_dist.models.outline import decode_bytes, outline_of
from spd_dist.models.policy import Policy, load_adapted, load_replica, load_settings, prepare_model, resolve_dtype

HEADROOM = 0.85
Placement = Literal["replica", "layerwise"]
log = logging.getLogger(__name__)


def choose_placement(policy: Policy, config: Generate, world: World, max_length: int, *, section: str) -> Placement:
    """`replica` if whole weights and the cache fit on every rank (8 to 10 times faster), else `layerwise`.

    `section` is the config's that the settings are from, for messages.

    Raises:
        ConfigError: `layerwise` is asked for and the policy is not sharded.
    """
    if policy.engine is None:
        if config.placement == "layerwise":
            raise ConfigError(
                f"{section}.placement=layerwise needs a sharded policy; set distributed.zero_stage=3, or "
                f"{section}.placement=auto"
            )
        return "replica"
    if config.placement != "auto":
        return config.placement
    needed, free = needed_bytes(policy, config, max_length), free_bytes(world)
    fits = all_ranks(needed <= HEADROOM * free)
    placement: Placement = "replica" if fits else "layerwise"
    log.info("%s: placement %s, %.2f GiB needed, %.2f GiB free", section, placement, needed / 2**30, free / 2**30)
    return placement


def will_be_whole(model: Model, distributed: Distributed, config: Generate, world: World, max_length: int) -> bool:
    """Whether a model is to be loaded whole on every rank to decode by itself, told from its config. A collective."""
    if distributed.zero_stage < 3 or config.placement != "auto":
        return config.placement != "layerwise"
    prepare_model(model)
    with together("reading the model's configuration"):
        skeleton = meta_model(load_settings(model), resolve_dtype(model.dtype, world.device))
    return all_ranks(_needed_bytes(skeleton, config, max_length) <= HEADROOM * free_bytes(world))


def load_to_answer(config: Config, world: World, *, adapter: Path, longest: int) -> Policy:
    """The model with a LoRA adapter, to evaluate on prompts of up to `longest` tokens. A collective.

    Merged and whole on every rank if that fits, else the adapter beside the shards.

    Raises:
        DataError: no such model or adapter.
    """
    decoding = config.evaluate.decoding()
    is_whole = will_be_whole(config.model, config.distributed, decoding, world, longest + decoding.max_new_tokens)
    load = load_replica if is_whole else load_adapted
    return load(config.model, config.distributed, world, adapter=adapter)


def needed_bytes(policy: Policy, config: Generate, max_length: int) -> int:
    """What a rank needs beside its shards to decode by itself."""
    return _needed_bytes(policy.model, config, max_length)


def _needed_bytes(model: PreTrainedModel, config: Generate, max_length: int) -> int:
    needed = decode_bytes(
        outline_of(model),
        batch_size=config.batch_size,
        prompt_tokens=max(1, max_length - config.max_new_tokens),
        new_tokens=config.max_new_tokens,
        element_bytes=model.dtype.itemsize,
    )
    return sum(needed)


@contextmanager
def placed(policy: Policy, placement: Placement, world: World, doing: str) -> Iterator[None]:
    """The policy's model ready to be called by each rank as often as it likes.

    An exception of one rank is raised on all; shards and hooks are back on every way out. The body holds no collective.
    """
    if placement == "layerwise":
        with LockStep(policy.model, lambda: dummy_pass(policy), doing):
            yield
    elif world.size == 1:
        with full_replica(policy.engine, policy.model):
            yield
    else:
        with full_replica(policy.engine, policy.model), at_any_pace(doing):
            yield


@torch.no_grad()
def dummy_pass(policy: Policy) -> None:
    """One forward pass of one token."""
    device = next(policy.model.parameters()).device
    policy.model(input_ids=torch.tensor([[policy.pad_token_id]], device=device), use_cache=False)
