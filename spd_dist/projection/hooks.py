"""Hold a model to a projection, by forward hooks or folded into its weights; count and measure what it does."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spd_dist.errors import ConfigError, DataError
from spd_dist.projection.fold import folded
from spd_dist.projection.operators import (
    SitePart,
    Target,
    check_projection,
    claimed,
    find_module,
    parts_by_module,
    targets,
)
from spd_dist.types import KVSite, Projection

OBSERVED_ROWS = 256
TINY = 1e-30


class ProjectionMonitor:
    """A projection at work. The first `observe` outputs of each site are measured, without waiting for the device."""

    def __init__(self, sites: Iterable[KVSite], observe: int) -> None:
        self.calls: dict[KVSite, int] = dict.fromkeys(sites, 0)
        """Outputs that were projected, per site; with mode `fold` only those that are observed, and none in a graph."""
        self.model_calls = 0
        self.is_on = True
        """Whether hooks act: with mode `hook`, a caller may let the model run without them for a while."""
        self._observe = observe
        self._observed = dict.fromkeys(self.calls, 0)
        self._worst: dict[KVSite, Tensor] = {}

    @contextmanager
    def paused(self) -> Generator[None]:
        """Within this context the hooks do not act."""
        was_on, self.is_on = self.is_on, False
        try:
            yield
        finally:
            self.is_on = was_on

    def leakage(self) -> float | None:
        """The largest ||z - zP|| / ||z|| of any site, z being a projected output; None if there was none to see.

        For an operator that is not a projector (blend, soft) it is ||z' - zP|| / ||z'||, z' being what came of z; such
        an operator cannot be seen in the outputs of folded weights.
        """
        return max((worst.item() for worst in self._worst.values()), default=None)

    def count(self, part: SitePart) -> None:
        """One more output. A graph would be compiled anew for each number, and counts nothing."""
        if not torch.compiler.is_compiling():
            self.calls[part.site] += 1

    def observes(self, site: KVSite) -> bool:
        """Whether the next output of `site` is to be measured."""
        return self._observed[site] < self._observe

    @torch.no_grad()
    def measure(self, part: SitePart, before_D: Tensor | None, after_D: Tensor) -> None:
        """Compare `after_D`, an output as attention sees it, with what the operator makes of `before_D`."""
        self._observed[part.site] += 1
        if part.apply.is_idempotent:
            before_D = after_D
        if before_D is None:
            return
        before_ND, after_ND = (_rows(z_D) for z_D in (before_D, after_D))
        leakage = (after_ND - part.apply(before_ND)).norm() / after_ND.norm().clamp_min(TINY)
        self._worst[part.site] = torch.maximum(self._worst.get(part.site, leakage), leakage)

    def check_calls(self, *, has_run: bool = False) -> None:
        """Fail if the model ran and a site did not; `has_run` if it is known to have, whether or not it was seen here.

        Raises:
            DataError: naming the sites.
        """
        idle = [str(site) for site, calls in self.calls.items() if calls == 0]
        if self._observe and idle and (has_run or self.model_calls or any(self.calls.values())):
            raise DataError(
                f"the model ran and the projection never reached {', '.join(idle)}: a compiled model ignores hooks "
                "that are added later, and an engine may not call the module; set generate.apply_as=fold"
            )


def _rows(z_D: Tensor) -> Tensor:
    return z_D.detach().reshape(-1, z_D.shape[-1])[:OBSERVED_ROWS].double()


ROTATION = "apply_rotary_pos_emb"
"""What transformers' attention modules call, as `query, key = apply_rotary_pos_emb(query, key, ...)`."""


@contextmanager
def rotary_keys(model: nn.Module, found: list[Target], monitor: ProjectionMonitor) -> Generator[None]:
    """Within this context the attention modules of the key sites project what their rotation returns.

    The wrapped rotation is global to the model's Python module; it acts only while one of these attention modules runs.

    Raises:
        ConfigError: an attention module that calls no such rotation.
        DataError: a rotation that does not see the whole key.
    """
    running: list[SitePart] = []
    modules: dict[ModuleType, None] = {}
    with ExitStack() as undo:
        for target in found:
            for part in (part for part in target.parts if part.site.kind == "key"):
                attention = find_module(model, target.name.rpartition(".")[0])
                assert attention is not None  # it holds the target, which was found
                modules[_module_with_rotation(attention, part)] = None
                _mark_running(undo, attention, part, running)
        for module in modules:
            rotate = vars(module)[ROTATION]
            undo.callback(setattr, module, ROTATION, rotate)
            setattr(module, ROTATION, _projecting(rotate, running, monitor))
        yield


def _module_with_rotation(attention: nn.Module, part: SitePart) -> ModuleType:
    """The Python module in whose globals `attention`'s forward looks its rotation up."""
    module = sys.modules[type(attention).__module__]
    rotate = vars(module).get(ROTATION)
    names = None if rotate is None else list(inspect.signature(rotate).parameters)[:2]
    if names != ["q", "k"] or hasattr(attention, "kv_b_proj"):
        raise ConfigError(
            f"project.insertion=rope: {type(attention).__name__} of {part.site} does not rotate its whole keys by "
            f"{ROTATION}(q, k, ...); set project.insertion=linear"
        )
    return module


def _mark_running(undo: ExitStack, attention: nn.Module, part: SitePart, running: list[SitePart]) -> None:
    undo.callback(attention.register_forward_pre_hook(lambda *_: running.append(part)).remove)
    undo.callback(attention.register_forward_hook(lambda *_: _discard(running), always_call=True).remove)


def _discard(running: list[SitePart]) -> None:
    running.pop()


def _projecting(rotate: Callable[..., Any], running: list[SitePart], monitor: ProjectionMonitor) -> Callable[..., Any]:
    def rotate_and_project(q: Tensor, k: Tensor, *angles: Any, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        q, k = rotate(q, k, *angles) if unsqueeze_dim == 1 else rotate(q, k, *angles, unsqueeze_dim=unsqueeze_dim)
        if not (running and monitor.is_on):
            return q, k
        part = running[-1]
        key_BTHK = k.transpose(1, 2) if unsqueeze_dim == 1 else k
        if key_BTHK.dim() != 4 or key_BTHK.shape[2] * key_BTHK.shape[3] != part.site.width:
            raise DataError(
                f"project.insertion=rope: what rotates of {part.site} is {tuple(k.shape)} and not the whole key of "
                f"width {part.site.width}; set project.insertion=linear"
            )
        key_BTD = key_BTHK.flatten(2)
        projected_BTD = part.apply(key_BTD)
        monitor.count(part)
        if monitor.observes(part.site):
            monitor.measure(part, key_BTD, projected_BTD)
        projected = projected_BTD.view(key_BTHK.shape)
        return q, projected.transpose(1, 2) if unsqueeze_dim == 1 else projected

    return rotate_and_project


@contextmanager
def projected(
    model: nn.Module, projection: Projection, mode: Literal["hook", "fold"] = "hook", *, observe: int = 4
) -> Generator[ProjectionMonitor]:
    """`model` with its keys and values held to `projection`; as it was before, bit by bit, on every way out.

    `hook` acts on the outputs, at the cost of one or two small products a site and call; the model may be whole,
    sharded, wrapped by PEFT or quantised. `fold` acts on the weights, costs nothing, and is a collective under ZeRO-3.
    The first `observe` outputs of each site are measured; with `fold`, no hook stays behind them.

    Raises:
        DataError: a module is missing, too narrow, or projected already; or the model ran and a site did not.
        ConfigError: a fold that would not be exact, or keys whose RoPE cannot be reached.
    """
    if mode not in ("hook", "fold"):
        raise ConfigError(f"generate.apply_as: {mode!r} is not valid; it must be hook or fold")
    check_projection(projection)
    found = targets(model, parts_by_module(projection.operators))
    monitor = ProjectionMonitor(projection.operators, observe)
    with ExitStack() as undo:
        undo.enter_context(claimed(found))
        if mode == "fold":
            undo.enter_context(folded(model, found, projection.insertion))
        else:
            undo.callback(model.register_forward_pre_hook(lambda *_: _count(monitor)).remove)
        for target in found if mode == "fold" else at_output(found, projection.insertion):
            _ModuleHooks(target, monitor).install(undo, mode)
        if projection.insertion == "rope":
            undo.enter_context(rotary_keys(model, found, monitor))
        yield monitor
        monitor.check_calls()


def at_output(found: list[Target], insertion: str) -> list[Target]:
    """What hooks on module outputs do: everything but the keys that are projected after RoPE."""
    if insertion != "rope":
        return found
    values = [target._replace(parts=[part for part in target.parts if part.site.kind == "value"]) for target in found]
    return [target for target in values if target.parts]


def _count(monitor: ProjectionMonitor) -> None:
    if not torch.compiler.is_compiling():
        monitor.model_calls += monitor.is_on


class _ModuleHooks:
    """The hook that projects a module's output, and a later one that watches the first of what comes out."""

    def __init__(self, target: Target, monitor: ProjectionMonitor) -> None:
        self.target, self.monitor = target, monitor
        first = target.parts[0]
        self.whole = first.apply if first.site.columns == ((0, target.out_features),) else None
        self.watching, self.counts_watched = False, False
        self.before_O: Tensor | None = None

    def install(self, undo: ExitStack, mode: str) -> None:
        """Register what `mode` needs; `undo` removes it."""
        if mode == "hook":
            undo.callback(self.target.module.register_forward_hook(self.project).remove)
        self.counts_watched = mode == "fold"
        self.watching = self.monitor.observes(self.target.parts[0].site)
        if self.watching:
            self.watcher = self.target.module.register_forward_hook(self.watch)
            undo.callback(self.watcher.remove)

    def project(self, module: nn.Module, inputs: Any, output_O: Any) -> Tensor:
        """The output with every site of the module replaced."""
        if not self.monitor.is_on:
            return output_O
        if not isinstance(output_O, Tensor):
            raise DataError(
                f"{self.target.name} returns a {type(output_O).__name__}, not a tensor; it cannot be projected"
            )
        for part in self.target.parts:
            self.monitor.count(part)
        self.before_O = output_O if self.watching else None
        if self.whole is not None:
            return self.whole(output_O)
        projected_O = output_O.clone()
        for part in self.target.parts:
            part.columns.write_(projected_O, part.apply(part.columns.read(output_O)))
        return projected_O

    def watch(self, module: nn.Module, inputs: Any, output_O: Tensor) -> None:
        """Measure an output as attention sees it; the last time, take this hook off."""
        if not self.monitor.is_on:
            return
        before_O, self.before_O = self.before_O, None
        for part in self.target.parts:
            if self.counts_watched:
                self.monitor.count(part)
            self.monitor.measure(
                part, None if before_O is None else part.columns.read(before_O), part.columns.read(output_O)
            )
        self.watching = self.monitor.observes(self.target.parts[0].site)
        if not self.watching:
            self.watcher.remove()
