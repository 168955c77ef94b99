"""Rounds: each on the student of the one before, its subspace estimated anew or kept, every one resumed as a run."""

import sys
from pathlib import Path

import pytest
import torch
from generating import PROGRAM
from launching import BRIEF, Launch, launch
from tiny import save_tiny_model

from spd_dist.overrides import load_config
from spd_dist.runs.rounds import config_of_round
from spd_dist.storage.artifacts import read_json
from spd_dist.storage.subspace_file import load_subspace


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    model = save_tiny_model(tmp_path_factory.mktemp("policy") / "model")
    return [f"model.name={model}", *BRIEF, "evaluate.arms=[base,spd]"]


def test_a_run_goes_on_for_more_rounds_and_resumes_after_a_kill_in_the_second(words, tmp_path):
    run = tmp_path / "run"
    words = [*words, f"run_dir={run}"]
    launch(2, words, tmp_path / "log-1")
    first = (run / "generate/completions").glob("*.jsonl")
    before = {path.name: path.read_text() for path in first}
    second = run / "rounds/2"
    Launch(2, [*words, "rounds=2"], tmp_path / "log-2").kill_when((second / "generate").exists)
    assert not (second / "report.json").exists()
    assert read_json(run / "status.json")["state"] == "running", "a run is complete with its last round"
    output = launch(1, [*words, "rounds=2"], tmp_path / "log-3")
    assert "Round 2" in output
    assert read_json(run / "status.json")["state"] == "complete"
    assert {path.name: path.read_text() for path in (run / "generate/completions").glob("*.jsonl")} == before
    report = read_json(run / "report.json")
    first, last = report["rounds"]
    assert {"generate", "finetune", "rounds/2/generate", "rounds/2/finetune"} <= report["cost"].keys()
    assert (first["round"], first["drift"], last["round"], set(last["drift"])) == (1, {}, 2, {"1"})
    drift = last["drift"]["1"]
    assert set(drift) == {f"layers.{layer}.{kind}" for layer in (2, 3) for kind in ("key", "value")}
    for site in drift.values():
        assert 0 < site["mean_angle_degrees"] <= site["largest_angle_degrees"] == max(site["angles_degrees"])
        assert 0 < site["energy_fraction_held"] <= site["energy_fraction"] <= 1
        assert site["energy_ratio"] > 0
    assert [(one["before"], one["after"]) for one in report["progress"]] == [("base", "round 1"), ("base", "round 2")]
    assert "Subspace of round 2 against round 1: mean principal angle" in output
    assert "<h2>Rounds</h2>" in (run / "report.html").read_text()
    assert (
        read_json(second / "evaluate/summary.json")["arms"]["base"]
        == read_json(run / "evaluate/summary.json")["arms"]["spd"]
    ), "the second round begins where the first ended"


@pytest.mark.slow
def test_a_frozen_subspace_is_that_of_the_first_round(words, tmp_path):
    run = tmp_path / "run"
    launch(2, [*words, f"run_dir={run}", "rounds=3", "refit=false", "finetune.mode=full"], tmp_path / "log")
    bases = [
        load_subspace(folder / "project/subspace.safetensors") for folder in (run, run / "rounds/2", run / "rounds/3")
    ]
    for later in bases[1:]:
        assert all(torch.equal(later.sites[site].basis_DR, part.basis_DR) for site, part in bases[0].sites.items())
    third = read_json(run / "report.json")["rounds"][2]
    assert set(third["drift"]) == {"1", "2"}
    assert third["drift"]["1"] == third["drift"]["2"], "both are the subspace of round 1"
    assert all(site["largest_angle_degrees"] > 0 for site in third["drift"]["1"].values()), "the gradients still move"


HASHING = """
import hashlib, os, sys
name = os.path.join(sys.argv[1], "model.safetensors")
with open(HASHES, "a") as file:
    file.write(hashlib.sha256(open(name, "rb").read()).hexdigest() + "\\n")
"""


@pytest.mark.slow
def test_an_engine_of_the_user_gets_another_model_in_the_second_round(words, tmp_path):
    hashes = tmp_path / "hashes"
    (tmp_path / "engine.py").write_text(HASHING.replace("HASHES", repr(str(hashes))) + PROGRAM)
    command = f"{sys.executable} {tmp_path / 'engine.py'} {{model}} {{prompts}} {{output}}"
    engine = ["generate.engine=command", f"generate.command='{command}'", "generate.temperature=0.0"]
    run_dir = f"run_dir={tmp_path / 'run'}"
    launch(1, [*words, *engine, run_dir], tmp_path / "log-1")
    first = set(hashes.read_text().split())
    launch(1, [*words, *engine, run_dir, "rounds=2"], tmp_path / "log-2")
    both = set(hashes.read_text().split())
    assert first
    assert both > first, "no rollout of the second round is of the policy of the first"


def test_the_config_of_a_round_is_that_of_the_run_but_for_folder_and_model(tmp_path):
    config = load_config(overrides=[f"run_dir={tmp_path}", "rounds=3", "model.revision=main"])
    assert config_of_round(config, 1) == config
    third = config_of_round(config, 3)
    assert Path(third.run_dir) == tmp_path / "rounds/3"
    assert third.model.name == str(tmp_path / "rounds/2/finetune/model")
    assert third.model.revision is None


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--until", "project"], "rounds: 2 is not valid with --from calibrate --until project; leave them out"),
        (["evaluate.arms=[base,psr]"], "rounds: 2 needs the arm that goes on; add spd to evaluate.arms"),
    ],
)
def test_what_rounds_cannot_do_ends_with_2(words, tmp_path, extra, message):
    assert message in launch(1, [*words, f"run_dir={tmp_path / 'run'}", "rounds=2", *extra], tmp_path / "log", code=2)
