"""What routers choose is counted at every router, and summed over ranks."""

import pytest
import torch
from families import family_model

from spd_dist.inference.routing import route_counts, router_summary, routers

TEXTS = [tuple(range(3, 20)), tuple(range(5, 11)), tuple(range(8, 30))]


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "qwen3_next"])
def test_each_layer_with_experts_has_a_router(name):
    model = family_model(name)
    num_layers = 3 if name == "deepseek_v3" else 4
    assert len(routers(model)) == num_layers
    counts = route_counts(model, TEXTS[:1])
    assert [int(count_E.sum()) for count_E in counts.values()] == [17 * 2] * num_layers
    assert not any(module._forward_hooks for module in model.modules())


def test_a_dense_model_has_none():
    assert routers(family_model("llama")) == []


def test_the_counts_are_those_of_the_models_own_logits():
    model = family_model("mixtral")
    with torch.no_grad():
        logits = model(torch.tensor([TEXTS[0]]), output_router_logits=True).router_logits
    expected = [torch.bincount(one.topk(2).indices.flatten(), minlength=4) for one in logits]
    assert [count_E.tolist() for count_E in route_counts(model, TEXTS[:1]).values()] == [e.tolist() for e in expected]


def test_ranks_add_up_even_if_one_of_them_read_nothing():
    model = family_model("qwen3_moe")
    found = router_summary([route_counts(model, TEXTS)])
    assert found == router_summary([route_counts(model, [one]) for one in TEXTS] + [{}])
    assert (found.num_layers, found.num_experts, found.num_routed) == (4, 4, 4 * 45 * 2)
    assert 0 < found.entropy <= 1 <= found.largest_load <= 4
    assert all(sum(layer) == pytest.approx(1, abs=1e-5) for layer in found.shares)


def test_an_even_spread_is_one_and_a_single_expert_the_number_of_all():
    even = router_summary([{"gate": torch.tensor([5, 5, 5, 5])}])
    assert (even.entropy, even.largest_load, even.num_unused) == (pytest.approx(1), 1, 0)
    single = router_summary([{"gate": torch.tensor([0, 20, 0, 0])}])
    assert (single.entropy, single.largest_load, single.num_unused) == (0, 4, 3)
