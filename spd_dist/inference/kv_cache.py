"""A KV cache whose rows come and go: the token at position p of a row lies in column p of its slot.

Shapes: B slots, N rows of a pass, H KV heads, C columns, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

ZEROED_COLUMNS = 64


@dataclass
class Window:
    """The part of the slots that the next pass reads: the first columns, of the rows that it has."""

    num_columns: int = 0
    row_N: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    column_N: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    """Where each row's new token goes."""


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values, with room for every slot."""

    is_sliding = False
    is_compileable = True  # transformers then reads no mask back to see whether it can do without
    keys: Any  # tensors, once there is room
    values: Any

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: `SlotCache.admit` makes the room before the first pass."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one new token a row; give all that the rows may attend to."""
        window = self.window
        self.keys[window.row_N, :, window.column_N] = key_states[:, :, 0]
        self.values[window.row_N, :, window.column_N] = value_states[:, :, 0]
        part = (slice(len(window.row_N)), slice(None), slice(window.num_columns))
        return self.keys[part], self.values[part]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the attention mask."""
        return self.window.num_columns, 0

    def get_seq_length(self) -> int:
        """The columns before the last: no column of the window lies in any row's future."""
        return self.window.num_columns - 1

    def get_max_length(self) -> int:
        """Columns of a slot."""
        return self.keys.shape[2]


class SlotCache(Cache):
    """The slots of all layers: `admit` a prefilled row, `move` a row to a free slot, `open` the window for a pass.

    All memory is taken at the first row, once; what no row reaches is never touched, and so costs a CPU none.
    """

    def __init__(self, num_layers: int, num_slots: int, num_columns: int) -> None:
        """`num_columns`: the longest prompt and its completion."""
        self.window = Window()
        self.num_slots, self.num_columns, self.num_zeroed = num_slots, num_columns, 0
        self.slots = [SlotLayer(self.window) for _ in range(num_layers)]
        self.row_B = torch.arange(num_slots)
        super().__init__(layers=list(self.slots))

    def _reserve(self, like: Cache) -> None:
        """Make the room, layer by layer, of as many heads and as wide as `like`."""
        for layer, source in zip(self.slots, plain_layers(like), strict=True):
            layer.keys, layer.values = self._room(source.keys), self._room(source.values)
            layer.is_initialized = True
        self.row_B = self.row_B.to(self.slots[0].keys.device)

    def _room(self, like: Tensor) -> Tensor:
        return like.new_empty(self.num_slots, like.shape[1], self.num_columns, like.shape[3])

    def _zero(self, num_columns: int) -> None:
        """So many columns begin as zeros: what is masked out must at least be finite."""
        if num_columns > self.num_zeroed:
            first, self.num_zeroed = self.num_zeroed, min(num_columns + ZEROED_COLUMNS, self.num_columns)
            for layer in self.slots:
                layer.keys[:, :, first : self.num_zeroed] = 0
                layer.values[:, :, first : self.num_zeroed] = 0

    def admit(self, prefilled: Cache, row: int, slot: int, *, prefix: int, num_columns: int) -> None:
        """Copy a prefilled row to a slot: its first `prefix` columns, and the last ones; padding is in between."""
        if not self.slots[0].is_initialized:
            self._reserve(prefilled)
        self._zero(num_columns)
        for layer, source in zip(self.slots, plain_layers(prefilled), strict=True):
            for kept, made in ((layer.keys, source.keys), (layer.values, source.values)):
                kept[slot, :, :prefix] = made[row, :, :prefix]
                kept[slot, :, prefix:num_columns] = made[row, :, made.shape[2] - (num_columns - prefix) :]

    def move(self, source: int, target: int, num_columns: int) -> None:
        """Copy slot `source` over slot `target`."""
        for layer in self.slots:
            layer.keys[target, :, :num_columns] = layer.keys[source, :, :num_columns]
            layer.values[target, :, :num_columns] = layer.values[source, :, :num_columns]

    def open(self, column_N: Tensor, num_columns: int) -> None:
        """Set the window for a pass that adds one token a row, in the columns `column_N`."""
        self._zero(num_columns)
        self.window.num_columns = num_columns
        self.window.row_N, self.window.column_N = self.row_B[: len(column_N)], column_N


def prefill_cache(num_layers: int, prefix: Cache | None = None, num_rows: int = 1) -> Cache:
    """A cache that keeps every column, also in layers that attend to a window; it begins with the prefix's, if any."""
    layers = [DynamicLayer() for _ in range(num_layers)]
    if prefix is not None:
        for layer, source in zip(layers, plain_layers(prefix), strict=True):
            layer.update(source.keys.expand(num_rows, -1, -1, -1), source.values.expand(num_rows, -1, -1, -1))
    return Cache(layers=list(layers))


def plain_layers(cache: Cache) -> list[Any]:
    """The layers of a cache that holds keys and values alone; their class says of neither that it is there."""
    return list(cache.layers)


def num_slot_layers(config: PretrainedConfig, max_length: int) -> int:
    """Layers of plain keys and values, if slots can hold this model's cache; 0 if they cannot.

    They can where every layer keeps all keys and values, or a sliding window that no row outgrows. States of linear
    attention, indexers and shared layers stay with the model's own cache class.
    """
    layers = DynamicCache(config=config).layers
    is_plain = [
        type(layer) is DynamicLayer or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window >= max_length)
        for layer in layers
    ]
    return len(layers) if all(is_plain) else 0
