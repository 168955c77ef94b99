"""Choose an engine, open it under the projection, and compare its answers with the policy's own."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from spd_dist.config import Generate, engine_of
from spd_dist.distributed.collectives import together
from spd_dist.distributed.world import World
from spd_dist.inference.decode import check_context
from spd_dist.inference.engine_probes import References, check_probes, references
from spd_dist.inference.engine_table import ENGINES, Engine, EngineSetup, EngineWork, Opened
from spd_dist.inference.hf_engines import HFEngine, held_to, is_slow_dtype
from spd_dist.inference.placement import choose_placement, placed, rows_of_a_pass
from spd_dist.inference.sampling import Sampling
from spd_dist.models.policy import Policy
from spd_dist.types import Projection

log = logging.getLogger(__name__)

REASONS = {
    "vllm": "generate.vllm_python is set",
    "command": "generate.command is set",
    "hf": "neither generate.vllm_python nor generate.command is set, and samples depend on no batch",
}
"""Why `auto` takes an engine; never hf_cb, since its samples depend on what they are batched with."""


class Choice(NamedTuple):
    """An engine and why it was taken."""

    name: str
    reason: str


def choose_engine(config: Generate, section: str = "generate") -> Choice:
    """The engine that the config's section asks for, or that `auto` takes."""
    name = engine_of(config.engine, config.vllm_python, config.command)
    return Choice(name, REASONS[name] if config.engine == "auto" else f"{section}.engine asks for it")


@contextmanager
def open_engine(
    policy: Policy,
    projection: Projection | None,
    config: Generate,
    world: World,
    work: EngineWork,
) -> Generator[Opened]:
    """The engine of `config`, once it has answered some requests as the projected policy does. A collective.

    The body holds no collective; its exceptions are raised on every rank. The policy is left as it is; without a
    projection it answers as it is.

    Raises:
        DataError: a prompt is longer than the model's context; the engine can't run the model, or runs another policy.
        ConfigError: the engine's settings.
    """
    name, reason = choose_engine(config, work.section)
    if world.is_main and (work.section == "generate" or name != "hf"):
        log.info("%s: engine %s, since %s", work.section, name, reason)
    contrast = 1.0 if projection is None else config.contrast  # with nothing, which would take a second cache
    config = dataclasses.replace(config, engine=name, contrast=contrast)
    with together("looking at the longest prompt"):
        check_context(policy.model, work.longest, config.max_new_tokens, section=work.section)
    max_length = len(work.longest.tokens) + config.max_new_tokens
    dtype = policy.model.dtype
    if world.is_main and ENGINES[name].in_process and is_slow_dtype(dtype, world.device, torch.cpu.get_capabilities()):
        log.warning("%s: this CPU has no instructions for %s; model.dtype=float32 is faster", work.section, dtype)
    placement = choose_placement(policy, config, world, max_length, section=work.section)
    expected = References([], Sampling(), None)
    setup, kind = EngineSetup(policy, projection, config, world, work, placement, expected), ENGINES[name]
    with together("checking the engine's settings"):
        kind.check(setup)
        kind.prepare(setup)
    num_rows = rows_of_a_pass(policy, config, world, max_length, placement)
    if world.is_main and config.batch_size == "auto" and kind.in_process:
        log.info("%s: %d rows a pass, the most that fit in memory", work.section, num_rows)
    setup = dataclasses.replace(setup, config=dataclasses.replace(config, batch_size=num_rows))
    probes = [dataclasses.replace(request, sample=-1, budget=None) for request in work.requests]
    candidates = {request.id: request for request in probes}.values()
    with ExitStack() as stack:
        if name != "hf" or work.section == "generate":
            with placed(policy, placement, world, "answering the probes"):
                expected = references(policy, projection, candidates, config.max_new_tokens)
        if kind.in_process:
            monitor = stack.enter_context(held_to(policy, projection, config.apply_as))
            stack.enter_context(placed(policy, placement, world, "generating completions"))
        else:
            monitor = expected.monitor
            stack.enter_context(_removed_at_the_end(work.scratch, world))
        opened = kind.open(dataclasses.replace(setup, expected=expected, monitor=monitor), stack)
        _verify(opened.engine, expected, policy, work.section)
        if kind.in_process and monitor is not None and expected.answers:
            monitor.check_calls(has_run=True)
        yield opened


@contextmanager
def _removed_at_the_end(folder: Path, world: World) -> Generator[None]:
    """Remove the files of an engine; after a failure they stay, with its log."""
    yield
    if world.is_main:
        shutil.rmtree(folder, ignore_errors=True)


def _verify(engine: Engine, expected: References, policy: Policy, section: str) -> None:
    if isinstance(engine, HFEngine):  # what it contrasts is asked for by itself
        engine = dataclasses.replace(engine, contrast=None)
    probes = [answer.request for answer in expected.answers]
    found = engine.complete(probes, expected.sampling) if probes else ()
    check_probes(engine.name, expected.answers, found, policy.model.dtype, section=section)
