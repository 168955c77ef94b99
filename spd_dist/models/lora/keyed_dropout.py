"""Dropout whose masks are drawn by hashing token and feature: the same on any number of ranks, in any batches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spd_dist.errors import ConfigError

_INT32 = 2**32
_MULTIPLIERS = (0x7FEB352D, 0x846CA68B - _INT32)  # of the finaliser lowbias32, whose bias is near the least known


@dataclass
class TokenKeys:
    """The keys of the micro-batch in flight, shared by all dropout modules of a model."""

    key_BT: Tensor | None = None


class KeyedDropout(nn.Module):
    """`nn.Dropout` with masks drawn by hashing; the identity in eval mode."""

    def __init__(self, fraction: float, keys: TokenKeys, module_key: int) -> None:
        super().__init__()
        self.fraction = fraction
        self.keys = keys
        self.module_key = module_key

    def forward(self, x_BTD: Tensor) -> Tensor:
        """`x_BTD` with features dropped and the others scaled by 1 / (1 - fraction).

        Raises:
            ConfigError: the input's rows are not the micro-batch's tokens, as in a mixture's experts.
        """
        if not self.training or self.fraction == 0:
            return x_BTD
        key_BT = self.keys.key_BT
        if key_BT is None or x_BTD.shape[:-1].numel() != key_BT.numel():
            raise ConfigError(
                f"finetune.lora_dropout={self.fraction}: a module whose input rows are not the tokens of the batch "
                f"(got {tuple(x_BTD.shape)}) cannot have dropout; set finetune.lora_dropout=0"
            )
        drop_BTD = self._drop(key_BT, x_BTD.shape[-1]).view_as(x_BTD)
        return x_BTD.masked_fill(drop_BTD, 0.0) * (1 / (1 - self.fraction)) if self.fraction < 1 else x_BTD * 0

    def _drop(self, key_BT: Tensor, width: int) -> Tensor:
        feature_D = torch.arange(width, dtype=torch.int32, device=key_BT.device) + self.module_key
        bits_BTD = key_BT.unsqueeze(-1) ^ mixed_(mixed_(feature_D))
        return _rounds_(bits_BTD) < round(self.fraction * _INT32) - _INT32 // 2


def mixed_(x: Tensor) -> Tensor:
    """A bijection of int32 that spreads every bit over all others, in place."""
    _rounds_(x)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def _rounds_(x: Tensor) -> Tensor:
    """The same without its last step, which only the low bits need."""
    for multiplier, shift in zip(_MULTIPLIERS, (16, 15), strict=True):
        x.bitwise_xor_((x >> shift).bitwise_and_((1 << (32 - shift)) - 1))  # a shift of int32 repeats the sign
        x.mul_(multiplier)
    return x


def token_key(sequence_seed_BT: Tensor, position_BT: Tensor) -> Tensor:
    """The int32 key of each token, from its sequence's seed of this step (any int64) and its position there."""
    low_BT = (sequence_seed_BT & 0xFFFFFFFF).to(torch.int32)
    high_BT = (sequence_seed_BT >> 32).to(torch.int32)
    return mixed_(mixed_(mixed_(position_BT.to(torch.int32)) ^ low_BT) ^ high_BT)


def use_keyed_dropout(modules: Iterable[tuple[nn.ModuleDict, str]]) -> TokenKeys:
    """Replace each named `nn.Dropout` by a `KeyedDropout`; returns the keys that the training loop sets.

    The order of `modules` numbers them, so it must be the same in every run.
    """
    keys = TokenKeys()
    for index, (parent, name) in enumerate(modules):
        dropout = parent[name]
        if isinstance(dropout, nn.Dropout):
            # Modules are 2**20 features apart: no two share a hash input.
            parent[name] = KeyedDropout(dropout.p, keys, (index << 20) % 2**31)
    return keys
