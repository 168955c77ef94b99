"""Linear layers in the layout of a CPU's products give what they gave, and are what they were when it ends."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from projections import four_sites
from tiny import tiny_model
from torch import nn

from spd_dist.inference import packed_weights as module
from spd_dist.inference.decode import decode
from spd_dist.inference.packed_weights import packed_weights
from spd_dist.inference.requests import DecodeSettings, Request
from spd_dist.inference.sampling import Sampling
from spd_dist.projection.hooks import projected

pytestmark = pytest.mark.skipif(
    not module._has_products(torch.float32), reason="this CPU or this build of torch has no packed products"
)


def linear_layers(*, bias: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 96, bias=bias), nn.Linear(96, 33, bias=bias)).to(dtype).requires_grad_(False)


def packed(model: nn.Module) -> list[str]:
    return [name for name, layer in model.named_modules() if "forward" in vars(layer)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (3,), (4,), (40,), (2, 7), (5, 1)])
def test_products_are_the_same_to_rounding_and_in_bfloat16_to_the_bit(bias, shape):
    for dtype in (torch.float32, torch.bfloat16):
        if not module._has_products(dtype):
            continue
        model = linear_layers(bias=bias, dtype=dtype)
        x = torch.randn(*shape, 48).to(dtype)
        with torch.no_grad():
            plain = model(x)
            with packed_weights(model):
                assert packed(model) == ["0", "1"]
                found = model(x)
        assert found.shape == plain.shape
        assert torch.equal(found, plain) if dtype == torch.bfloat16 else torch.allclose(found, plain, atol=1e-5)


def test_rows_that_are_no_neighbours_in_memory():
    model, x = linear_layers(), torch.randn(48, 12).T
    with torch.no_grad(), packed_weights(model):
        assert torch.allclose(model(x), model(x.contiguous()), atol=1e-5)


def test_layers_are_themselves_again_also_after_an_error():
    model = linear_layers()

    def fail() -> None:
        with packed_weights(model):
            assert packed(model)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not packed(model)
    with packed_weights(model), packed_weights(model):  # the outer one holds
        assert packed(model) == ["0", "1"]
    assert not packed(model)


def test_what_is_trained_in_shards_on_another_device_or_no_plain_layer_stays():
    class Special(nn.Linear):
        pass

    layers = [nn.Linear(48, 48) for _ in range(4)] + [Special(48, 48)]
    model = nn.Sequential(*layers, nn.Linear(48, 48).double()).requires_grad_(False)
    layers[1].weight.requires_grad_(True)
    layers[2].weight.data = torch.empty(0)
    layers[3].to("meta")
    with packed_weights(model):
        assert packed(model) == ["0"]


def test_no_copy_is_made_where_memory_is_short(monkeypatch, caplog):
    class Host:
        def available_memory(self) -> int:
            return 4 * 4 * (48 * 96 + 96 * 33) - 4

    monkeypatch.setattr(module, "accelerator", Host)
    caplog.set_level("INFO")
    with packed_weights(model := linear_layers()):
        assert not packed(model)
    assert "without packed weights" in caplog.text


def test_decoding_multiplies_by_packed_weights_under_a_projection(monkeypatch):
    model = tiny_model().eval().requires_grad_(False)
    work = [Request(str(index), 0, tuple(range(3 + index, 20 + index)), index) for index in range(12)]
    settings = DecodeSettings(Sampling(temperature=0.0, max_new_tokens=8), frozenset(), 0)
    answers = {}
    for is_packed in (True, False):
        if not is_packed:
            monkeypatch.setattr(module, "_has_products", lambda dtype: False)
        with projected(model, four_sites()) as monitor:
            found = decode(model, work, settings, batch_size=8)
            first = next(found)
            assert bool(packed(model)) is is_packed
            answers[is_packed] = {one.request.id: one.tokens for one in (first, *found)}
        assert monitor.leakage() < 1e-5
    assert answers[True] == answers[False]
    assert not packed(model)


MANY_NUMBERS_OF_ROWS = """
from pathlib import Path
import torch
from torch import nn
from spd_dist.inference.packed_weights import packed_weights

def mib():
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) / 1024

torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(576, 1536), nn.Linear(1536, 576), nn.Linear(576, 192)).requires_grad_(False)
with torch.no_grad(), packed_weights(model):
    model(torch.randn(8, 576))
    before = mib()
    for rows in range(4, 404):
        model(torch.randn(rows, 576))
print(mib() - before)
"""


@pytest.mark.seconds
def test_products_of_ever_other_numbers_of_rows_are_not_all_kept():
    """A long run meets many, and kept half a GiB of them."""
    done = subprocess.run([sys.executable, "-c", MANY_NUMBERS_OF_ROWS], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 150
