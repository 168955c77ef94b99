"""A decode loop's pass as one compiled graph for any number of rows and columns, the projection's hooks inside.

On a GPU the graph's kernels are captured, for each shape once, and launched together (CUDA graphs): from Python, one by
one, they take longer to launch than to run. What a graph gives is compared with plain passes at first, since a graph
that was traced without a hook would otherwise go unseen. On a CPU it is there to be tried: plain passes over weights
that are laid out once (`packed_weights`) are faster.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spd_dist.errors import DataError
from spd_dist.inference.kv_cache import SlotCache
from spd_dist.models.forward import call_model

log = logging.getLogger(__name__)

PLAIN_PASSES = 8
"""The first ones, which measure the projection: its hooks come off after a few outputs."""
COLUMNS_A_SHAPE = 128
TINY = 1e-30
CAPTURED = {"triton.cudagraphs": True, "triton.cudagraph_or_error": True}
CHECKS = {"cuda": 3}
"""Calls of a shape that are compared: a GPU runs the first, captures the second, and replays the third."""


class CompiledPass:
    """`call_model` for passes that add one token a row; as it was, with a warning, where nothing can be compiled.

    The model must stay as it is until `close`, but for hooks that come off after a few passes.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.num_plain, self.is_on = model, PLAIN_PASSES, True
        self.device = next(model.parameters()).device.type
        self.is_captured = self.device == "cuda"
        self.num_checked: Counter[tuple[int, ...]] = Counter()

        def traced(inputs: Mapping[str, Any]) -> Tensor:
            return call_model(model, inputs).logits

        options: dict[str, Any] = {"emulate_precision_casts": True, **(CAPTURED if self.is_captured else {})}
        self.graph = torch.compile(traced, dynamic=True, fullgraph=True, options=options)

    def shape(self, num_rows: int, num_columns: int, most_rows: int, most_columns: int) -> tuple[int, int]:
        """Rows and columns of a pass: one row would be a graph of its own, and so is each shape that is captured."""
        num_rows = max(num_rows, 2)
        if self.is_captured:
            num_rows = 1 << (num_rows - 1).bit_length()
            num_columns = -(-num_columns // COLUMNS_A_SHAPE) * COLUMNS_A_SHAPE
        return min(num_rows, most_rows), min(num_columns, most_columns)

    def logits(self, inputs: Mapping[str, Any]) -> Tensor:
        """logits_N1V of a pass.

        Raises:
            DataError: the graph gives other logits than the plain pass.
        """
        if self.num_plain or not self.is_on:
            self.num_plain = max(0, self.num_plain - 1)
            return call_model(self.model, inputs).logits
        cache, mask_NL = inputs["past_key_values"], inputs["attention_mask"]
        sizes = mask_NL.shape if self.is_captured else map(int.bit_length, mask_NL.shape)
        key = (id(cache), *sizes)  # another cache lies elsewhere, and is another policy's where two are contrasted
        is_checked = self.num_checked[key] >= CHECKS.get(self.device, 1)
        plain = None if is_checked else call_model(self.model, inputs).logits
        try:
            found = self._of_graph(cache, inputs)
        except RuntimeError as error:  # a compiler's, or of memory that a smaller batch need not want either
            stays_plain((str(error).strip().splitlines() or [type(error).__name__])[0])
            self.close()
            self.is_on = False
            return call_model(self.model, inputs).logits if plain is None else plain
        if plain is not None:
            _check(found, plain)
            self.num_checked[key] += 1
        return found

    def _of_graph(self, cache: SlotCache, inputs: Mapping[str, Any]) -> Tensor:
        from torch._dynamo import mark_static_address  # a second of imports that plain passes do not need
        from torch.fx.experimental import _config as fx_config

        # One graph for full batches and others: sizes that happen to be equal, or a view of a whole, are none of it.
        inputs = {name: held.clone() if isinstance(held, Tensor) else held for name, held in inputs.items()}
        window = cache.window
        window.row_N, window.column_N = window.row_N.clone(), window.column_N.clone()
        with fx_config.patch(use_duck_shape=False):  # pyright: ignore[reportAttributeAccessIssue]  # made at import
            if not self.is_captured:
                return self.graph(inputs)
            for layer in cache.slots:
                mark_static_address(layer.keys, guard=False)
                mark_static_address(layer.values, guard=False)
            torch.compiler.cudagraph_mark_step_begin()
            return self.graph(inputs).clone()  # the next pass writes where this one's are

    def close(self) -> None:
        """Forget the graph: it holds the model, and a process keeps only so many of one function."""
        if not self.num_plain:
            torch.compiler.reset()


def stays_plain(reason: str) -> None:
    """Say that nothing is compiled, and why."""
    log.warning("generate.compile: passes stay as they are, since they can't be compiled: %s", reason)


def _check(found: Tensor, plain: Tensor) -> None:
    """Of each row, without what all its logits share."""
    if not plain.isfinite().all():
        return  # whoever draws from them says so
    plain_N1V, found_N1V = (logits.float() - logits.float().mean(-1, keepdim=True) for logits in (plain, found))
    difference = ((found_N1V - plain_N1V).norm(dim=-1) / plain_N1V.norm(dim=-1).clamp_min(TINY)).max().item()
    if not difference <= torch.finfo(plain.dtype).eps ** 0.5:
        raise DataError(
            f"generate.compile: True gives other logits than plain passes (by {difference:.1e} of their norm): a hook "
            "may have been left out of the graph; set generate.compile=false"
        )
