"""A compiled decode loop draws what the plain one draws, with the projection inside; what can't be compiled is said."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch
from generating import ALONE, SEED, policy_of, prompts, some_projection
from projections import four_sites
from tiny import save_tiny_model, tiny_model

from spd_dist.config import Generate
from spd_dist.errors import DataError
from spd_dist.inference.compiled_pass import CompiledPass
from spd_dist.inference.decode import decode
from spd_dist.inference.requests import DecodeSettings, Request
from spd_dist.inference.sampling import Sampling
from spd_dist.models.forward import call_model
from spd_dist.projection.hooks import projected
from spd_dist.stages.context import StageContext
from spd_dist.stages.generate import generate
from spd_dist.storage.completions import corpus_name, read_completions

NUM_TOKENS = 24
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for CPUs by g++")


def answers(model, compiled: CompiledPass | None = None, num: int = 5) -> dict[str, tuple[int, ...]]:
    requests = [Request(f"p{k}", 0, tuple(range(3, 8 + 2 * k)), seed=k) for k in range(num)]
    settings = DecodeSettings(Sampling(0.8, 0.95, max_new_tokens=NUM_TOKENS), frozenset({2}), 0, compiled=compiled)
    return {one.request.id: one.tokens for one in decode(model, requests, settings, batch_size=4)}


@pytest.fixture
def graphs(monkeypatch):
    """How often a graph gave logits."""
    calls = []
    of_graph = CompiledPass._of_graph

    def counted(self, cache, inputs):
        found = of_graph(self, cache, inputs)
        calls.append(tuple(inputs["attention_mask"].shape))
        return found

    monkeypatch.setattr(CompiledPass, "_of_graph", counted)
    return calls


@pytest.mark.slow
@needs_compiler
def test_tokens_are_those_of_plain_passes_with_the_projection_in_the_graph(graphs):
    model = tiny_model()
    with projected(model, four_sites()) as monitor:
        plain = answers(model)
        calls = dict(monitor.calls)
        compiled = CompiledPass(model)
        assert answers(model, compiled) == plain
        frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        with monitor.paused():
            assert answers(model, compiled) != plain, "the projection changes tokens here"
        assert answers(model, compiled) == plain
    assert len(graphs) > NUM_TOKENS
    assert len(set(graphs)) > 8, "of several shapes"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == frames + 1, "one with hooks, one without"
    assert all(monitor.calls[site] < 3 * count for site, count in calls.items()), "those in a graph are not counted"
    compiled.close()
    assert answers(model) != plain


@pytest.mark.seconds
def test_what_cannot_be_compiled_is_said_and_decoded_all_the_same(monkeypatch, caplog):
    model = tiny_model()
    plain = answers(model)
    layer = model.model.layers[0]
    monkeypatch.setattr(layer, "forward", torch.compiler.disable(layer.forward))
    with caplog.at_level(logging.WARNING):
        assert answers(model, CompiledPass(model)) == plain
    assert len([one for one in caplog.records if "can't be compiled" in one.message]) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_graphs_are_captured(graphs):
    model = tiny_model().to("cuda")
    with projected(model, four_sites()):
        assert answers(model, CompiledPass(model)) == answers(model)
    assert graphs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_that_leaves_a_hook_out_is_refused(monkeypatch, dtype):
    model = tiny_model().to(dtype)
    with projected(model, four_sites()) as monitor:

        def without_hooks(self, cache, inputs):
            with monitor.paused():
                return call_model(model, inputs).logits

        monkeypatch.setattr(CompiledPass, "_of_graph", without_hooks)
        with pytest.raises(DataError, match=r"generate.compile: True gives other logits .*set generate.compile=false"):
            answers(model, CompiledPass(model))


def test_memory_that_runs_out_in_a_graph_costs_the_graph_alone(monkeypatch, caplog):
    model = tiny_model()

    def full(self, cache, inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(CompiledPass, "_of_graph", full)
    assert answers(model, CompiledPass(model)) == answers(model)
    assert "can't be compiled: CUDA out of memory" in caplog.text


@pytest.mark.seconds
@needs_compiler
def test_a_stage_that_compiles_makes_the_same_corpus(graphs, tmp_path):
    policy, corpora = policy_of(save_tiny_model(tmp_path / "model")), []
    for compiles in (False, True):
        config = Generate(engine="hf", max_new_tokens=NUM_TOKENS, compile=compiles, placement="replica")
        context = StageContext(tmp_path / str(compiles), SEED, ALONE)
        generate(policy, prompts(6), some_projection(), config, context)
        corpora.append([one.tokens for one in read_completions(tmp_path / str(compiles) / corpus_name(6))])
    assert corpora[0] == corpora[1]
    assert graphs
