"""Generation by a server: the same greedy corpus, faults that pass or end in a sentence, another policy refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
from generating import ALONE, CONFIG, SEED, StoppingAfter, corpus, merged, policy_of, prompts, some_projection
from serving import serving
from tiny import save_tiny_model

from spd_dist.config import Generate, Server
from spd_dist.errors import ConfigError, DataError
from spd_dist.inference.engine_probes import NUM_PROBES
from spd_dist.projection.hooks import projected
from spd_dist.stages.context import StageContext
from spd_dist.stages.generate import generate

pytestmark = pytest.mark.seconds

GREEDY = dataclasses.replace(CONFIG, temperature=0.0, num_samples=1, engine="hf")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def policy(model):
    return policy_of(model)


@pytest.fixture
def server(model, monkeypatch):
    """What the server serves is folded."""
    monkeypatch.setattr("spd_dist.inference.external.server_engine.FIRST_PAUSE_SECONDS", 0.01)
    served = policy_of(model)
    with projected(served.model, some_projection(), "fold", observe=0), serving(served) as found:
        yield found


def asking(server, **changes) -> Generate:
    settings = Server(url=server.url, models={"spd": "folded"}, **changes)
    return dataclasses.replace(GREEDY, engine="server", server=settings)


def made(policy, folder, config, held_to=None, **more):
    context = StageContext(folder, SEED, ALONE, **more)
    return generate(policy, prompts(), held_to or some_projection(), config, context)


def test_a_server_gives_the_same_greedy_corpus_through_its_faults(policy, model, server, tmp_path):
    """Busy, failing and closing while it works; every field of the sampling is sent."""
    expected = corpus(model, tmp_path / "hf", GREEDY)
    server.faults.extend([lambda answer: answer] * 4 + [429, 500, "close", 503, "close"])
    summary = made(policy, tmp_path / "server", asking(server))
    assert merged(tmp_path / "server", summary) == expected
    assert summary.samples.startswith("each its own")
    wanted = {"model": "folded", "temperature": 0.0, "top_p": 0.9, "top_k": -1, "min_p": 0.0, "return_token_ids": True}
    assert wanted.items() <= server.bodies[-1].items()
    assert {"seed", "repetition_penalty", "presence_penalty", "frequency_penalty", "stop"} <= server.bodies[-1].keys()


def test_servers_share_the_work_and_one_that_is_gone_leaves_it_to_the_others(policy, model, server, tmp_path):
    served = policy_of(model)
    with projected(served.model, some_projection(), "fold", observe=0), serving(served) as second:
        both = dataclasses.replace(asking(server).server, url=f"{server.url}, {second.url}")
        config = dataclasses.replace(asking(server), server=both)
        # The probes of the second are answered; then it closes every request.
        second.faults.extend([lambda answer: answer] * NUM_PROBES + ["close"] * 100)
        summary = made(policy, tmp_path / "run", config)
        assert len(second.bodies) > NUM_PROBES, "it was asked, too"
    assert merged(tmp_path / "run", summary) == corpus(model, tmp_path / "hf", GREEDY)


def test_each_of_several_servers_must_serve_the_policy(policy, model, server, tmp_path):
    with serving(policy_of(model)) as plain:
        both = dataclasses.replace(asking(server).server, url=f"{server.url},{plain.url}")
        with pytest.raises(DataError, match=f"'folded' of {plain.url} gives the log-probability"):
            made(policy, tmp_path / "run", dataclasses.replace(asking(server), server=both))


def test_a_server_that_stays_busy_ends_in_a_sentence_and_the_same_command_goes_on(policy, model, server, tmp_path):
    server.faults.extend([lambda answer: answer] * 8 + [429] * 20)
    with pytest.raises(DataError, match=r"failed 3 times \(generate.server.retries\), the last with 429: .*is kept"):
        made(policy, tmp_path / "run", asking(server, retries=2, concurrency=1))
    server.faults.clear()
    parts = (tmp_path / "run/completions").glob("*.jsonl")
    assert sum(len(part.read_text().splitlines()) for part in parts) == 4, "8 answers, of which 4 were to the probes"
    with pytest.raises(DataError, match="the disk is full"):
        made(policy, tmp_path / "run", asking(server), progress=StoppingAfter(2))
    summary = made(policy, tmp_path / "run", asking(server))
    assert merged(tmp_path / "run", summary) == corpus(model, tmp_path / "hf", GREEDY)


def test_another_policy_or_precision_is_refused_by_its_log_probabilities(policy, server, tmp_path):
    with pytest.raises(
        DataError, match=r"generate.engine=server: to token 0 .* 'folded' of http://.* gives the log-probability"
    ):
        made(policy, tmp_path / "a", asking(server), some_projection(1))
    assert not list((tmp_path / "a").rglob("*.jsonl"))

    def off(answer):
        answer["choices"][0]["logprobs"]["token_logprobs"][0] += 0.1
        return answer

    server.faults.append(off)
    with pytest.raises(DataError, match=r"another precision than float32; serve this arm's weights"):
        made(policy, tmp_path / "b", asking(server))


def changed(**values):
    def change(answer):
        return {"choices": [answer["choices"][0] | values]}

    return change


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (changed(token_ids=None), r"which has no choices\[0\].token_ids .*; take a server that gives token ids"),
        (changed(token_ids=[5] * 11 + [999]), r"with token 999, and the policy has 259; it runs another model"),
        (changed(token_ids=[5], finish_reason="length"), r"with 1 tokens that neither end nor are max_new_tokens=12"),
        (changed(logprobs={"token_logprobs": [float("nan")]}), "log-probabilities that are NaN"),
        (lambda _: {"choices": []}, r"which has no choices"),
        (404, r"refuses prompt 'p\d+' with 404: "),
    ],
)
def test_an_answer_that_is_none_ends_in_a_sentence(policy, server, tmp_path, fault, message):
    server.faults.extend([lambda answer: answer] * 4 + [fault])
    with pytest.raises(DataError, match=message):
        made(policy, tmp_path, asking(server, concurrency=1))
    lines = [json.loads(line) for part in tmp_path.rglob("*.jsonl") for line in part.read_text().splitlines()]
    assert lines == []


def test_settings_without_a_model_or_an_address_and_what_cannot_be_folded_are_refused(policy, server, tmp_path):
    named = dataclasses.replace(asking(server), server=Server(url=server.url, models={"base": "plain"}))
    with pytest.raises(ConfigError, match=r"generate.server.models: .* of base, and not of spd; set .*spd=NAME"):
        made(policy, tmp_path, named)
    with pytest.raises(ConfigError, match=r"generate.server.url: 'ftp://x' is not valid .*; set it to http://"):
        made(policy, tmp_path, dataclasses.replace(named, server=Server(url="ftp://x")))
    with pytest.raises(ConfigError, match=r"generate.server.url: a name or password in an address is not sent"):
        made(policy, tmp_path, dataclasses.replace(named, server=Server(url="http://me:secret@host/v1")))
    with pytest.raises(ConfigError, match=r"project.insertion=rope: .* cannot be folded into weights"):
        made(policy, tmp_path, asking(server), dataclasses.replace(some_projection(), insertion="rope"))
    assert server.bodies == []
