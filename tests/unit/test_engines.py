"""Engines are interchangeable, and one that does not run the projected policy is found out."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from emulated import wait_for
from families import family_model
from generating import ALONE, CONFIG, PROGRAM, SEED, corpus, merged, policy_of, prompts, some_projection
from tiny import save_tiny_model, tiny_tokenizer

from examples.plain_generate import PLAIN
from spd_dist.config import Generate
from spd_dist.config.engines import Engine
from spd_dist.errors import ConfigError, DataError
from spd_dist.inference.engine_probes import Reference, check_probes, references
from spd_dist.inference.engine_table import ENGINES
from spd_dist.inference.external.external_engine import ExternalEngine, command_of, environment_of
from spd_dist.inference.external.vllm_process import INSIDE
from spd_dist.inference.hf_engines import ContinuousBatchingEngine, is_slow_dtype
from spd_dist.inference.open_engine import choose_engine
from spd_dist.inference.packed_weights import CACHES
from spd_dist.inference.placement import HEADROOM, MOST_ROWS_ON_CPU, largest_batch, needed_bytes, rows_of_a_pass
from spd_dist.inference.requests import Decoded, Request
from spd_dist.inference.sampling import Sampling
from spd_dist.models.policy import Policy
from spd_dist.process.launcher_watchdog import every_process
from spd_dist.projection.hooks import projected
from spd_dist.stages.context import StageContext
from spd_dist.stages.generate import generate
from spd_dist.types import Projection, Prompt

GREEDY = dataclasses.replace(CONFIG, temperature=0.0, num_samples=1)
REQUESTS = [Request(f"p{index}", 0, (5, 6, 7 + index), index) for index in range(3)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def policy(model: Path) -> Policy:
    return policy_of(model)


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return corpus(model, tmp_path_factory.mktemp("expected"), GREEDY)


def run(policy: Policy, folder: Path, projection: Projection | None = None, **changes: object) -> bytes:
    config, projection = dataclasses.replace(GREEDY, **changes), projection or some_projection()
    summary = generate(policy, prompts(), projection, config, StageContext(folder, SEED, ALONE))
    assert sorted(path.name for path in folder.iterdir()) == ["completions", "summary.json"]
    assert min(summary.hook_calls.values()) >= 1
    assert summary.leakage < 1e-5
    return merged(folder, summary)


def program(folder: Path, text: str) -> str:
    (folder / "program.py").write_text(text)
    return f"{sys.executable} {folder / 'program.py'} {{model}} {{prompts}} {{output}}"


def external(policy: Policy, folder: Path, text: str) -> ExternalEngine:
    words = command_of(program(folder, text), folder)
    return ExternalEngine("generate.engine=command", words, policy, folder / "scratch", environment_of(ALONE))


@pytest.mark.parametrize(("dtype", "capability", "is_slow"), [
    (torch.float32, "avx2", False), (torch.bfloat16, "avx2", True), (torch.bfloat16, "avx512_bf16", False),
    (torch.bfloat16, "amx_bf16", False), (torch.float16, "avx512_bf16", True), (torch.float16, "fp16_arith", False),
])  # fmt: skip
def test_a_cpu_that_only_stores_a_dtype_is_known(dtype, capability, is_slow):
    assert is_slow_dtype(dtype, torch.device("cpu"), {"amx_bf16": False, capability: True}) == is_slow
    assert not is_slow_dtype(dtype, torch.device("cuda"), {})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_slow_dtype_is_named_in_one_line(model, tmp_path, monkeypatch, caplog, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    corpus(model, tmp_path, GREEDY, dtype)
    warned = [line for line in caplog.messages if "no instructions" in line]
    expected = "generate: this CPU has no instructions for torch.bfloat16; model.dtype=float32 is faster"
    assert warned == ([expected] if dtype == "bfloat16" else [])


def test_each_name_of_an_engine_has_its_row():
    assert set(ENGINES) == set(get_args(Engine)) - {"auto"}


def test_the_engine_of_the_guide_gives_the_same_greedy_corpus(policy, expected, tmp_path, monkeypatch):
    source, guide = Path("examples/plain_generate.py").read_text(), Path("docs/adding_an_engine.md").read_text()
    parts = re.findall(r"^```python\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    assert parts
    assert all(part in source or part.strip() in source for part in parts)
    monkeypatch.setitem(ENGINES, "plain", PLAIN)
    assert run(policy, tmp_path, engine="plain") == expected


@pytest.mark.seconds
def test_continuous_batching_gives_the_same_greedy_corpus(policy, expected, tmp_path):
    assert run(policy, tmp_path, engine="hf_cb") == expected


@pytest.mark.seconds
def test_continuous_batching_gives_the_same_bytes_beyond_a_sliding_window(tmp_path):
    """96 greedy tokens through a window of 4."""
    model, tokenizer = family_model("mistral"), tiny_tokenizer()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    policy = policy_of(tmp_path / "model")
    policy.eos_token_ids = (2,)
    made = [run(policy, tmp_path / engine, engine=engine, max_new_tokens=96) for engine in ("hf", "hf_cb")]
    assert made[0] == made[1]
    assert max(len(json.loads(line)["tokens"]) for line in made[0].splitlines()) == 96


@pytest.mark.seconds
def test_continuous_batching_halves_its_batch_when_memory_runs_out(policy, caplog):
    """In the thread that decodes, where an error ends every request that is under way."""
    work, passes = [dataclasses.replace(one, sample=k) for one in REQUESTS for k in range(4)], []
    greedy = Sampling(0.0, max_new_tokens=24)

    def answers():
        return {(one.request, one.tokens) for one in ContinuousBatchingEngine(policy, 4, None).complete(work, greedy)}

    def full(*_):
        passes.append(None)
        if len(passes) in (5, 9):
            raise torch.OutOfMemoryError("CUDA out of memory")

    expected = answers()
    hook = policy.model.register_forward_pre_hook(full)
    try:
        assert answers() == expected
    finally:
        hook.remove()
    assert len(expected) == len(work)
    assert "going on with generate.batch_size=2" in caplog.text
    assert "going on with generate.batch_size=1" in caplog.text


def test_continuous_batching_says_what_to_do_when_one_row_is_too_much(policy, monkeypatch):
    """Outside of its thread: where it makes room for the cache and captures graphs."""

    def full(*_):
        policy.model.set_attn_implementation("eager")
        raise RuntimeError("CUDA error: out of memory")

    attention = policy.model.config._attn_implementation
    monkeypatch.setattr(policy.model, "generate_batch", full, raising=False)
    with pytest.raises(DataError, match=r"out of memory with generate.batch_size=1; lower generate.max_new_tokens"):
        list(ContinuousBatchingEngine(policy, 4, None).complete(REQUESTS, Sampling()))
    assert policy.model.config._attn_implementation == attention


def test_continuous_batching_that_passes_the_hooks_by_is_found_out(policy, tmp_path, monkeypatch):
    """Though its answers are right: these come from weights with the projection folded in."""
    other = copy.deepcopy(policy.model)
    with projected(other, some_projection(), "fold"):
        monkeypatch.setattr(policy.model, "generate_batch", other.generate_batch, raising=False)
        with pytest.raises(DataError, match=r"the projection never reached layers.2.key, layers.2.value"):
            run(policy, tmp_path, engine="hf_cb")


def test_continuous_batching_leaves_the_random_state_alone(policy):
    engine = ContinuousBatchingEngine(policy, 4, None)
    before = torch.get_rng_state()
    found = list(engine.complete(REQUESTS, Sampling(max_new_tokens=5)))
    assert before.equal(torch.get_rng_state())
    assert [one.request.id for one in found] == ["p0", "p1", "p2"]
    assert all(one.tokens for one in found)


def test_a_model_that_continuous_batching_cannot_run_is_an_error_not_a_silence(policy):
    hybrid = dataclasses.replace(policy, model=family_model("qwen3_next"))
    with pytest.raises(DataError, match=r"hf_cb cannot run Qwen3NextForCausalLM: .*; set generate.engine=hf"):
        list(ContinuousBatchingEngine(hybrid, 4, None).complete(REQUESTS, Sampling()))
    latent = dataclasses.replace(policy, model=family_model("deepseek_v3"))
    with pytest.raises(DataError, match=r"hf_cb cannot run DeepseekV3ForCausalLM: prompt 'p0' failed: index_copy_"):
        list(ContinuousBatchingEngine(latent, 4, None).complete(REQUESTS, Sampling()))


def test_requests_that_continuous_batching_lost_are_counted(policy, monkeypatch):
    monkeypatch.setattr(policy.model, "generate_batch", lambda *_: {}, raising=False)
    with pytest.raises(
        DataError, match="hf_cb cannot run LlamaForCausalLM: 3 of 3 requests got no answer, see the log"
    ):
        list(ContinuousBatchingEngine(policy, 4, None).complete(REQUESTS, Sampling()))


@pytest.mark.seconds
def test_a_program_of_the_user_gives_the_same_greedy_corpus(policy, expected, tmp_path):
    assert run(policy, tmp_path / "run", engine="command", command=program(tmp_path, PROGRAM)) == expected


@pytest.mark.seconds
def test_an_engine_that_runs_another_policy_is_found_out(policy, model, tmp_path):
    unprojected = PROGRAM.replace("sys.argv[1]", repr(str(model)))
    with pytest.raises(
        DataError, match=r"generate.engine=command: the greedy answer to prompt 'p\d+' differs from the"
    ):
        run(policy, tmp_path / "run", engine="command", command=program(tmp_path, unprojected))


@pytest.mark.parametrize("keep", [0.0, 0.3])
def test_a_fold_that_did_nothing_is_found_out(policy, tmp_path, monkeypatch, keep):
    monkeypatch.setattr("spd_dist.projection.fold.fold_", lambda *_: None)
    monkeypatch.setattr("spd_dist.inference.engine_probes.NUM_PROBES", 1)
    with pytest.raises(DataError, match=r"generate.engine=hf: the greedy answer to prompt 'p\d+' differs from the"):
        run(policy, tmp_path, some_projection(keep=keep), apply_as="fold")


def test_prompts_are_preferred_whose_answers_tell_the_policies_apart(policy, caplog):
    projection, candidates = some_projection(), REQUESTS * 2
    found = references(policy, projection, candidates, 3)
    plain = {
        one.request: one.tokens for one in references(policy, None, [one.request for one in found.answers], 3).answers
    }
    assert len(plain) == 2
    assert all(one.tokens != plain[one.request] for one in found.answers)
    assert caplog.text == ""


def test_probes_that_show_nothing_are_said_to(policy, caplog):
    weak, identity = (some_projection(keep=keep) for keep in (1 - 1e-4, 1.0))
    assert len(references(policy, weak, REQUESTS, 3).answers) == 2
    assert "the projected and the unprojected policy begin their greedy answers to 3 prompts alike" in caplog.text
    caplog.clear()
    for projection in (identity, None):
        assert len(references(policy, projection, REQUESTS, 3).answers) == 2
    assert caplog.text == ""


def test_probes_are_no_longer_than_what_is_asked_for(policy):
    assert [len(one.tokens) for one in references(policy, None, REQUESTS, 1).answers] == [1, 1]
    assert max(len(one.tokens) for one in references(policy, None, REQUESTS, 99).answers) <= 16


def test_rounding_may_decide_between_two_close_tokens():
    logits_TV = torch.tensor([[0.0, 5.0, 1.0], [4.0, 3.8, 0.0]])
    reference = Reference(REQUESTS[0], (1, 0), logits_TV)
    other = Decoded(REQUESTS[0], (1, 1), "length")
    check_probes("vllm", [reference], [other], torch.bfloat16)
    with pytest.raises(DataError, match=r"differs from the projected policy's at token 1 \(\(1,\) instead of \(0,\)\)"):
        check_probes("vllm", [reference], [other], torch.float32)
    with pytest.raises(DataError, match="at token 1"):
        check_probes("vllm", [reference], [Decoded(REQUESTS[0], (1,), "length")], torch.bfloat16)
    with pytest.raises(DataError, match="at token 0"):
        check_probes("vllm", [reference], [], torch.bfloat16)


def test_text_answers_are_tokenised_and_end(policy, tmp_path):
    write = "import json, sys\nrows = map(json.loads, open(sys.argv[2]))\nout = open(sys.argv[3], 'w')\n"
    write += "[print(json.dumps({'id': r['id'], 'sample': r['sample'], 'text': 'two'}), file=out) for r in rows]\n"
    found = list(external(policy, tmp_path, write).complete(REQUESTS, Sampling(max_new_tokens=64)))
    text = policy.tokenizer.encode("two", add_special_tokens=False)
    assert not set(text) & set(policy.eos_token_ids)
    assert {(one.tokens, one.finish_reason) for one in found} == {((*text, policy.eos_token_ids[0]), "stop")}
    assert {one.request.id for one in found} == {"p0", "p1", "p2"}


def test_special_tokens_in_a_text_are_text_and_a_cut_text_has_no_end(policy, tmp_path, caplog):
    written = [("a<|im_end|>b", "length"), ("two", "length"), ("<|im_end|>", "stop")]
    rows = [
        {"id": one.id, "sample": 0, "text": text, "finish_reason": reason}
        for one, (text, reason) in zip(REQUESTS, written, strict=True)
    ]
    text = f"import sys, json\nprint(*map(json.dumps, {rows!r}), sep=chr(10), file=open(sys.argv[3], 'w'))\n"
    policy = dataclasses.replace(policy, eos_token_ids=(2,))  # the others are characters of these texts
    cut, short, whole = external(policy, tmp_path, text).complete(REQUESTS, Sampling(max_new_tokens=64))
    assert policy.tokenizer.decode(cut.tokens, skip_special_tokens=True) == "a<|im_end|>b"
    assert (len(cut.tokens), cut.finish_reason) == (len("a<|im_end|>b"), "length")
    assert (len(short.tokens), short.finish_reason) == (3, "length")
    assert whole.finish_reason == "stop"
    assert whole.tokens[-1] == policy.eos_token_ids[0]
    assert policy.tokenizer.decode(whole.tokens[:-1], skip_special_tokens=True) == "<|im_end|>"
    [warning] = [record.getMessage() for record in caplog.records if "answers in text" in record.getMessage()]
    assert "may differ from those that were sampled" in warning


def test_a_program_that_fails_is_quoted(policy, tmp_path):
    engine = external(policy, tmp_path, "import sys\nsys.exit('no memory on device 3')\n")
    with pytest.raises(DataError, match=r"generate.engine=command ended with exit code 1; .*\n.*no memory on device 3"):
        list(engine.complete(REQUESTS, Sampling()))


def test_requests_without_an_answer_are_counted(policy, tmp_path):
    with pytest.raises(DataError, match="left 3 requests without an answer"):
        list(external(policy, tmp_path, "").complete(REQUESTS, Sampling()))


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        '{"id": "p9", "sample": 0, "tokens": [1]}',
        '{"id": "p0", "sample": 0}',
        '{"id": "p0", "sample": 0, "tokens": "abc"}',
        '{"id": "p0", "sample": 0, "tokens": ["a", "b"]}',
        '{"id": "p0", "sample": 0, "tokens": 5}',
        '{"id": "p0", "sample": 0, "text": "two", "finish_reason": "abort"}',
    ],
)
def test_a_line_that_answers_nothing_is_shown(policy, tmp_path, line):
    text = f"import sys\nopen(sys.argv[3], 'w').write({line!r} + chr(10))\n"
    with pytest.raises(DataError, match=r"wrote a line that answers no open request .*; a line is"):
        list(external(policy, tmp_path, text).complete(REQUESTS, Sampling()))


def test_an_answer_that_was_broken_off_is_no_completion(policy, tmp_path):
    rows = [{"id": one.id, "sample": 0, "tokens": [5, 6]} for one in REQUESTS]
    text = f"import sys, json\nprint(*map(json.dumps, {rows!r}), sep=chr(10), file=open(sys.argv[3], 'w'))\n"
    assert len(list(external(policy, tmp_path, text).complete(REQUESTS, Sampling(max_new_tokens=2)))) == 3
    with pytest.raises(DataError, match=r"answered 'p0', sample 0, with 2 tokens that neither end nor are .*=3; it"):
        list(external(policy, tmp_path, text).complete(REQUESTS, Sampling(max_new_tokens=3)))


def test_a_torn_line_does_not_hide_why_the_program_failed(policy, tmp_path):
    text = "import sys\nprint('{\"id\": ', end='', file=open(sys.argv[3], 'w'), flush=True)\nsys.exit('out of paper')\n"
    with pytest.raises(DataError, match=r"ended with exit code 1; .*\n.*out of paper"):
        list(external(policy, tmp_path, text).complete(REQUESTS, Sampling()))


STUBBORN = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork():
    print("no line", file=open(sys.argv[3], "w"), flush=True)
time.sleep(600)
"""


def test_a_program_that_ignores_sigterm_is_ended_with_what_it_started(policy, tmp_path, monkeypatch):
    monkeypatch.setattr("spd_dist.inference.external.external_engine.GRACE_SECONDS", 0.5)
    with pytest.raises(DataError, match="wrote a line that answers no open request"):
        list(external(policy, tmp_path, STUBBORN).complete(REQUESTS, Sampling()))
    wait_for(lambda: not running_in(tmp_path), 300)


ORPHANED = """
import sys, time
from pathlib import Path
from typing import get_args
from types import SimpleNamespace
from spd_dist.inference.decode import Request
from spd_dist.inference.external.external_engine import ExternalEngine
from spd_dist.inference.sampling import Sampling
policy = SimpleNamespace(tokenizer=SimpleNamespace(decode=str), eos_token_ids=(2,))
engine = ExternalEngine("generate.engine=command", sys.argv[2:], policy, Path(sys.argv[1]), {})
list(engine.complete([Request("p0", 0, (5,), 0)], Sampling()))
"""


@pytest.mark.seconds
def test_a_program_does_not_outlive_the_rank(tmp_path):
    sleeper = "import os, sys, time; os.fork() or open(sys.argv[1], 'w').write('up'); time.sleep(600)"
    words = [sys.executable, "-c", sleeper, str(tmp_path / "up")]
    rank = subprocess.Popen([sys.executable, "-c", ORPHANED, str(tmp_path / "scratch"), *words])
    wait_for((tmp_path / "up").exists, 300)
    assert len(running_in(tmp_path)) == 3
    rank.kill()
    rank.wait()
    wait_for(lambda: not running_in(tmp_path), 300)


def running_in(folder: Path) -> list[int]:
    """Processes that have the folder in their words."""
    return [one.pid for one in every_process() if str(folder) in " ".join(one.words)]


def test_a_program_that_is_not_there_is_a_fault_of_the_config(policy, tmp_path):
    engine = ExternalEngine("generate.engine=command", ["/no/such/program"], policy, tmp_path, {})
    with pytest.raises(ConfigError, match="cannot start '/no/such/program': No such file or directory; give the path"):
        list(engine.complete(REQUESTS, Sampling()))


def test_an_interpreter_without_vllm_says_so(policy, tmp_path):
    with pytest.raises(DataError, match=r"engine=vllm ended with exit code 3; .*\nvllm is not installed in "):
        run(policy, tmp_path, engine="vllm", vllm_python=sys.executable)


BROKEN_ENGINE = """#!{python}
import json, sys, time
def say(**line):
    print(json.dumps(line), flush=True)
sys.stdin.readline()
say(ready={{"vllm": "broken"}})
for line in sys.stdin:
    asked = json.loads(line)
    if asked["do"] == "operators":
        say(operators=2)
    elif asked["do"] == "request":
        key, most = asked["key"], asked["sampling"]["max_new_tokens"]
        print("the engine's last words", file=sys.stderr, flush=True)
        {fault}
"""


@pytest.mark.seconds
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("time.sleep(60)", r"engine=vllm has said nothing for generate.engine_timeout_seconds=3; .*is kept; "),
        ("sys.exit(7)", r"engine=vllm ended with exit code 7; .*is kept; "),
        ("print('oops', flush=True)", r"engine=vllm wrote b'oops.*', which is no 'key' .*is kept; "),
        ("say(key=key, tokens='abc')", r"engine=vllm wrote b'.*abc.*', which is no 'key' .*is kept; "),
        ("say(key='99', tokens=[2])", r"engine=vllm answered '99', which is no open request; .*is kept; "),
        ("say(key=key, tokens=[5] * most); say(key=key, tokens=[5])", r"engine=vllm answered '0', which is no open"),
        ("say(key=key, tokens=[999] * most)", r"engine=vllm answered 'p..' with token 999, and the policy has"),
        ("say(key=key, tokens=[5])", r"generate.engine=vllm answered 'p..', .* neither end nor are max_new_tokens="),
        ("say(key=key, tokens=[5] * most)", r"the engine does not run that policy; set generate.engine=hf"),
    ],
    ids=["silent", "dies", "garbage", "no tokens", "foreign", "twice", "vocabulary", "short", "another policy"],
)
def test_a_process_that_breaks_the_protocol_of_vllm_ends_in_a_sentence(policy, expected, tmp_path, fault, message):
    """What the real one does not do on demand; and the stage goes on with another engine."""
    broken = tmp_path / "broken.py"
    broken.write_text(BROKEN_ENGINE.format(python=sys.executable, fault=fault))
    broken.chmod(0o755)
    seconds = 3.0 if "sleep" in fault else 60.0
    with pytest.raises(DataError, match=message) as caught:
        run(policy, tmp_path / "run", engine="vllm", vllm_python=str(broken), engine_timeout_seconds=seconds)
    if "is kept" in str(caught.value):
        assert "the engine's last words" in str(caught.value)
    shutil.rmtree(tmp_path / "run" / "engine", ignore_errors=True)
    config = dataclasses.replace(GREEDY, engine="hf")
    summary = generate(policy, prompts(), some_projection(), config, StageContext(tmp_path / "run", SEED, ALONE))
    assert merged(tmp_path / "run", summary) == expected


def test_settings_that_an_engine_needs_are_asked_for(policy, tmp_path):
    with pytest.raises(ConfigError, match=r"engine=vllm needs generate.vllm_python"):
        run(policy, tmp_path, engine="vllm")
    with pytest.raises(ConfigError, match=r"generate.command: 'run \{model\}' lacks \{prompts\}, \{output\}"):
        run(policy, tmp_path, engine="command", command="run {model}")


@pytest.mark.parametrize(
    "engine", [{"engine": "hf_cb"}, {"vllm_python": sys.executable}, {"command": "x {model} {prompts} {output}"}]
)
def test_a_prompt_longer_than_the_context_is_named_whatever_decodes(policy, tmp_path, engine):
    config, long = dataclasses.replace(GREEDY, **engine), Prompt("long", "", (5,) * 505)
    with pytest.raises(DataError, match=r"prompt 'long' has 505 tokens, .* takes 517, and the model's context is 512"):
        generate(policy, [*prompts(), long], None, config, StageContext(tmp_path, SEED, ALONE))


def test_auto_takes_what_the_config_names():
    assert choose_engine(Generate()).name == "hf"
    assert choose_engine(Generate(vllm_python="python3")) == ("vllm", "generate.vllm_python is set")
    assert choose_engine(Generate(command="x")).name == "command"
    assert choose_engine(Generate(engine="hf_cb", command="x")).name == "hf_cb"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "engine hf, since neither generate.vllm_python nor generate.command is set, and samples depend on no"),
        ({"command": "true {model} {prompts} {output}"}, "engine command, since generate.command is set"),
        ({"vllm_python": "/no/such/python"}, "engine vllm, since generate.vllm_python is set"),
        ({"engine": "hf", "command": "x"}, "engine hf, since generate.engine asks for it"),
    ],
)
def test_the_log_says_which_engine_was_chosen_and_why(policy, tmp_path, caplog, changes, line):
    too_long = Prompt("long", "", (5,) * 505)  # the choice is all that is of interest
    config = dataclasses.replace(GREEDY, **changes)
    with caplog.at_level(logging.INFO, "spd_dist"), pytest.raises(DataError, match="prompt 'long'"):
        generate(policy, [too_long], None, config, StageContext(tmp_path, SEED, ALONE))
    assert f"generate: {line}" in caplog.text


def test_a_program_does_not_take_itself_for_a_rank():
    launched = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "PYTHONPATH": "x", "HOME": "/h"}
    assert environment_of(ALONE, launched | CACHES) == {"HOME": "/h"}
    on_gpu = dataclasses.replace(ALONE, device=torch.device("cuda", 1))
    assert environment_of(on_gpu, launched)["CUDA_VISIBLE_DEVICES"] == "1"
    assert environment_of(on_gpu, {"CUDA_VISIBLE_DEVICES": "4,6"})["CUDA_VISIBLE_DEVICES"] == "6"
    only_its_own = dataclasses.replace(ALONE, device=torch.device("cuda", 0))
    assert environment_of(only_its_own, {"CUDA_VISIBLE_DEVICES": "3"})["CUDA_VISIBLE_DEVICES"] == "3"


def test_what_runs_inside_vllm_imports_nothing_of_this_package():
    assert [path.name for path in INSIDE.glob("*.py") if "spd_dist" in path.read_text()] == []


def test_prompts_and_sampling_reach_the_program(policy, tmp_path):
    copy = "import shutil, sys\nshutil.copy(sys.argv[2], sys.argv[1] + '/seen.jsonl')\n"
    with pytest.raises(DataError, match="left 3 requests"):
        list(external(policy, tmp_path, copy).complete(REQUESTS, Sampling(top_k=9, max_new_tokens=33)))
    row = json.loads((tmp_path / "seen.jsonl").read_text().splitlines()[1])
    assert (row["id"], row["seed"], row["prompt_tokens"]) == ("p1", 1, [5, 6, 8])
    assert (row["top_k"], row["max_new_tokens"], row["temperature"]) == (9, 33, 0.7)


def test_auto_takes_the_most_rows_that_fit():
    assert largest_batch(lambda rows: 10 + rows, 74.0, 256) == 64
    assert largest_batch(lambda rows: 10 + rows, 73.9, 256) == 32
    assert largest_batch(lambda rows: 10 + rows, 5.0, 256) == 1


def test_auto_looks_at_the_memory_that_is_free(policy, monkeypatch):
    config, free = dataclasses.replace(CONFIG, batch_size="auto"), 1 << 40
    monkeypatch.setattr("spd_dist.inference.placement.free_bytes", lambda world: free)
    assert rows_of_a_pass(policy, config, ALONE, 100, "replica") == MOST_ROWS_ON_CPU
    for rows in (8, 2):
        weights = sum(parameter.numel() for parameter in policy.model.parameters()) * 4
        needed = needed_bytes(policy, dataclasses.replace(config, batch_size=rows), 100, is_cpu=True) - weights
        free = needed / HEADROOM + 1
        assert rows_of_a_pass(policy, config, ALONE, 100, "replica") == rows
        assert rows_of_a_pass(policy, dataclasses.replace(config, batch_size=5), ALONE, 100, "replica") == 5


def test_the_need_for_memory_counts_weights_and_what_decoding_holds(policy):
    weights = sum(parameter.numel() for parameter in policy.model.parameters()) * 4
    configs = [dataclasses.replace(CONFIG, batch_size=rows) for rows in (1, 2, 3)]
    few, more, most = (needed_bytes(policy, config, 100, is_cpu=False) for config in configs)
    cache = 2 * 4 * 16 * 100 * 4
    assert few > weights + cache
    assert more - few == most - more > cache
    embedded = policy.model.get_input_embeddings().weight.nbytes
    packed = needed_bytes(policy, configs[0], 100, is_cpu=True) - few  # on a CPU the others are laid out anew
    assert packed in {weights, weights - embedded}
