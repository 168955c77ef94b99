"""The whole method by its launcher: the same at every world size, after every kill, and clear about every fault."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launching import BRIEF, Launch, differences, free_port, launch, results
from peft import PeftModel
from tiny import save_tiny_model, tiny_model
from transformers import AutoModelForCausalLM
from wandb_log import read_offline_run

from spd_dist.storage.artifacts import read_json, read_jsonl
from spd_dist.storage.subspace_file import load_subspace
from spd_dist.tracking.dashboard import SECTIONS, logged_metrics, plots


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("policy") / "model")


@pytest.fixture(scope="module")
def words(model) -> list[str]:
    return [f"model.name={model}", *BRIEF]


@pytest.fixture(scope="module")
def undisturbed(words, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    output = launch(2, [*words, f"run_dir={folder / 'run'}"], folder / "log")
    assert "SPD against BASE" in output
    for arm in ("psr", "spd"):
        assert re.search(rf"finetune: done, (\d+)/\1 steps of {arm}, ", output)
    return folder / "run"


def losses(run: Path) -> torch.Tensor:
    """By step; a step that was done again after a kill counts once."""
    rows = read_jsonl(run / "metrics" / "rank_00000.jsonl")
    named = {
        (row["step"], key): value
        for row in rows
        for key, value in row.items()
        if key in ("finetune/loss", "finetune/psr_loss")
    }
    assert named
    return torch.tensor([named[key] for key in sorted(named)])


def strange_lines(text: str) -> list[str]:
    """What libraries said: lines that do not begin with the time, as ours do."""
    return [line for line in text.splitlines() if not re.match(r"\d\d:\d\d:\d\d ", line)]


@pytest.mark.parametrize(("world_size", "zero_stage"), [
    (4, 3), pytest.param(1, 0, marks=pytest.mark.slow), pytest.param(1, 3, marks=pytest.mark.slow),
    pytest.param(2, 2, marks=pytest.mark.slow),
])  # fmt: skip
def test_the_results_do_not_depend_on_ranks_and_sharding(words, undisturbed, tmp_path, world_size, zero_stage):
    run = tmp_path / "run"
    launch(world_size, [*words, f"run_dir={run}", f"distributed.zero_stage={zero_stage}"], tmp_path / "log")
    assert results(run).keys() == results(undisturbed).keys()
    for name, expected in results(undisturbed).items():
        if name != "report":
            assert results(run)[name] == expected, name
    ours, theirs = (load_subspace(folder / "project" / "subspace.safetensors") for folder in (run, undisturbed))
    for site in theirs.sites:
        bases = [each.sites[site].basis_DR for each in (ours, theirs)]
        projectors = [basis_DR @ basis_DR.T for basis_DR in bases]
        assert (projectors[0] - projectors[1]).abs().max() < 1e-5
    torch.testing.assert_close(losses(run), losses(undisturbed), rtol=0, atol=1e-5)


def test_a_locale_that_is_not_utf_8_and_a_port_that_is_taken_end_in_one_sentence(words, tmp_path):
    alone = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    command = [sys.executable, "launchers/spd.py", *words, f"run_dir={tmp_path}"]
    done = subprocess.run(command, env={**os.environ, **alone}, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: LC_ALL: files are read as ascii here; set PYTHONUTF8=1, or LC_ALL=C.UTF-8")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = {"WORLD_SIZE": "2", "MASTER_PORT": str(taken.getsockname()[1])}
        output = launch(1, [*words, f"run_dir={tmp_path}"], tmp_path / "log", code=2, **address)
    assert f"error: MASTER_PORT: {address['MASTER_PORT']} is taken on" in output
    assert "Traceback" not in output


def test_a_user_without_home_git_or_compiler_gets_a_report_in_a_folder_of_any_name(words, model, tmp_path):
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root can become a user without a name")
    programs, place = tmp_path / "bin", tmp_path / "läuf e"
    programs.mkdir()
    place.mkdir()
    for folder in (place, *tmp_path.parents[: len(tmp_path.parents) - 2], tmp_path):
        os.chmod(folder, 0o777)
    for file in (model.parent, *model.parent.rglob("*")):
        os.chmod(file, 0o755)
    readable = ["--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search"]  # this Python may be root's
    user = [shutil.which("setpriv"), "--reuid=12345", "--regid=12345", "--clear-groups", *readable]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--quiet"]
    launcher += ["--master_port", str(free_port()), "launchers/spd.py"]
    few = ["evaluate.arms=[base,spd]", f"run_dir={place / 'rün'}"]
    environment = {"PATH": str(programs), "LC_ALL": "C", "PYTHONPATH": str(Path.cwd()), "DS_ACCELERATOR": "cpu"}
    environment |= {"OMP_NUM_THREADS": "1", "TMPDIR": str(place)}
    command = [*user, *launcher, *words, *few]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (place / "rün" / "report.html").is_file()
    assert (place / "rün" / "report.html").stat().st_uid == 12345
    assert "HOME (not set) cannot be written" in done.stderr
    assert strange_lines(done.stderr) == []


def test_the_run_folder_keeps_its_contract(undisturbed, model):
    for name in ("config.yaml", "environment.json", "report.json", "report.html", "metrics/rank_00001.jsonl"):
        assert (undisturbed / name).is_file(), name
    for stage in ("project", "generate", "finetune", "evaluate", "arms/psr/generate", "arms/psr/finetune"):
        assert read_json(undisturbed / stage / "manifest.json")["outputs"]
    site = next(iter(read_json(undisturbed / "project" / "summary.json")["sites"].values()))
    assert {"width", "rank", "energy_fraction", "num_rows", "sketch_size", "certificate"} <= site.keys()
    assert site["rank"] == site["width"] // 2
    line = json.loads((undisturbed / "generate/completions/completions.jsonl").read_text().splitlines()[0])
    assert {"id", "sample", "seed", "prompt_tokens", "tokens", "text", "finish_reason"} <= line.keys()
    checks = read_json(undisturbed / "generate" / "summary.json")
    assert min(checks["hook_calls"].values()) > 0
    assert checks["leakage"] < 1e-5
    base = AutoModelForCausalLM.from_pretrained(model)
    student = PeftModel.from_pretrained(base, undisturbed / "finetune" / "adapter")
    tokens = torch.arange(3, 40)[None]
    assert not torch.allclose(student(tokens).logits, tiny_model()(tokens).logits)


def test_a_complete_run_is_skipped_and_another_config_refused(words, undisturbed, tmp_path):
    before = {file: file.stat().st_mtime_ns for file in undisturbed.glob("**/manifest.json")}
    output = launch(1, [*words, f"run_dir={undisturbed}"], tmp_path / "again")
    assert output.count("complete, skipped") == 10
    assert {file: file.stat().st_mtime_ns for file in before} == before
    output = launch(2, [*words, f"run_dir={undisturbed}", "project.rank_rule=energy"], tmp_path / "other", code=2)
    assert output.count("holds a run of another config (project.rank_rule is 'half' there and 'energy' now)") == 1


def test_a_first_attempt_that_failed_does_not_hold_the_folder_and_a_restart_does_a_part_again(
    words, undisturbed, tmp_path
):
    run, log = tmp_path / "run", tmp_path / "log"
    launch(2, [*words, f"run_dir={run}", "model.name=nowhere/model"], log, code=3)
    attempt = Launch(2, [*words, f"run_dir={run}", "calibrate.num_examples=5"], log)
    attempt.kill_when(lambda: any((run / "project").rglob("*.safetensors")))
    changed = ["generate.max_new_tokens=11", "finetune.learning_rate=2e-3"]
    output = launch(2, [*words, f"run_dir={run}", *changed], tmp_path / "log2")
    assert "so this config takes it over: calibrate.num_examples is 5 there and 7 now" in output
    whole = launch(1, [*words, f"run_dir={run}", "--restart-from", "finetune"], tmp_path / "log3", code=2)
    assert "earlier stages read what changed (generate.max_new_tokens is 11 there and 12 now)" in whole
    assert "take --restart-from generate" in whole
    kept = {file: file.stat().st_mtime_ns for file in (run / "project").rglob("*") if file.is_file()}
    output = launch(2, [*words, f"run_dir={run}", "--restart-from", "generate"], tmp_path / "log4")
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    (replaced,) = (run / "replaced").iterdir()
    replaced.rename(tmp_path / replaced.name)
    assert differences(results(run), results(undisturbed)) == []
    assert f"had made is in {replaced}" in output
    for name in ("generate/manifest.json", "arms/psr/finetune/adapter", "evaluate/spd", "report.html", "metrics"):
        assert (tmp_path / replaced.name / name).exists(), name


KILLS = {
    "project": lambda run: (run / "project" / "started.json").exists(),
    "generate": lambda run: any(file.stat().st_size for file in run.glob("generate/completions/part-*.jsonl")),
    "finetune": lambda run: any(run.glob("finetune/checkpoints/step_*/COMPLETE.json")),
    "evaluate": lambda run: any(file.stat().st_size for file in run.glob("evaluate/spd/*.part-*.jsonl")),
}


@pytest.mark.slow  # make test-faults kills in CI
def test_a_run_stopped_on_request_and_killed_in_every_stage_ends_as_if_undisturbed(words, undisturbed, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    started = Launch(2, [*words, f"run_dir={run}"], log)
    started.when((run / "project" / "started.json").exists, (run / "PREEMPT").touch)
    assert started.wait() == [75, 75], started.output()
    assert "stopped on request (the file" in started.output()
    for happened in KILLS.values():
        Launch(2, [*words, f"run_dir={run}"], log).kill_when(lambda happened=happened: happened(run))
        assert not (run / "report.json").exists()
    launch(2, [*words, f"run_dir={run}"], log)
    assert results(run) == results(undisturbed)
    torch.testing.assert_close(losses(run), losses(undisturbed), rtol=0, atol=0)


STOPPED = "error: stopped on request (SIGINT); start the same command again to go on"


@pytest.mark.parametrize("num_ranks", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_a_ctrl_c_stops_all_ranks_at_the_next_unit_and_the_status_says_so(words, tmp_path, num_ranks):
    run = tmp_path / "run"
    started = Launch(num_ranks, [*words, f"run_dir={run}"], tmp_path / "log")

    def interrupt() -> None:
        for rank in started.ranks:
            os.kill(rank.pid, signal.SIGINT)

    started.when((run / "project" / "started.json").exists, interrupt)
    assert started.wait() == [75] * num_ranks, started.output()
    assert started.output().count(STOPPED) == 1
    assert "Traceback" not in started.output()
    assert read_json(run / "status.json")["state"] == "stopped"


def wait_until(happened: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow  # two starts of deepspeed
def test_a_ctrl_c_at_the_deepspeed_launcher_lets_its_ranks_stop_at_the_next_unit(words, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", "--quiet"]
    command += ["--master_port", str(free_port()), "launchers/spd.py", *words, f"run_dir={run}"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with log.open("wb") as output:
        job = subprocess.Popen(command, stdout=output, stderr=output, process_group=0)
    signal.signal(signal.SIGINT, before)
    wait_until((run / "project" / "started.json").exists, 120)
    os.killpg(job.pid, signal.SIGINT)  # as a terminal sends it: to launchers and ranks
    job.wait(timeout=60)
    wait_until(lambda: read_json(run / "status.json")["state"] != "running", 60)
    assert read_json(run / "status.json")["state"] == "stopped", log.read_text()
    wait_until(lambda: STOPPED in log.read_text(), 30)
    assert "its launcher was killed" not in log.read_text()


@pytest.mark.slow  # real jobs do it in tests/cluster
def test_stages_run_as_separate_jobs_on_different_numbers_of_ranks(words, undisturbed, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    arguments = [*words, f"run_dir={run}"]
    output = launch(1, [*arguments, "--from", "generate", "--until", "generate"], tmp_path / "early", code=3)
    assert "project is not complete; run that stage first: --from project" in output
    launch(1, [*arguments, "--until", "project"], log)
    assert not (run / "generate").exists()
    launch(3, [*arguments, "--from", "generate", "--until", "generate"], log)
    corpus = run / "generate/completions/completions.jsonl"  # a task of an overlapping array adds its part, too late
    shutil.copy(corpus, corpus.with_name("task-00003-of-00004.part-00000-of-00001.jsonl"))
    launch(2, [*arguments, "--from", "finetune", "--until", "finetune", "metrics.wandb=offline"], log)
    check_lineage(run)
    assert read_json(run / "finetune" / "summary.json")["num_sequences"] == 10
    launch(2, [*arguments, "--from", "evaluate"], log)
    expected = results(undisturbed)
    assert {name: value for name, value in results(run).items() if name != "report"} == {
        name: value for name, value in expected.items() if name != "report"
    }
    (run / "generate" / "summary.json").write_text("{}")
    output = launch(2, arguments, tmp_path / "again")
    assert " generate: done again, since its output summary.json was changed" in output
    assert " finetune: complete, skipped" in output  # it learns from the corpus, not from times and counts beside it


def check_lineage(run: Path) -> None:
    """The job is its stage's, and its artifacts are what it went on from and what it made."""
    job = read_offline_run(run)
    assert job.job_type == "finetune"
    made = [(artifact.name, artifact.is_input) for artifact in job.artifacts]
    used = ("run-subspace", "run-psr-corpus", "run-corpus")
    assert {name for name, is_input in made if is_input} == set(used)
    assert [name for name, is_input in made if not is_input] == ["run-psr-adapter", "run-adapter"]


@pytest.mark.slow  # quickstart does it in CI
def test_the_deepspeed_launcher_runs_two_ranks_and_ends_in_a_table(words, undisturbed, tmp_path):
    run = tmp_path / "run"
    command = [Path(sys.executable).parent / "deepspeed", "--num_accelerators", "2", "--quiet"]
    command += ["--master_port", str(free_port())]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        [*command, "launchers/spd.py", *words, f"run_dir={run}", "metrics.wandb=offline"],
        capture_output=True, text=True, timeout=240, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for shown in ("base", "psr", "spd", "interval", "report.html", f"launchers/corpus.py show {run}"):
        assert shown in done.stdout
    for progress in ("calibrate: done, 4/4 examples", "finetune: done", "tokens/s"):
        assert progress in done.stderr
    assert strange_lines(done.stderr) == []
    assert done.stdout.splitlines()[-4].startswith("Next, after `source ")
    assert results(run) == results(undisturbed)
    check_dashboard(run)


def check_dashboard(run: Path) -> None:
    """Every metric of a panel was logged to W&B, over its axis, and every number that was logged is on a panel."""
    mirrored = read_offline_run(run)
    logged = {name for row in mirrored.history for name in row if "/" in name}
    media = {name.removesuffix("/_type") for name in logged if name.endswith("/_type")}
    numbers = {name for name in logged if not name.startswith(tuple(f"{one}/" for one in media))}
    shown = [plot for panels in SECTIONS.values() for plot in plots(panels, logged_metrics(run))]
    metrics = {name for plot in shown for name in plot.metrics}
    assert metrics <= numbers | media
    axes = {plot.axis for plot in shown if plot.axis is not None}
    assert axes <= numbers <= metrics | axes | {"cost/step"}
    assert media <= metrics
    assert {panel.title for panels in SECTIONS.values() for panel in panels} == {plot.panel.title for plot in shown}
    made = {artifact.name.removeprefix("run-"): artifact for artifact in mirrored.artifacts}
    assert {"subspace", "corpus", "adapter", "psr-corpus", "psr-adapter", "report"} <= made.keys()
    assert {"subspace", "projection", "settings", "train"} == made["corpus"].metadata["inputs"].keys()


@pytest.mark.slow
def test_in_bfloat16_fixed_shapes_make_corpora_and_answers_independent_of_ranks_and_kills(words, tmp_path):
    """The students are trained in another order of summation on two ranks: there only what nothing trained is equal."""
    words = [*words, "model.dtype=bfloat16", "generate.batch_invariant=true", "evaluate.batch_invariant=true"]
    for name, num_ranks in (("one", 1), ("two", 2)):
        started = Launch(num_ranks, [*words, f"run_dir={tmp_path / name}"], tmp_path / f"{name}.log")
        assert started.wait(600) == [0] * num_ranks, started.output()
    killed = [*words, f"run_dir={tmp_path / 'killed'}"]
    for place in ("generate/completions/part-*", "evaluate/base/*.part-*.jsonl"):
        started = Launch(2, killed, tmp_path / "killed.log")
        started.kill_when(
            lambda place=place: any(file.stat().st_size for file in (tmp_path / "killed").glob(place)), 300
        )
    started = Launch(2, killed, tmp_path / "again.log")
    assert started.wait(600) == [0, 0], started.output()
    found = {name: results(tmp_path / name) for name in ("one", "two", "killed")}
    assert differences(found["killed"], found["two"]) == []
    same = [key for key in found["one"] if key.endswith("completions.jsonl") or "/base/" in key or "/projected/" in key]
    assert len(same) >= 4
    assert [key for key in same if found["two"][key] != found["one"][key]] == []
