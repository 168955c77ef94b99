"""Choose an engine, open it under the projection, and compare its answers with the policy's own."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

from spd_dist.config import Generate, Model, engine_of, planned_rows
from spd_dist.distributed.collectives import together
from spd_dist.distributed.uneven_work import on_main, wait_for_all_ranks
from spd_dist.distributed.world import World
from spd_dist.errors import ConfigError
from spd_dist.inference.decode import check_context
from spd_dist.inference.engine_probes import References, check_probes, references
from spd_dist.inference.external.external_engine import ExternalEngine, command_of, environment_of
from spd_dist.inference.external.server_engine import ServerEngine, check_server
from spd_dist.inference.external.vllm_engine import VLLMEngine, check_vllm, vllm_environment, vllm_settings
from spd_dist.inference.external.vllm_process import EnginePool
from spd_dist.inference.hf_cb import ContinuousBatchingEngine
from spd_dist.inference.hf_engine import HFEngine, held_to
from spd_dist.inference.placement import choose_placement, placed, rows_of_a_pass
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


class Idle:
    """The engine of a rank that has nothing to ask: of one whose device serves another rank's engine."""

    def __init__(self, name: str) -> None:
        self.name = name

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> Generator[Decoded, None, None]:
        """Nothing: there is no request."""
        assert not requests
        yield from ()


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
    num_starts: int = 0
    """Processes that were started for it on this rank."""
    batch_size: int = 0
    """Rows that are decoded together at most; 0 of an engine that decides by itself."""

    def projection_seen(self) -> tuple[dict[str, int], float | None]:
        """How often each site was projected (in vLLM: tokens), and the largest leakage; nothing without a projection.

        Raises:
            DataError: an engine that left the projection out of some tokens.
        """
        if isinstance(self.engine, VLLMEngine) and self.engine.projection is not None:
            return self.engine.seen()
        if self.monitor is None:
            return {}, None
        return {str(site): count for site, count in self.monitor.calls.items()}, self.monitor.leakage()


@dataclasses.dataclass(frozen=True)
class EngineWork:
    """What an engine is opened for."""

    requests: Sequence[Request]
    """This rank's; some are its probes. A rank without any starts no engine."""
    longest: Request
    """That with the longest prompt of the whole corpus."""
    scratch: Path
    """A folder for the files of an engine with a process of its own; removed at the end."""
    section: str = "generate"
    """The config's that asks for it, for messages."""
    arm: str = "spd"
    """For which it works: a server has a name for each."""
    pool: EnginePool | None = None
    """Where an engine that later work can use, too, is kept; without it, it ends with this work."""


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

    The body holds no collective; its exceptions are raised on every rank.

    Args:
        policy: The untouched policy, or a student; so it is left.
        projection: None for the policy as it is.
        config: The section.
        world: This process among all.
        work: What this rank will ask of it.

    Raises:
        DataError: a prompt is longer than the model's context; the engine can't run the model, or runs another policy.
        ConfigError: the engine's settings.
    """
    name, reason = choose_engine(config, work.section)
    if world.is_main and (work.section == "generate" or name != "hf"):
        log.info("%s: engine %s, since %s", work.section, name, reason)
    config = dataclasses.replace(config, engine=name)
    with together("looking at the longest prompt"):
        check_context(policy.model, work.longest, config.max_new_tokens, section=work.section)
    max_length = len(work.longest.tokens) + config.max_new_tokens
    placement = choose_placement(policy, config, world, max_length, section=work.section)
    with together("checking the engine's settings"):
        _check(policy, projection, config, world, work, placement)
    num_rows = rows_of_a_pass(policy, config, world, max_length, placement)
    if world.is_main and config.batch_size == "auto" and name in ("hf", "hf_cb"):
        log.info("%s: %d rows a pass, the most that fit in memory", work.section, num_rows)
    config = dataclasses.replace(config, batch_size=num_rows)
    probes = [dataclasses.replace(request, sample=-1, budget=None) for request in work.requests]
    candidates = {request.id: request for request in probes}.values()
    with ExitStack() as stack:
        expected = References([], Sampling(), None)
        if name != "hf" or work.section == "generate":
            with placed(policy, placement, world, "answering the probes"):
                expected = references(policy, projection, candidates, config.max_new_tokens)
        if name in ("hf", "hf_cb"):
            monitor = stack.enter_context(held_to(policy, projection, config.apply_as))
            stack.enter_context(placed(policy, placement, world, "generating completions"))
            engine = _in_process(policy, config, monitor, placement, work, max_length)
            opened = Opened(engine, placement, monitor, batch_size=num_rows)
        else:
            opened = stack.enter_context(_opened_outside(policy, projection, config, world, work, expected.monitor))
        if isinstance(opened.engine, ServerEngine):
            opened.engine.verify(expected)
        _verify(opened.engine, expected, policy, work.section)
        if name in ("hf", "hf_cb") and opened.monitor is not None and expected.answers:
            opened.monitor.check_calls(has_run=True)
        yield opened


def _check(
    policy: Policy, projection: Projection | None, config: Generate, world: World, work: EngineWork, placement: str
) -> None:
    """Refuse settings that can't be met, before anything is done."""
    key = f"{work.section}.engine"
    if config.engine == "hf_cb" and placement == "layerwise":
        raise ConfigError(f"{key}=hf_cb needs whole weights on each rank; set {work.section}.placement=replica")
    if config.engine == "command":
        command_of(config.command, work.scratch, policy.adapter)
    if config.engine == "vllm":
        check_vllm(config, policy, world)
    if config.engine == "server":
        check_server(config.server, work.arm, projection)


def _in_process(
    policy: Policy,
    config: Generate,
    monitor: ProjectionMonitor | None,
    placement: str,
    work: EngineWork,
    max_length: int,
) -> Engine:
    if config.engine == "hf_cb":
        return ContinuousBatchingEngine(policy, planned_rows(config.batch_size), monitor, work.section)
    fixed_columns = max_length if config.batch_invariant else None
    return HFEngine(policy, planned_rows(config.batch_size), fixed_columns, monitor, placement, work.section)


@contextmanager
def _opened_outside(
    policy: Policy,
    projection: Projection | None,
    config: Generate,
    world: World,
    work: EngineWork,
    monitor: ProjectionMonitor | None,
) -> Generator[Opened]:
    """An engine with a process of its own, not verified yet; `monitor` is of the reference."""
    label = f"{work.section}.engine={config.engine}"
    held = projection if config.engine == "vllm" and config.apply_as == "hook" and policy.origin is not None else None
    with ExitStack() as stack:
        stack.enter_context(_removed_at_the_end(work.scratch, world))
        model = policy.origin
        if config.engine == "server":
            stack.enter_context(wait_for_all_ranks("the server at work"))
            yield Opened(ServerEngine(policy, config, work.arm, world, label), "external", monitor)
            return
        if model is None or (policy.adapter is None and (config.engine == "command" or projection is not held)):
            model = Model(str(stack.enter_context(exported(policy, projection, work.scratch / "model", world))))
        stack.enter_context(wait_for_all_ranks(f"{config.engine} at work"))
        if not work.requests:
            yield Opened(Idle(config.engine), "external", monitor)
            return
        folder = work.scratch / f"rank-{world.rank:05d}"
        if config.engine == "command":
            command = command_of(config.command, model.name, policy.adapter)
            yield Opened(ExternalEngine(label, command, policy, folder, environment_of(world)), "external", monitor)
            return
        pool = work.pool or stack.enter_context(EnginePool().closed_at_the_end())
        settings = vllm_settings(policy, model, held, config, pool, len(work.longest.tokens) + config.max_new_tokens)
        before = pool.num_starts
        process = pool.of(config, settings, pool.folder or folder, vllm_environment(config, world))
        yield Opened(VLLMEngine(process, policy, held, label), "external", monitor, pool.num_starts - before)


@contextmanager
def _removed_at_the_end(folder: Path, world: World) -> Generator[None]:
    """Remove the files of an engine; after a failure they stay, with its log."""
    yield
    if world.is_main:
        shutil.rmtree(folder, ignore_errors=True)


def _verify(engine: Engine, expected: References, policy: Policy, section: str) -> None:
    probes = [answer.request for answer in expected.answers]
    found = engine.complete(probes, expected.sampling) if probes else ()
    check_probes(engine.name, expected.answers, found, policy.model.dtype, section=section)


@contextmanager
def exported(policy: Policy, projection: Projection | None, folder: Path, world: World) -> Generator[Path]:
    """The projected policy as a model folder that any engine loads, removed at the end. A collective."""
    on_main("making room for the exported policy", lambda: shutil.rmtree(folder.parent, ignore_errors=True))
    tensors = whole_tensors(stored_parameters(policy.model))
    if projection is None:
        save_model(policy.model, tensors, folder, world=world)
    else:
        with projected(policy.model, projection, "fold"):
            save_model(policy.model, tensors, folder, world=world)
    on_main("saving the tokenizer", lambda: policy.tokenizer.save_pretrained(folder))
    try:
        yield folder
    finally:
        if world.is_main:
            shutil.rmtree(folder, ignore_errors=True)
