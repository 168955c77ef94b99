"""Choose an engine, open it under the projection, and compare its answers with the policy's own."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from spd_dist.config import Generate, engine_of
from spd_dist.distributed.collectives import together
from spd_dist.distributed.uneven_work import wait_for_all_ranks
from spd_dist.distributed.world import World
from spd_dist.errors import ConfigError
from spd_dist.inference.decode import check_context
from spd_dist.inference.engine_probes import References, check_probes, references
from spd_dist.inference.external_engine import ExternalEngine, command_of, environment_of
from spd_dist.inference.hf_cb import ContinuousBatchingEngine
from spd_dist.inference.hf_engine import HFEngine, held_to
from spd_dist.inference.placement import choose_placement, placed
from spd_dist.inference.requests import Decoded, Request
from spd_dist.inference.sampling import Sampling
from spd_dist.models.policy import Policy
from spd_dist.models.save_weights import save_model, stored_parameters, whole_tensors
from spd_dist.projection.hooks import ProjectionMonitor, projected
from spd_dist.types import Projection

log = logging.getLogger(__name__)

REASONS = {
    "vllm": "generate.vllm_python is set",
    "command": "generate.command is set",
    "hf": "neither generate.vllm_python nor generate.command is set, and samples depend on no batch",
}
"""Why `auto` takes an engine; never hf_cb, since its samples depend on what they are batched with."""


class Engine(Protocol):
    """The seam: prompts in, completions out as they finish."""

    name: str

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> Generator[Decoded, None, None]:
        """Answer the requests, in any order. To close it ends what is at work."""


class Choice(NamedTuple):
    """An engine and why it was taken."""

    name: str
    reason: str


class Opened(NamedTuple):
    """An engine that runs the projected policy."""

    engine: Engine
    placement: str
    monitor: ProjectionMonitor | None
    """Calls and leakage of the projection: in the engine itself, or in the reference that it agreed with."""


class EngineWork(NamedTuple):
    """What an engine is opened for."""

    requests: Sequence[Request]
    """This rank's; some are its probes."""
    longest: Request
    """That with the longest prompt of the whole corpus."""
    scratch: Path
    """A folder for the files of an engine with a process of its own; removed at the end."""


def choose_engine(config: Generate) -> Choice:
    """The engine that the config asks for, or that `auto` takes."""
    name = engine_of(config.engine, config.vllm_python, config.command)
    return Choice(name, REASONS[name] if config.engine == "auto" else "generate.engine asks for it")


@contextmanager
def open_engine(
    policy: Policy,
    projection: Projection | None,
    config: Generate,
    world: World,
    work: EngineWork,
) -> Iterator[Opened]:
    """The engine of `config`, once it has answered some requests as the projected policy does. A collective.

    The body holds no collective; its exceptions are raised on every rank.

    Args:
        policy: The untouched policy; so it is left.
        projection: None for the policy as it is.
        config: The section.
        world: This process among all.
        work: What this rank will ask of it.

    Raises:
        DataError: a prompt is longer than the model's context; the engine can't run the model, or runs another policy.
        ConfigError: the engine's settings.
    """
    name, reason = choose_engine(config)
    if world.is_main:
        log.info("generate: engine %s, since %s", name, reason)
    config = dataclasses.replace(config, engine=name)
    with together("looking at the longest prompt"):
        check_context(policy.model, work.longest, config.max_new_tokens)
    max_length = len(work.longest.tokens) + config.max_new_tokens
    placement = choose_placement(policy, config, world, max_length, section="generate")
    with together("checking the engine's settings"):
        if name == "hf_cb" and placement == "layerwise":
            raise ConfigError("generate.engine=hf_cb needs whole weights on each rank; set generate.placement=replica")
        if name not in ("hf", "hf_cb"):
            command_of(config, work.scratch)
    candidates = {request.id: dataclasses.replace(request, sample=-1) for request in work.requests}.values()
    with placed(policy, placement, world, "answering the probes"):
        expected = references(policy, projection, candidates, config.max_new_tokens)
    if name in ("hf", "hf_cb"):
        held = held_to(policy, projection, config.apply_as)
        with held as monitor, placed(policy, placement, world, "generating completions"):
            fixed_columns = max_length if config.batch_invariant else None
            engine = HFEngine(policy, config.batch_size, fixed_columns, monitor, placement, "generate")
            if name == "hf_cb":
                engine = ContinuousBatchingEngine(policy, config.batch_size, engine.monitor)
            _verify(engine, expected, policy)
            if engine.monitor is not None and expected.answers:
                engine.monitor.check_calls(has_run=True)
            yield Opened(engine, placement, engine.monitor)
        return
    with (
        exported(policy, projection, work.scratch / "model", world) as model,
        wait_for_all_ranks(f"generating by {name}"),
    ):
        command, environment = command_of(config, model), environment_of(world)
        engine = ExternalEngine(name, command, policy, work.scratch / f"rank-{world.rank:05d}", environment)
        _verify(engine, expected, policy)
        yield Opened(engine, "external", expected.monitor)


def _verify(engine: Engine, expected: References, policy: Policy) -> None:
    probes = [answer.request for answer in expected.answers]
    found = engine.complete(probes, expected.sampling) if probes else ()
    check_probes(engine.name, expected.answers, found, policy.model.dtype)


@contextmanager
def exported(policy: Policy, projection: Projection | None, folder: Path, world: World) -> Iterator[Path]:
    """The projected policy as a model folder that any engine loads, removed at the end. A collective."""
    with together("making room for the exported policy"):
        if world.is_main:
            shutil.rmtree(folder.parent, ignore_errors=True)
    tensors = whole_tensors(stored_parameters(policy.model))
    if projection is None:
        save_model(policy.model, tensors, folder, world=world)
    else:
        with projected(policy.model, projection, "fold"):
            save_model(policy.model, tensors, folder, world=world)
    with together("saving the tokenizer"):
        if world.is_main:
            policy.tokenizer.save_pretrained(folder)
    try:
        yield folder
    finally:
        if world.is_main:
            shutil.rmtree(folder, ignore_errors=True)
    if world.is_main:
        shutil.rmtree(folder.parent, ignore_errors=True)  # after a failure the logs in it stay
