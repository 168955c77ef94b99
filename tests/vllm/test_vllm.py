"""The vLLM engine against a real vLLM, on a CPU: `make test-vllm` installs one and runs these.

SPD_VLLM_PYTHON names an interpreter that has it; without it these are skipped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from generating import ALONE, SEED, StoppingAfter, policy_of, prompts
from peft import LoraConfig, get_peft_model
from ranks import run_on_ranks
from tiny import save_tiny_model, tiny_model

from spd_dist.config import Data, Distributed, Evaluate, Generate, Model, Server
from spd_dist.data.prompts import TestSet, make_prompts
from spd_dist.data.tasks import find_task
from spd_dist.distributed.world import World
from spd_dist.errors import ConfigError, DataError
from spd_dist.inference.external.external_engine import running
from spd_dist.inference.external.vllm_engine import VLLMEngine, site_settings, vllm_environment, vllm_settings
from spd_dist.inference.external.vllm_process import INSIDE, EnginePool
from spd_dist.inference.requests import Request
from spd_dist.inference.sampling import Sampling
from spd_dist.models.policy import Policy, load_replica
from spd_dist.stages.context import StageContext
from spd_dist.stages.evaluate import evaluate_arm
from spd_dist.stages.generate import CorpusSummary, generate
from spd_dist.storage.answers import answers_path, read_answers
from spd_dist.storage.completions import CORPUS, read_completions
from spd_dist.types import Completion, KVSite, Projection, SiteOperator

PYTHON = os.environ.get("SPD_VLLM_PYTHON")
pytestmark = [
    pytest.mark.skipif(PYTHON is None, reason="SPD_VLLM_PYTHON names no interpreter with vllm: make test-vllm"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SHAPE = {"head_dim": 64, "num_key_value_heads": 2}  # vLLM's attention on CPUs has no smaller heads
WIDTH = 128
HF = Generate(engine="hf", temperature=0.0, max_new_tokens=12, batch_size=8)
VLLM = dataclasses.replace(HF, engine="vllm", vllm_python=PYTHON, vllm_options={"kv_cache_memory_bytes": 2**28})
ANSWERED = Evaluate(max_new_tokens=8, engine="vllm")
TASK = find_task("arithmetic")


def projection(*, keep: float = 0.0, insertion: str = "linear") -> Projection:
    """Half of the width of layer 2's keys and values, at random; under `head`, half of each head."""
    generator, operators = torch.Generator().manual_seed(3), {}
    for kind, module in (("key", "k_proj"), ("value", "v_proj")):
        site = KVSite(2, kind, f"model.layers.2.self_attn.{module}", ((0, WIDTH),), 2)
        bases = [torch.linalg.qr(torch.randn(64, 32, generator=generator))[0] for _ in range(2)]
        basis_DR = torch.block_diag(*bases)
        if insertion != "head":
            basis_DR = torch.linalg.qr(torch.randn(WIDTH, 64, generator=generator))[0]
        operators[site] = SiteOperator(keep, basis_DR, torch.full((64,), 1 - keep))
    return Projection(operators, insertion)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), **SHAPE)


@pytest.fixture(scope="module")
def policy(model) -> Policy:
    return policy_of(model)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(tiny_model(**SHAPE), lora).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Iterator[EnginePool]:
    """One engine for the tests that can share it: any projection of layer 2, and an adapter."""
    found = EnginePool(tmp_path_factory.mktemp("engines"))
    sites = [site_settings(site, insertion) for insertion in ("linear", "rope") for site in projection().operators]
    found.sites, found.lora_rank = tuple(sorted(set(sites))), 4
    with found.closed_at_the_end():
        yield found


def made(
    policy: Policy, folder: Path, config: Generate, held_to: Projection | None, pool: EnginePool | None = None, **more
) -> tuple[CorpusSummary, list[Completion]]:
    context = StageContext(folder, SEED, ALONE, engines=pool, **more)
    summary = generate(policy, prompts(64), held_to, config, context)
    return summary, read_completions(folder / CORPUS)


def agreement(found: list[Completion], expected: list[Completion]) -> float:
    """Share of tokens up to the first difference of each completion."""
    same = total = 0
    for one, other in zip(found, expected, strict=True):
        assert one.id == other.id
        pairs = zip(one.tokens, other.tokens, strict=False)
        same += next((index for index, (left, right) in enumerate(pairs) if left != right), len(other.tokens))
        total += len(other.tokens)
    return same / total


@pytest.mark.parametrize(
    ("held_to", "apply_as"),
    [
        (None, "hook"),
        (projection(), "hook"),
        (projection(keep=0.3), "hook"),
        (projection(insertion="head"), "hook"),
        (projection(insertion="rope"), "hook"),
        (projection(), "fold"),
    ],
    ids=["plain", "hard", "blend", "per head", "after RoPE", "folded"],
)
def test_greedy_answers_are_those_of_our_own_loop(policy, tmp_path, pool, held_to, apply_as):
    """64 prompts in float32, the projection as a plugin on decoded tokens, or folded; one engine for all plugins."""
    _, expected = made(policy, tmp_path / "hf", HF, held_to)
    config = dataclasses.replace(VLLM, apply_as=apply_as)
    summary, found = made(policy, tmp_path / "vllm", config, held_to, pool if apply_as == "hook" else None)
    assert agreement(found, expected) >= 0.99
    assert pool.num_starts == 1
    if apply_as == "fold":
        assert summary.engine_starts == 1
    if held_to is not None:
        assert summary.leakage < 1e-5
        num_fed = sum(len(one.tokens) - 1 for one in found)
        assert min(summary.hook_calls.values()) >= (num_fed if apply_as == "hook" else 1)


def test_a_process_that_died_before_its_settings_came_is_started_again(policy, tmp_path):
    """It is begun while the policy answers the probes."""
    pool = EnginePool(tmp_path / "engines")
    with pool.closed_at_the_end():
        pool.prepare(VLLM, tmp_path, vllm_environment(VLLM, ALONE))
        begun = pool.process
        assert begun is not None
        assert begun.settings is None
        begun.process.kill()
        begun.process.wait()
        summary, found = made(policy, tmp_path / "run", VLLM, None, pool)
        assert pool.process is not begun
    assert (pool.num_starts, summary.engine_starts, len(found)) == (2, 2, 64)


def test_one_engine_answers_for_policy_students_and_projected_policy(model, policy, adapter, tmp_path, pool):
    rows = [{"id": f"r{i}", "question": "How many? " * (1 + i % 4), "solution": "4", "answer": "1"} for i in range(8)]
    test_set = TestSet(TASK, rows, make_prompts(rows, TASK, policy.tokenizer, Data()), seed=5)
    student = load_replica(Model(str(model)), Distributed(), ALONE, adapter=adapter)
    student.eos_token_ids = policy.eos_token_ids
    outputs = {}
    for name, one, held_to in (("base", policy, None), ("spd", student, None), ("projected", policy, projection())):
        for engine in ("hf", "vllm"):
            context = StageContext(tmp_path / engine, SEED, ALONE, generate=VLLM, engines=pool)
            config = dataclasses.replace(ANSWERED, engine=engine)
            evaluate_arm(one, test_set, config, context, arm=name, projection=held_to)
            outputs[name, engine] = [
                answer.output for answer in read_answers(answers_path(tmp_path / engine, name, TASK.name))
            ]
        assert outputs[name, "vllm"] == outputs[name, "hf"]
    assert outputs["base", "hf"] != outputs["spd", "hf"] != outputs["projected", "hf"]
    assert pool.num_starts <= 3, "another length of prompts starts another engine, another arm does not"


def test_a_sample_is_its_own_whatever_it_is_batched_with(policy, pool, tmp_path):
    """Also where vLLM would read prompts in parts, which its CPU build can't do for requests with a seed."""
    config = dataclasses.replace(VLLM, vllm_options={})
    engine = engine_of(policy, None, config, pool, tmp_path)
    work = [Request(f"p{i}", 0, (5, 6, 7 + i % 40) * 15, 1000 + i) for i in range(150)]
    sampling = Sampling(temperature=1.0, max_new_tokens=8)
    first = {one.request.id: one.tokens for one in engine.complete(work, sampling)}
    again = {one.request.id: one.tokens for one in engine.complete(work[::-1][:40], sampling)}
    assert len(first) == 150
    same = sum(first[name] == tokens for name, tokens in again.items())
    assert same >= 38
    other = [dataclasses.replace(one, seed=one.seed + 500) for one in work[:40]]
    assert sum(first[one.request.id] == one.tokens for one in engine.complete(other, sampling)) < 20


def engine_of(
    policy: Policy, held_to: Projection | None, config: Generate, pool: EnginePool, folder: Path
) -> VLLMEngine:
    settings = vllm_settings(policy, policy.origin, held_to, config, pool, 64)
    process = pool.of(config, settings, folder / "engine", vllm_environment(config, ALONE))
    return VLLMEngine(process, policy, held_to, "generate.engine=vllm")


def test_what_was_written_is_kept_when_a_stage_is_stopped_or_its_engine_dies(policy, tmp_path, pool):
    _, expected = made(policy, tmp_path / "hf", HF, projection())
    with pytest.raises(DataError, match="the disk is full"):
        made(policy, tmp_path / "vllm", VLLM, projection(), progress=StoppingAfter(10))
    parts = list((tmp_path / "vllm/completions").glob("*.jsonl"))
    assert sum(len(part.read_text().splitlines()) for part in parts) == 10

    own = EnginePool(tmp_path / "engines")

    class Killing(StoppingAfter):
        def advance(self, units: int = 1, tokens: int = 0) -> None:
            self.count -= units
            if self.count == 0:
                os.kill(own.process.process.pid, signal.SIGKILL)

    died = r"engine=vllm ended with exit code -9; .*kept; the end of"
    with own.closed_at_the_end(), pytest.raises(DataError, match=died):
        made(policy, tmp_path / "vllm", VLLM, projection(), own, progress=Killing(1))
    summary, found = made(policy, tmp_path / "vllm", VLLM, projection())
    assert summary.engine_starts == 1
    assert agreement(found, expected) >= 0.99
    assert sorted(path.name for path in (tmp_path / "vllm").iterdir()) == ["completions", "summary.json"]


def two_ranks(model: Path, folder: Path, config: Generate) -> None:
    world = World(torch.distributed.get_rank(), 2, torch.device("cpu"))
    policy = policy_of(model, world, zero_stage=3)
    summary = generate(policy, prompts(64), projection(), config, StageContext(folder, SEED, world))
    assert summary.engine_starts == 2 // config.tensor_parallel


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_two_ranks_have_an_engine_each_or_one_of_two_workers(model, policy, tmp_path, tensor_parallel):
    """Of a sharded policy; under tensor parallelism each worker projects its heads of all heads' keys and values."""
    config = dataclasses.replace(VLLM, tensor_parallel=tensor_parallel)
    run_on_ranks(2, tmp_path / "store", two_ranks, model, tmp_path / "vllm", config)
    _, expected = made(policy, tmp_path / "hf", HF, projection())
    assert agreement(read_completions(tmp_path / "vllm" / CORPUS), expected) >= 0.99


def test_a_model_that_vllm_cannot_run_is_an_error_with_its_own_words(tmp_path):
    small = policy_of(save_tiny_model(tmp_path / "model"))  # heads of 8
    with pytest.raises(DataError, match=r"engine=vllm ended with exit code 1(.|\n)*head_dim"):
        made(small, tmp_path / "run", VLLM, None)
    assert list((tmp_path / "run").glob("engine-*/rank-00000/engine.log"))


def test_what_cannot_work_is_refused_before_anything_starts(policy, tmp_path):
    for changes, message in (
        ({"pipeline_parallel": 2}, "generate.pipeline_parallel: 2 is not valid on a CPU"),
        ({"vllm_python": "/no/such"}, "generate.vllm_python: '/no/such' cannot be started: No such file"),
    ):
        with pytest.raises(ConfigError, match=message):
            made(policy, tmp_path, dataclasses.replace(VLLM, **changes), None)


@pytest.fixture(scope="module")
def server_url(model, adapter, tmp_path_factory) -> Iterator[str]:
    """A real vLLM server on loopback: the plain model, and a student as an adapter."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["--model", str(model), "--served-model-name", "plain", "--dtype", "float32", "--enforce-eager"]
    words += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "256", "--enable-lora"]
    words += ["--max-lora-rank", "8", "--lora-modules", f"student={adapter}", "--kv-cache-memory-bytes", str(2**28)]
    words += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "2048"]
    log = tmp_path_factory.mktemp("server") / "server.log"
    environment = vllm_environment(VLLM, ALONE)
    words = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", *words]
    with open(log, "wb") as file, running(words, environment, file):
        for _ in range(240):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                break
            time.sleep(1)
        else:
            raise AssertionError(log.read_text()[-3000:])
        yield f"http://127.0.0.1:{port}/v1"


def test_a_real_server_gives_the_greedy_corpus_and_a_students_answers(policy, model, adapter, server_url, tmp_path):
    """And is refused for another arm's policy, by its log-probabilities."""
    models = {"psr": "plain", "spd": "student"}
    config = dataclasses.replace(HF, engine="server", server=Server(url=server_url, models=models))
    _, expected = made(policy, tmp_path / "hf", HF, None)
    _, found = made(policy, tmp_path / "server", config, None, arm="psr")
    assert agreement(found, expected) >= 0.99
    with pytest.raises(DataError, match=f"'plain' of {server_url} gives the log-probability"):
        made(policy, tmp_path / "other", config, projection(), arm="psr")
    student = load_replica(Model(str(model)), Distributed(), ALONE, adapter=adapter)
    student.eos_token_ids = policy.eos_token_ids
    _, expected = made(student, tmp_path / "hf_student", HF, None)
    _, found = made(student, tmp_path / "server_student", config, None, arm="spd")
    assert agreement(found, expected) >= 0.99
    sampled = dataclasses.replace(config, temperature=1.0, num_samples=2)
    _, found = made(policy, tmp_path / "sampled", sampled, None, arm="psr")
    assert len({one.tokens for one in found}) > 64


def test_every_argument_that_is_sent_is_one_of_the_installed_vllm():
    """Also where no engine is started: of the requests, the engine, the workers and the adapters."""
    serve = importlib.util.spec_from_file_location("serve", INSIDE / "serve.py")
    module = importlib.util.module_from_spec(serve)
    serve.loader.exec_module(module)
    code = f"""
import dataclasses, inspect, sys
sys.path.insert(0, {str(INSIDE)!r})
import serve
from vllm import EngineArgs, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.v1.engine.llm_engine import LLMEngine
asked = dict(seed=1, sampling=dict(temperature=1.0, top_p=0.9, top_k=0, min_p=0.0, repetition_penalty=1.0,
             max_new_tokens=3, eos_token_ids=[2]))
assert serve.sampling_of(asked).max_tokens == 3
settings = dict(model="m", revision=None, dtype="float32", trust_remote_code=False, max_length=9, tensor_parallel=1,
                pipeline_parallel=1, sites=[], lora_rank=4, options='{{}}')
names = {{field.name for field in dataclasses.fields(EngineArgs)}}
assert not serve.engine_arguments(settings).keys() - names
assert "lora_request" in inspect.signature(LLMEngine.add_request).parameters
import kv_operators
"""
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
