"""What is drawn: the distribution that the settings say, from a row's own numbers only."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from waits import Waits

import spd_dist.inference.sampling
from spd_dist.errors import DataError
from spd_dist.inference import drawing
from spd_dist.inference.drawing import Drawer
from spd_dist.inference.requests import DecodeSettings, Request
from spd_dist.inference.sampling import UNCERTAIN, Sampling, choose, choose_of_all, uniforms
from spd_dist.types import ThoughtBudget


def logits(seed: int, rows: int = 4, vocabulary: int = 300, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def chosen(logits_NV, uniform_N, sampling, seen_NV=None) -> torch.Tensor:
    """token_N of certain rows, and of the others."""
    token_N = choose(logits_NV, uniform_N, sampling, seen_NV)
    rest = token_N == UNCERTAIN
    if rest.any():
        seen_NV = None if seen_NV is None else seen_NV[rest]
        token_N[rest] = choose_of_all(logits_NV[rest], uniform_N[rest], sampling, seen_NV)
    return token_N


def reference_probabilities(logits_NV: torch.Tensor, sampling: Sampling, prompt_NT: torch.Tensor) -> torch.Tensor:
    """What transformers would draw from with the same settings."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    return processors(prompt_NT, logits_NV.clone()).double().softmax(-1)


@pytest.mark.seconds
@given(
    st.integers(0, 10_000),
    st.sampled_from([0.3, 0.7, 1.0, 1.6]),
    st.sampled_from([0, 1, 5, 40, 400]),
    st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    st.sampled_from([0.0, 0.02, 0.3]),
    st.sampled_from([1.0, 1.3]),
)
@settings(max_examples=60, deadline=None)
def test_each_token_owns_the_share_of_the_unit_interval_that_transformers_gives_it(
    seed, temperature, top_k, top_p, min_p, penalty
):
    sampling = Sampling(temperature, top_p, top_k, min_p, penalty)
    row_V = logits(seed, rows=1, scale=0.5 if seed % 2 else 4.0)[0]
    prompt_NT = torch.tensor([[3, 5, 8, 8, 250]])
    expected_V = reference_probabilities(row_V[None], sampling, prompt_NT)[0]
    uniform_N = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    seen_NV = torch.zeros(2000, len(row_V), dtype=torch.bool)
    seen_NV[:, prompt_NT[0]] = True
    token_N = chosen(row_V.expand(2000, -1), uniform_N, sampling, None if penalty == 1 else seen_NV)
    found_V = torch.bincount(token_N, minlength=len(row_V)) / 2000
    assert (found_V - expected_V).abs().max() <= 1 / 2000 + 1e-6
    assert not (found_V[expected_V == 0] > 0).any()


def test_a_row_does_not_depend_on_the_rows_beside_it():
    logits_NV, uniform_N = logits(1, rows=64, vocabulary=5000, scale=0.3), uniforms(3, 64)
    for sampling in (Sampling(), Sampling(1.0, 1.0), Sampling(1.6, 0.8, 20), Sampling(0.0)):
        together_N = chosen(logits_NV, uniform_N, sampling)
        alone_N = torch.cat([chosen(logits_NV[i : i + 1], uniform_N[i : i + 1], sampling) for i in range(64)])
        assert together_N.equal(alone_N)


def test_rounding_that_swaps_two_nearly_equal_logits_does_not_swap_their_intervals():
    logits_NV = torch.tensor([[1.0, 2.0, 2.0 + 1e-6, 0.5]])
    swapped_NV = logits_NV[:, [0, 2, 1, 3]]
    for uniform in torch.linspace(0.01, 0.99, 50, dtype=torch.float64):
        both = [chosen(one_NV, uniform[None], Sampling(1.0, 0.9)) for one_NV in (logits_NV, swapped_NV)]
        assert both[0].equal(both[1])


def test_ties_at_the_edge_of_the_truncation_go_to_the_lower_token():
    logits_NV = torch.zeros(1, 500)
    kept = {
        chosen(logits_NV, torch.tensor([u]), Sampling(1.0, 1.0, top_k=3)).item() for u in (0.0, 0.2, 0.5, 0.7, 0.99)
    }
    assert kept == {0, 1, 2}


def test_the_largest_uniform_number_never_draws_a_token_of_weight_zero():
    largest_N = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert chosen(torch.tensor([[0.0, 5.0, -torch.inf]]), largest_N, Sampling(1.0, 1.0)).item() == 1
    assert chosen(torch.tensor([[0.0, 5.0, -9.0]]), largest_N, Sampling(1.0, 0.5)).item() == 1


def test_a_longer_completion_begins_with_the_random_numbers_of_a_shorter_one():
    assert uniforms(5, 300)[:7].equal(uniforms(5, 7))
    assert not uniforms(5, 7).equal(uniforms(6, 7))
    assert uniforms(2**63 - 1, 1).shape == (1,)


def test_the_random_state_of_the_process_is_left_alone():
    before = torch.get_rng_state()
    chosen(logits(0), uniforms(1, 4), Sampling())
    assert before.equal(torch.get_rng_state())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_numbers_are_named(value):
    drawer = drawer_of(2, Sampling(), vocabulary=5)
    with pytest.raises(DataError, match="logits are NaN or infinite; check the weights"):
        drawer.draw(torch.full((2, 5), value))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("truncation", [{}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_a_gpu_draws_what_a_cpu_draws(truncation):
    draw = torch.Generator().manual_seed(0)
    logits_NV, uniform_N = torch.randn(64, 2048, generator=draw), torch.rand(64, generator=draw, dtype=torch.float64)
    sampling = Sampling(max_new_tokens=1, **({"top_p": 1.0} | truncation))
    on_gpu_N = chosen(logits_NV.cuda(), uniform_N.cuda(), sampling)
    assert on_gpu_N.tolist() == chosen(logits_NV, uniform_N, sampling).tolist()


def drawer_of(num_rows: int, sampling: Sampling, vocabulary: int = 300, **asked: object) -> Drawer:
    """Rows that have drawn nothing yet."""
    drawer = Drawer(DecodeSettings(sampling, frozenset(), 0), num_rows, torch.device("cpu"))
    drawer.admit([Request(str(seed), 0, (4, 5), seed, **asked) for seed in range(num_rows)], vocabulary)
    return drawer


EVERYTHING = {"budget": ThoughtBudget(2, 7, 8), "measures_entropy": True}
"""That a request may ask of its draws."""


@pytest.mark.parametrize("sampling", [
    Sampling(0.0), Sampling(1.0, 1.0), Sampling(0.7, 0.9), Sampling(1.0, 0.9, top_k=5, repetition_penalty=1.3),
])  # fmt: skip
@pytest.mark.parametrize("asked", [{}, EVERYTHING])
def test_a_draw_waits_for_the_device_once_and_takes_as_many_operators_for_many_rows(sampling, asked, monkeypatch):
    monkeypatch.setattr(spd_dist.inference.sampling, "ENTROPY_ROWS", {})  # as on an accelerator
    operators = []
    for num_rows in (2, 16):
        drawer, logits_NV = drawer_of(num_rows, sampling, **asked), 9 * torch.eye(num_rows, 300)
        for _ in range(3):
            with Waits() as waits:
                drawer.draw(logits_NV)
            assert waits.found == ["tolist"]
        operators.append(waits.num_operators)
    assert operators[0] == operators[1]


@pytest.mark.parametrize("sampling", [Sampling(1.0, 0.99), Sampling(1.3, 0.9, min_p=0.001, repetition_penalty=1.4)])
def test_tokens_that_are_read_a_draw_later_are_the_same(sampling, monkeypatch):
    """Of nuclei that are wider than the candidates, now and then."""
    logits_TNV = [logits(step, rows=6, scale=0.3 + step % 3) for step in range(20)]
    at_once = drawer_of(6, sampling)
    for logits_NV in logits_TNV:
        at_once.draw(logits_NV)
    monkeypatch.setattr(drawing, "READ_LATE", {"cpu"})
    late, steps = drawer_of(6, sampling), [0] * 6
    while min(steps) < 20:  # a row whose token is not known yet makes its last pass again
        steps = late.state_BF[:, drawing.COUNT].tolist()
        late.draw(torch.stack([logits_TNV[min(step, 19)][row] for row, step in enumerate(steps)]))
    late.read_all()
    assert [row.tokens[:20] for row in late.rows] == [row.tokens for row in at_once.rows]
