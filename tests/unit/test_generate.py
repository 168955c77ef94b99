"""The corpus is what policy, prompts, projection and seed make it: no kill, resume or division shows in it."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from generating import ALONE, CONFIG, SEED, StoppingAfter, corpus, merged, policy_of, prompts, some_projection
from ranks import PRELOADED
from tiny import save_tiny_model

from spd_dist.config import Generate
from spd_dist.distributed.lock import alone_in
from spd_dist.distributed.zero import weights_fingerprint
from spd_dist.errors import DataError
from spd_dist.inference.decode import decode
from spd_dist.inference.placement import MOST_ROWS_ON_CPU
from spd_dist.models.policy import Policy
from spd_dist.seeding import row_seed
from spd_dist.stages.context import StageContext
from spd_dist.stages.generate import CorpusSummary, generate
from spd_dist.stages.generate.merge_corpus import Attempt, check_leakage
from spd_dist.storage.artifacts import read_json
from spd_dist.storage.completions import corpus_name, open_corpus, part_name, read_completions, to_text
from spd_dist.storage.manifests import MANIFEST, why_not_complete
from spd_dist.storage.records import read_fields, read_record
from spd_dist.storage.run_folder import RunFolder
from spd_dist.types import Prompt

CORPUS = corpus_name(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def policy(model: Path) -> Policy:
    return policy_of(model)


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return corpus(model, tmp_path_factory.mktemp("expected"))


def run(policy: Policy, folder: Path, config: Generate = CONFIG, **changes: object) -> dict:
    settings = {"prompts": prompts(), "projection": some_projection(), "progress": None, "seed": SEED} | changes
    context = StageContext(folder, settings["seed"], ALONE, progress=settings["progress"])
    return generate(policy, settings["prompts"], settings["projection"], config, context)


def test_a_corpus_holds_every_prompt_and_sample_in_order(policy, expected, tmp_path):
    summary = run(policy, tmp_path)
    assert merged(tmp_path, summary) == expected
    completions = read_completions(tmp_path / CORPUS)
    keys = [(one.id, one.sample) for one in completions]
    assert keys == [(prompt.id, sample) for prompt in prompts() for sample in range(CONFIG.num_samples)]
    for one in completions:
        assert one.seed == row_seed(SEED, one.id, one.sample)
        assert one.text == policy.tokenizer.decode(one.tokens, skip_special_tokens=True)
        assert (one.tokens[-1] in policy.eos_token_ids) == (one.finish_reason == "stop")
        assert one.finish_reason == "stop" or len(one.tokens) == CONFIG.max_new_tokens
    assert sum(summary.finish_reasons.values()) == summary.num_completions == len(completions)
    assert read_record(tmp_path / "summary.json", CorpusSummary) == summary


@pytest.mark.seconds
def test_the_projection_acts_and_the_policy_stays_as_it_was(policy, expected, tmp_path):
    summary = run(policy, tmp_path / "spd")
    assert min(summary.hook_calls.values()) >= 1
    assert summary.leakage < 1e-5
    plain = merged(tmp_path / "psr", run(policy, tmp_path / "psr", projection=None))
    assert plain != expected
    identity = some_projection(keep=1.0)
    assert merged(tmp_path / "identity", run(policy, tmp_path / "identity", projection=identity)) == plain
    assert weights_fingerprint(policy.model) == policy.fingerprint


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_the_corpus_does_not_depend_on_the_batch(policy, expected, tmp_path, batch_size):
    assert merged(tmp_path, run(policy, tmp_path, dataclasses.replace(CONFIG, batch_size=batch_size))) == expected


def test_a_run_that_fails_goes_on_where_it_was(policy, expected, tmp_path):
    with pytest.raises(DataError, match="the disk is full"):
        run(policy, tmp_path, progress=StoppingAfter(5))
    summary = run(policy, tmp_path)
    assert merged(tmp_path, summary) == expected
    assert 0 < summary.num_new_tokens < summary.num_tokens


def test_a_large_corpus_is_a_table_however_often_it_was_stopped(policy, expected, tmp_path, monkeypatch):
    monkeypatch.setattr("spd_dist.storage.completions.MOST_AS_TEXT", 17)
    with pytest.raises(DataError, match="the disk is full"):
        run(policy, tmp_path, progress=StoppingAfter(5))
    first = run(policy, tmp_path)
    assert [path.name for path in (tmp_path / "completions").iterdir()] == ["completions.arrow"]
    assert run(policy, tmp_path) == first
    (tmp_path / "summary.json").unlink()
    assert run(policy, tmp_path).num_tokens == first.num_tokens
    to_text(open_corpus(tmp_path / "completions"), tmp_path / "exported.jsonl")
    assert (tmp_path / "exported.jsonl").read_bytes() == expected


def test_a_complete_corpus_and_its_summary_stay_as_they_are(policy, expected, tmp_path):
    first = run(policy, tmp_path)
    files = [tmp_path / CORPUS, tmp_path / "summary.json"]
    before = [(file.stat().st_ino, file.stat().st_mtime_ns) for file in files]
    assert run(policy, tmp_path) == first
    assert [(file.stat().st_ino, file.stat().st_mtime_ns) for file in files] == before
    assert merged(tmp_path, first) == expected


def test_a_kill_between_corpus_and_summary_is_made_good(policy, expected, tmp_path):
    run(policy, tmp_path)
    (tmp_path / "summary.json").unlink()
    summary = run(policy, tmp_path)
    assert merged(tmp_path, summary) == expected
    assert (summary.num_new_tokens, summary.num_completions) == (0, 18)
    assert summary.leakage < 1e-5


class Overtaken:
    """A progress that finds, once it has planned its work, that another job does all of it."""

    def __init__(self, others: Callable[[], object]) -> None:
        self.others = others

    def begin(self, total: int, skipped: int) -> None:
        """The work is planned."""
        assert total > skipped
        self.others()

    def advance(self, units: int = 1, tokens: int = 0) -> None:
        """One more is written."""
        pytest.fail("decoded what is there")


def test_a_late_task_adds_nothing_to_a_corpus_that_others_finished(policy, expected, tmp_path):
    found = []
    late = Overtaken(lambda: found.append(run(policy, tmp_path)))
    summary = run(policy, tmp_path, dataclasses.replace(CONFIG, num_tasks=4, task_index=3), progress=late)
    assert [summary] == found
    assert merged(tmp_path, summary) == expected


def test_a_corpus_that_lacks_lines_is_not_made_up_for_by_parts(policy, expected, tmp_path):
    run(policy, tmp_path)
    (tmp_path / CORPUS).write_bytes(b"".join(expected.splitlines(keepends=True)[:-1]))
    with pytest.raises(DataError, match=r"completions.jsonl lacks 1 of 18 completions; delete .*lines0 and start"):
        run(policy, tmp_path)


SLOW = dataclasses.replace(CONFIG, batch_size=2, max_new_tokens=16)
MANY = 40


def killable(model: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    run(policy_of(model), folder, SLOW, prompts=prompts(MANY))


def num_lines(folder: Path) -> int:
    return sum(file.read_bytes().count(b"\n") for file in folder.glob("completions/*.jsonl"))


@pytest.mark.seconds
def test_ten_kills_at_random_moments_leave_no_trace(model, policy, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    rng, folder, counts = random.Random(11), tmp_path / "killed", []
    for _ in range(10):
        process = context.Process(target=killable, args=(model, folder))
        process.start()
        enough = num_lines(folder) + rng.randrange(12)
        while process.is_alive() and num_lines(folder) < enough:
            time.sleep(rng.uniform(0.0, 0.01))
        process.kill()
        process.join()
        counts.append(num_lines(folder))
    assert counts == sorted(counts)
    assert len(set(counts)) >= 5
    expected = merged(tmp_path / "whole", run(policy, tmp_path / "whole", SLOW, prompts=prompts(MANY)))
    assert merged(folder, run(policy, folder, SLOW, prompts=prompts(MANY))) == expected


def test_the_last_task_of_an_array_merges(policy, expected, tmp_path):
    for task in (2, 0, 1):
        config = dataclasses.replace(CONFIG, num_tasks=3, task_index=task, num_samples=2)
        summary = run(policy, tmp_path, config)
        assert summary.is_complete == (task == 1)
    assert merged(tmp_path, summary) == expected


INPUTS = {"settings": "s", "train": "t"}


def one_task(model: Path, run_dir: Path, index: int) -> None:
    """As a run does it: start, generate, finish; and tell which manifest it found or wrote."""
    torch.set_num_threads(1)
    folder = RunFolder(run_dir, {"seed": 1}, ALONE)
    place = folder.start("generate", INPUTS)
    (run_dir / f"started-{index}").touch()
    while not (run_dir / "go").exists():
        time.sleep(0.01)
    summary = run(policy_of(model), place, dataclasses.replace(CONFIG, num_tasks=2, task_index=index))
    assert summary.is_complete
    manifest = folder.finish("generate", INPUTS, [CORPUS, "summary.json"], seconds=float(index))
    (run_dir / f"finished-{index}").write_text(json.dumps([dataclasses.asdict(summary), dataclasses.asdict(manifest)]))


@pytest.mark.seconds
def test_two_tasks_that_meet_at_the_merge_leave_one_corpus_and_one_manifest(model, expected, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    place = tmp_path / "generate"
    tasks = [context.Process(target=one_task, args=(model, tmp_path, index), daemon=True) for index in range(2)]
    for task in tasks:
        task.start()
    while not all((tmp_path / f"started-{index}").exists() for index in range(2)):
        assert all(task.is_alive() for task in tasks)
        time.sleep(0.01)
    with alone_in(place):  # neither merges before both have made their share
        (tmp_path / "go").touch()
        while num_lines(place) < 18:
            assert all(task.is_alive() for task in tasks)
            time.sleep(0.01)
    finished = [tmp_path / f"finished-{index}" for index in range(2)]
    while any(task.is_alive() for task in tasks):
        was_finished = (place / MANIFEST).exists()
        assert not was_finished or why_not_complete(place, INPUTS) is None
    assert [task.exitcode for task in tasks] == [0, 0]
    left = [read_fields(place / "summary.json"), read_fields(place / MANIFEST)]
    assert [read_json(file) for file in finished] == [left, left]
    assert merged(place, read_record(place / "summary.json", CorpusSummary)) == expected
    assert set(read_json(place / MANIFEST)["outputs"]) == {CORPUS, "summary.json"}


def test_overlapping_arrays_export_their_models_to_folders_of_their_own(policy, tmp_path):
    fails = dataclasses.replace(CONFIG, engine="command", command="sh -c 'exit 9' {model} {prompts} {output}")
    for num_tasks in (1, 2):
        with pytest.raises(DataError, match="ended with exit code 9"):
            run(policy, tmp_path, dataclasses.replace(fails, num_tasks=num_tasks))
    names = sorted(folder.name for folder in tmp_path.glob("engine-*"))
    assert names == ["engine-00000-of-00001", "engine-00000-of-00002"]


def test_lines_of_another_seed_or_data_set_are_refused(policy, tmp_path):
    run(policy, tmp_path)
    with pytest.raises(DataError, match="of another seed, prompt or data set; delete generate/"):
        run(policy, tmp_path, seed=SEED + 1)
    with pytest.raises(DataError, match="holds prompt 'p08', sample 0, of another"):
        run(policy, tmp_path, prompts=prompts()[:8])


def test_prompts_that_cannot_be_answered_are_named(policy, tmp_path):
    with pytest.raises(DataError, match="two prompts have the id 'a'"):
        run(policy, tmp_path, prompts=[Prompt("a", "", (5,)), Prompt("a", "", (6,))])
    with pytest.raises(DataError, match="prompt 'a' has no tokens"):
        run(policy, tmp_path, prompts=[Prompt("a", "", ())])
    with pytest.raises(DataError, match=r"there is no prompt; set data.train"):
        run(policy, tmp_path, prompts=[])
    with pytest.raises(DataError, match=r"prompt 'long' has 600 tokens, .* the model's context is 512"):
        run(policy, tmp_path, prompts=[Prompt("long", "", (5,) * 600)])


@pytest.mark.seconds
def test_a_corpus_beyond_the_thresholds_fails_loudly(policy, tmp_path):
    config = dataclasses.replace(CONFIG, max_new_tokens=1, max_empty_rate=0.0)
    with pytest.raises(
        DataError, match=r"the empty rate of the completions is 0\.\d+, above generate.max_empty_rate=0"
    ):
        run(policy, tmp_path / "empty", config)
    policy.eos_token_ids, before = (2,), policy.eos_token_ids
    config = dataclasses.replace(CONFIG, temperature=0.0, max_new_tokens=60, max_repetition_rate=0.0)
    with pytest.raises(
        DataError, match=r"the repetition rate of the completions is .* launchers/corpus.py; then raise that limit"
    ):
        run(policy, tmp_path / "circles", config)
    policy.eos_token_ids = before
    config = dataclasses.replace(CONFIG, max_new_tokens=1, max_empty_rate=1.0, max_length_rate=0.5)
    with pytest.raises(DataError, match=r"the length rate .* in another one$") as caught:
        run(policy, tmp_path / "cut", config)
    assert "change generate.max_new_tokens in another one" in str(caught.value)


def test_a_limit_is_raised_without_generating_again(policy, tmp_path, caplog):
    config = dataclasses.replace(CONFIG, max_new_tokens=1, max_empty_rate=1.0, max_length_rate=0.1)
    with pytest.raises(DataError, match=r"above generate.max_length_rate=0.1"):
        run(policy, tmp_path, config)
    part = tmp_path / "completions" / part_name(0, 1)
    lines = sorted(part.read_bytes().splitlines())
    summary = run(policy, tmp_path, dataclasses.replace(config, max_length_rate=1.0))
    assert sorted(merged(tmp_path, summary).splitlines()) == lines
    assert (summary.num_new_tokens, summary.num_tokens) == (0, 18)
    assert summary.length_rate > 0.5
    assert "% of the completions were cut at generate.max_new_tokens=1: a student learns" in caplog.text


def test_missing_completions_are_counted(policy, tmp_path, monkeypatch):
    def only_probes(model, requests, *rest, **settings):
        return decode(model, [request for request in requests if request.sample < 0], *rest, **settings)

    monkeypatch.setattr("spd_dist.inference.hf_engines.decode", only_probes)
    with pytest.raises(DataError, match=r"18 of 18 completions are missing \('p00' sample 0, "):
        run(policy, tmp_path)


def test_the_summary_shows_rows_a_pass_and_what_the_model_suggests_but_does_not_get(policy, tmp_path):
    greedy, suggested = dataclasses.replace(CONFIG, temperature=0.0, num_samples=1, batch_size="auto"), policy.model
    plain = run(policy, tmp_path / "plain", greedy)
    assert (plain.batch_size, plain.suggested_decoding) == (MOST_ROWS_ON_CPU, {})
    suggested.generation_config.temperature, suggested.generation_config.top_k = 0.6, 20
    found = run(policy, tmp_path / "suggested", greedy)
    assert found.suggested_decoding == {"temperature": 0.6, "top_k": 20.0}
    assert merged(tmp_path / "suggested", found) == merged(tmp_path / "plain", plain)


def test_leakage_beyond_rounding_is_an_error():
    attempt = Attempt("hf", "replica", 5, 1.0, {"layers.2.key": 9}, 2e-5, 0)
    check_leakage(attempt, torch.bfloat16)
    with pytest.raises(DataError, match=r"leakage \|\|z\(I-P\)\|\| / \|\|z\|\| is 2.00e-05, above 1e-05"):
        check_leakage(attempt, torch.float32)


@pytest.mark.seconds
def test_fixed_shapes_make_a_bfloat16_corpus_independent_of_kills(model, tmp_path):
    policy = policy_of(model)
    policy.model.bfloat16()
    config = dataclasses.replace(CONFIG, batch_invariant=True)
    whole = merged(tmp_path / "whole", run(policy, tmp_path / "whole", config))
    with pytest.raises(DataError, match="the disk is full"):
        run(policy, tmp_path / "resumed", config, progress=StoppingAfter(7))
    assert merged(tmp_path / "resumed", run(policy, tmp_path / "resumed", config)) == whole
