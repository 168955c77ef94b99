"""Where a sharded policy's weights are while it decodes: whole on every rank, or gathered layer by layer in step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from spd_dist.config import Config, Distributed, Generate, Model, planned_rows
from spd_dist.distributed.collectives import all_ranks, max_over_ranks, together
from spd_dist.distributed.memory import free_bytes
from spd_dist.distributed.uneven_work import wait_for_all_ranks
from spd_dist.distributed.world import World
from spd_dist.distributed.zero import forget_order, full_replica
from spd_dist.errors import ConfigError
from spd_dist.inference.continuous import MAX_PREFILL_TOKENS
from spd_dist.models.model_stats import Outline, meta_model, outline_of
from spd_dist.models.policy import Policy, load_adapted, load_replica, load_settings, prepare_model, resolve_dtype

log = logging.getLogger(__name__)

SAMPLING_BYTES = 16
"""A logit of a pass as sampling holds it: in the model's dtype, in float32, scaled, and as a weight."""


IDLE, FORWARD, FAILED = 0.0, 1.0, 2.0


class LockStep:
    """Within it each rank calls `module` as often as its own work needs; a rank without work keeps the others company.

    Every forward pass gathers shards from all ranks, so each begins with a word from every rank: idle, forward, or
    failed. An idle rank answers a forward by a dummy pass. A rank that fails between two passes says so, and all raise
    its error. One that fails inside a pass can say nothing, since its peers are in another collective: its error ends
    its process, and theirs end on the closed connection.
    """

    def __init__(self, module: nn.Module, dummy: Callable[[], object], doing: str) -> None:
        """`dummy` makes one pass of `module`, whose result nobody needs."""
        self.module, self.dummy, self.doing = module, dummy, doing
        self.is_inside_pass = False
        self.peer_failed = False

    def __enter__(self) -> LockStep:
        # Before ZeRO's own hooks: the first word is said before the first gather.
        self.hooks = [
            self.module.register_forward_pre_hook(self._before, prepend=True),
            self.module.register_forward_hook(self._after),
        ]
        return self

    def _before(self, *_: Any) -> None:
        if max_over_ranks(FORWARD) == FAILED:
            self.peer_failed = True
            raise _PeerFailedError
        self.is_inside_pass = True

    def _after(self, *_: Any) -> None:
        self.is_inside_pass = False

    def __exit__(self, _: object, error: BaseException | None, trace: object) -> bool:
        for hook in self.hooks:
            hook.remove()
        if self.is_inside_pass:
            return False
        if error is None:
            self._accompany()
        elif not self.peer_failed:
            max_over_ranks(FAILED)
        with together(self.doing):
            if error is not None and not self.peer_failed:
                raise error
        return self.peer_failed

    def _accompany(self) -> None:
        while (word := max_over_ranks(IDLE)) == FORWARD:
            self.dummy()
        self.peer_failed = word == FAILED


class _PeerFailedError(RuntimeError):
    """Unwinds this rank's work; the failed rank's own error is what all raise."""


HEADROOM = 0.85
MOST_ROWS = 256
MOST_ROWS_ON_CPU = 64
"""Of `auto`: beyond them a pass takes longer by as much as it does more."""
Placement = Literal["replica", "layerwise"]


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
    needed, free = needed_bytes(policy, config, max_length, is_cpu=world.device.type == "cpu"), free_bytes(world)
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
    needed = _needed_bytes(skeleton, config, max_length, is_cpu=world.device.type == "cpu")
    return all_ranks(needed <= HEADROOM * free_bytes(world))


def load_to_answer(config: Config, world: World, *, adapter: Path, longest: int) -> Policy:
    """The model with a LoRA adapter, to evaluate on prompts of up to `longest` tokens. A collective.

    The adapter stays beside the weights: whole ones on every rank if they fit, else shards.

    Raises:
        DataError: no such model or adapter.
    """
    decoding = config.evaluate.decoding()
    is_whole = will_be_whole(config.model, config.distributed, decoding, world, longest + decoding.max_new_tokens)
    load = load_replica if is_whole else load_adapted
    return load(config.model, config.distributed, world, adapter=adapter)


def needed_bytes(policy: Policy, config: Generate, max_length: int, *, is_cpu: bool) -> int:
    """What a rank needs beside its shards to decode by itself."""
    return _needed_bytes(policy.model, config, max_length, is_cpu=is_cpu)


def rows_of_a_pass(policy: Policy, config: Generate, world: World, max_length: int, placement: Placement) -> int:
    """`batch_size`; of `auto` the largest power of two whose cache and logits fit beside the weights on this rank.

    The policy is not placed yet; `max_length` are the tokens of the longest prompt and its completion.
    """
    if config.batch_size != "auto":
        return config.batch_size
    outline = outline_of(policy.model)

    def needed(num_rows: int) -> int:
        one = _decode_bytes(policy.model, config, max_length, num_rows)
        if placement == "layerwise":
            return 2 * one.weights // outline.num_layers + one.cache + one.working
        packed = packed_bytes(outline, policy.model.dtype.itemsize) if world.device.type == "cpu" else 0
        return packed + sum(one) - (one.weights if policy.engine is None else 0)  # its weights are there already

    most = MOST_ROWS_ON_CPU if world.device.type == "cpu" else MOST_ROWS
    return largest_batch(needed, HEADROOM * free_bytes(world), most)


def largest_batch(needed: Callable[[int], int], free: float, most: int) -> int:
    """Of `most`, half of it, a quarter, ... the first number of rows that needs no more bytes than are free; or 1.

    That 1 fits is not said: where it does not, the first pass fails and names what to change.
    """
    while most > 1 and needed(most) > free:
        most //= 2
    return most


def _needed_bytes(model: PreTrainedModel, config: Generate, max_length: int, *, is_cpu: bool) -> int:
    packed = packed_bytes(outline_of(model), model.dtype.itemsize) if is_cpu else 0
    return packed + sum(_decode_bytes(model, config, max_length, planned_rows(config.batch_size)))


def _decode_bytes(model: PreTrainedModel, config: Generate, max_length: int, num_rows: int) -> DecodeBytes:
    return decode_bytes(
        outline_of(model),
        batch_size=num_rows,
        prompt_tokens=max(1, max_length - config.max_new_tokens),
        new_tokens=config.max_new_tokens,
        element_bytes=model.dtype.itemsize,
        num_caches=1 + (config.contrast != 1),
    )


@contextmanager
def placed(policy: Policy, placement: Placement, world: World, doing: str) -> Generator[None]:
    """The policy's model ready to be called by each rank as often as it likes.

    An exception of one rank is raised on all; shards and hooks are back on every way out. The body holds no collective.
    """
    if placement == "layerwise":
        with _passes_of_their_own(policy), LockStep(policy.model, lambda: dummy_pass(policy), doing):
            yield
    elif world.size == 1:
        with full_replica(policy.engine, policy.model):
            yield
    else:
        with full_replica(policy.engine, policy.model), wait_for_all_ranks(doing):
            yield


@contextmanager
def _passes_of_their_own(policy: Policy) -> Generator[None]:
    """Forward passes that follow no order with a backward pass, and leave nothing gathered for a next one."""
    if policy.engine is not None:
        forget_order(policy.engine)
    yield
    if policy.engine is not None:
        forget_order(policy.engine)


@torch.no_grad()
def dummy_pass(policy: Policy) -> None:
    """One forward pass of one token."""
    device = next(policy.model.parameters()).device
    policy.model(input_ids=torch.tensor([[policy.pad_token_id]], device=device), use_cache=False)


class DecodeBytes(NamedTuple):
    """What one rank needs to decode by itself."""

    weights: int
    """Whole."""
    cache: int
    """Keys and values of a full batch, and of the prompts that are being read."""
    working: int
    """The largest single step: a layer's activations while prompts are read, or the logits of a batch."""


def packed_bytes(outline: Outline, element_bytes: int) -> int:
    """Whole weights in the layout of a CPU's products, beside their own (`packed_weights.py`)."""
    return element_bytes * outline.num_multiplied


def decode_bytes(
    outline: Outline, *, batch_size: int, prompt_tokens: int, new_tokens: int, element_bytes: int, num_caches: int = 1
) -> DecodeBytes:
    """What decoding `batch_size` rows takes, beside shards of the same weights.

    Tokens are those of the longest prompt and completion; `element_bytes` has a weight, and an activation.
    A row has two caches under `generate.contrast`.
    """
    prefill_tokens = min(batch_size * prompt_tokens, MAX_PREFILL_TOKENS)
    columns = batch_size * (prompt_tokens + new_tokens)
    # The prompts that were read last stay beside those that are being read: further samples may follow.
    cache = outline.num_layers * outline.kv_width * (columns + 2 * max(prefill_tokens, prompt_tokens))
    # Inside the MLP, or where attention has repeated keys and values for every query head.
    inside = max(3 * outline.intermediate_size, 4 * outline.attention_width)
    layer = prefill_tokens * (4 * outline.hidden_size + inside)
    sampled = SAMPLING_BYTES * batch_size * outline.vocabulary_size
    working = max(element_bytes * layer, sampled)
    return DecodeBytes(element_bytes * outline.num_parameters, num_caches * element_bytes * cache, working)
