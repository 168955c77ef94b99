"""Dropout masks belong to tokens: they do not depend on batch, row or order, and are as random as they should be."""

import pytest
import torch

from spd_dist.errors import ConfigError
from spd_dist.models.lora import KeyedDropout, TokenKeys, mixed_, token_key, use_keyed_dropout


def keys(seeds: list[int], length: int) -> torch.Tensor:
    return token_key(torch.tensor(seeds).unsqueeze(1).expand(-1, length), torch.arange(length).expand(len(seeds), -1))


def dropped(module_key: int, key_BT: torch.Tensor, width: int, fraction: float = 0.1) -> torch.Tensor:
    module = KeyedDropout(fraction, TokenKeys(key_BT), module_key).train()
    return module(torch.ones(*key_BT.shape, width)) == 0


def test_the_share_of_dropped_features_is_right_for_every_row_token_and_feature():
    drop_BTD = dropped(0, keys(list(range(8)), 256), 512)
    for dims in [(0, 1, 2), (1, 2), (0, 2), (0, 1)]:
        shares = drop_BTD.double().mean(dims)
        count = drop_BTD.numel() / shares.numel()
        assert (shares - 0.1).abs().max() < 5 * (0.09 / count) ** 0.5


def test_masks_of_tokens_modules_and_seeds_are_independent():
    base = dropped(0, keys([1, 2], 128), 256)
    others = {
        "module": dropped(1 << 20, keys([1, 2], 128), 256),
        "seed": dropped(0, keys([3, 4], 128), 256),
        "token": base.roll(1, 1),
        "feature": base.roll(1, 2),
    }
    for name, other in others.items():
        both = (base & other).double().mean().item()
        assert abs(both - 0.01) < 5 * (0.01 / base.numel()) ** 0.5, name


def test_a_token_has_one_mask_wherever_it_stands():
    both = dropped(0, keys([11, 2**62 + 5], 20), 33)
    assert torch.equal(dropped(0, keys([2**62 + 5, 7], 9), 33)[0], both[1, :9])
    packed = torch.cat([keys([11], 20), keys([2**62 + 5], 20)], 1)
    assert torch.equal(dropped(0, packed, 33)[0], both.flatten(0, 1))


def test_survivors_are_scaled_and_gradients_flow_through_them_only():
    x = torch.randn(2, 5, 64, requires_grad=True)
    module = KeyedDropout(0.25, TokenKeys(keys([1, 2], 5)), 0).train()
    y = module(x)
    y.sum().backward()
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] / 0.75)
    torch.testing.assert_close(x.grad, kept.float() / 0.75)


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_the_ends_of_the_range(fraction):
    x = torch.ones(1, 4, 8)
    module = KeyedDropout(fraction, TokenKeys(keys([1], 4)), 0).train()
    assert torch.equal(module(x), x * (1 - fraction))
    assert module.eval()(x) is x


def test_the_mix_is_a_bijection():
    x = torch.randint(-(2**31), 2**31 - 1, (1 << 20,)).unique().to(torch.int32)
    mixed = mixed_(x.clone())
    assert mixed.unique().numel() == x.numel()
    assert abs((mixed < 0).double().mean() - 0.5) < 0.003


def test_only_dropout_modules_are_replaced():
    parts = [
        torch.nn.ModuleDict({"default": torch.nn.Dropout(0.3)}),
        torch.nn.ModuleDict({"default": torch.nn.Identity()}),
    ]
    use_keyed_dropout((part, "default") for part in parts)
    assert isinstance(parts[0]["default"], KeyedDropout)
    assert isinstance(parts[1]["default"], torch.nn.Identity)


def test_rows_that_are_not_tokens_are_refused():
    module = KeyedDropout(0.1, TokenKeys(keys([1], 4)), 0).train()
    with pytest.raises(
        ConfigError,
        match=r"finetune\.lora_dropout=0\.1: .*\(3, 8\)\) cannot have dropout; set finetune\.lora_dropout=0",
    ):
        module(torch.ones(3, 8))
