"""Hold a model to a projection, by forward hooks or folded into its weights, in a context that leaves nothing behind.

Shapes: O output features of a module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

from torch import Tensor, nn

from spd_dist.errors import ConfigError, DataError
from spd_dist.models.applied import Applied
from spd_dist.models.fold import folded
from spd_dist.models.operators import check_projection, parts_by_module
from spd_dist.models.rotary import rotary_keys
from spd_dist.models.targets import Target, claimed, targets
from spd_dist.types import Projection


@contextmanager
def projected(
    model: nn.Module, projection: Projection, mode: Literal["hook", "fold"] = "hook", *, observe: int = 4
) -> Iterator[Applied]:
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
    applied = Applied(projection.operators, observe)
    with ExitStack() as undo:
        undo.enter_context(claimed(found))
        if mode == "fold":
            undo.enter_context(folded(model, found, projection.insertion))
        else:
            undo.callback(model.register_forward_pre_hook(lambda *_: _count(applied)).remove)
        for target in found if mode == "fold" else at_output(found, projection.insertion):
            _ModuleHooks(target, applied).install(undo, mode)
        if projection.insertion == "rope":
            undo.enter_context(rotary_keys(model, found, applied))
        yield applied
        applied.check_calls()


def at_output(found: list[Target], insertion: str) -> list[Target]:
    """What hooks on module outputs do: everything but the keys that are projected after RoPE."""
    if insertion != "rope":
        return found
    values = [target._replace(parts=[part for part in target.parts if part.site.kind == "value"]) for target in found]
    return [target for target in values if target.parts]


def _count(applied: Applied) -> None:
    applied.model_calls += 1


class _ModuleHooks:
    """The hook that projects a module's output, and a later one that watches the first of what comes out."""

    def __init__(self, target: Target, applied: Applied) -> None:
        self.target, self.applied = target, applied
        first = target.parts[0]
        self.whole = first.apply if first.site.columns == ((0, target.out_features),) else None
        self.watching, self.counts_watched = False, False
        self.before_O: Tensor | None = None

    def install(self, undo: ExitStack, mode: str) -> None:
        """Register what `mode` needs; `undo` removes it."""
        if mode == "hook":
            undo.callback(self.target.module.register_forward_hook(self.project).remove)
        self.counts_watched = mode == "fold"
        self.watching = self.applied.observes(self.target.parts[0].site)
        if self.watching:
            self.watcher = self.target.module.register_forward_hook(self.watch)
            undo.callback(self.watcher.remove)

    def project(self, module: nn.Module, inputs: tuple, output_O: Tensor) -> Tensor:
        """The output with every site of the module replaced."""
        if not isinstance(output_O, Tensor):
            raise DataError(
                f"{self.target.name} returns a {type(output_O).__name__}, not a tensor; it cannot be projected"
            )
        calls = self.applied.calls
        for part in self.target.parts:
            calls[part.site] += 1
        self.before_O = output_O if self.watching else None
        if self.whole is not None:
            return self.whole(output_O)
        projected_O = output_O.clone()
        for part in self.target.parts:
            part.columns.write_(projected_O, part.apply(part.columns.read(output_O)))
        return projected_O

    def watch(self, module: nn.Module, inputs: tuple, output_O: Tensor) -> None:
        """Measure an output as attention sees it; the last time, take this hook off."""
        before_O, self.before_O = self.before_O, None
        for part in self.target.parts:
            if self.counts_watched:
                self.applied.calls[part.site] += 1
            self.applied.measure(
                part, None if before_O is None else part.columns.read(before_O), part.columns.read(output_O)
            )
        self.watching = self.applied.observes(self.target.parts[0].site)
        if not self.watching:
            self.watcher.remove()
