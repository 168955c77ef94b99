"""The mechanism test by its launcher: one result at every world size and after a kill, and clear about faults."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from launching import Launch, differences, launch
from tiny import save_tiny_model
from wandb_log import read_offline_run

from spd_dist.storage.artifacts import read_json
from spd_dist.storage.subspace_file import load_subspace

LAUNCHER = "launchers/mechanism.py"
WORDS = [
    "calibrate.num_examples=7", "calibrate.num_shards=4", "calibrate.batch_size=2", "evaluate.max_new_tokens=4",
    "data.num_test=6", "mechanism.num_rows=6", "mechanism.batch_size=2", "mechanism.num_random=4",
    "mechanism.num_equal_energy=1", "mechanism.num_explored_rows=4", "mechanism.num_explored_random=3",
    "mechanism.num_generated=2", "mechanism.explore=[kinds=value@fraction=0.25,layers=1]", "mechanism.doses=[0.5]",
]  # fmt: skip


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    return [f"model.name={save_tiny_model(tmp_path_factory.mktemp('policy') / 'model')}", *WORDS]


@pytest.fixture(scope="module")
def undisturbed(words, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    output = launch(
        2, [*words, f"run_dir={folder / 'run'}", "metrics.wandb=offline"], folder / "log", launcher=LAUNCHER
    )
    assert output.count("The capability subspace ") == 1
    lines = re.findall(r"^Explored: (\S+): [+-]\S+ nats \(95 % interval .*, n 4\); 3 random subspaces: ", output, re.M)
    assert lines == ["prompt=bare", "kinds=value@fraction=0.25", "layers=1"]
    assert re.search(r"mechanism: done, (\d+)/\1 row passes", output)
    return folder / "run"


def results(run: Path) -> dict[str, object]:
    folder = run / "mechanism"
    table = pyarrow.parquet.read_table(folder / "rows.parquet").to_pylist()
    rows = {f"{row['prompt']}/{row['variant']}~{row['share']}/{row['id']}": row for row in table}
    return {name: read_json(folder / f"{name}.json") for name in ("mechanism", "details")} | {"rows": rows}


def close(found: object, expected: object) -> bool:
    """Equal, numbers to rounding."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(close(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(close, found, expected))
    if isinstance(expected, float):
        return found == pytest.approx(expected, rel=1e-3, abs=1e-5)
    return found == expected


def test_the_files_hold_the_primary_comparison_and_every_row(undisturbed):
    found = results(undisturbed)
    result, details, rows = found["mechanism"], found["details"], found["rows"]
    fields = {"schema", "num_rows", "num_random", "effect", "interval", "p_value", "matched_kl", "controls"}
    assert set(result) == fields
    assert set(result["matched_kl"]) == {"p_value", "effect", "kl"}
    assert {frozenset(one) for one in result["controls"]} == {frozenset({"name", "effect", "interval", "kl"})}
    names = [one["name"] for one in result["controls"]]
    assert (result["num_rows"], result["num_random"]) == (6, 4)
    assert {"random_003", "equal_energy_000", "activation_pca", "complement", "wrong_answers", "cleaned"} <= set(names)
    of_spd = {key: row["nll_answer"] for key, row in rows.items() if key.startswith("task/spd~1.0/")}
    of_base = {key: row["nll_answer"] for key, row in rows.items() if key.startswith("task/base~0.0/")}
    assert len(of_spd) == len(of_base) == 6
    assert result["effect"] == pytest.approx((sum(of_spd.values()) - sum(of_base.values())) / 6)
    assert result["interval"][0] <= result["effect"] <= result["interval"][1]
    calibrated = load_subspace(undisturbed / "project" / "subspace.safetensors").sites
    assert details["rank"].keys() == {str(site) for site in calibrated if site.kind == "key"}
    explored = {one["name"]: one for one in details["explored"]}
    assert explored.keys() == {"prompt=bare", "kinds=value@fraction=0.25", "layers=1"}
    assert all(one["num_rows"] == 4 and one["p_corrected"] >= one["p_value"] for one in explored.values())
    assert all(one["is_matched"] for one in details["matches"])
    assert details["validity"]["num_rows"] == 2
    assert {one["name"] for one in details["validity"]["subspaces"]} >= {"spd", "activation_pca", "random_000"}
    kept = {file.stem: load_subspace(file) for file in (undisturbed / "mechanism" / "candidates").iterdir()}
    assert kept.keys() == {"gradient_x_activation", "generalised", "right_minus_wrong", "cleaned"}
    assert {(site.kind, *part.basis_DR.shape) for site, part in kept["cleaned"].sites.items()} == {("key", 16, 8)}
    page = (undisturbed / "mechanism" / "mechanism.html").read_text()
    assert page.count("<svg") == 2
    assert "kinds=value@fraction=0.25" in page
    assert not list((undisturbed / "mechanism").glob("rows.part-*"))
    logged = (undisturbed / "metrics" / "mechanism_rank_00000.jsonl").read_text()
    assert '"mechanism/matched_p_value"' in logged


def test_one_rank_gives_the_same_and_so_does_a_run_that_was_killed_on_two(words, undisturbed, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    started = Launch(2, [*words, f"run_dir={run}", "evaluate.placement=layerwise"], log, LAUNCHER)
    started.kill_when(lambda: sum(file.stat().st_size for file in run.rglob("rows.part-*.jsonl")) > 4000)
    assert not (run / "mechanism").exists()
    launch(1, [*words, f"run_dir={run}", "distributed.zero_stage=0"], log, launcher=LAUNCHER)
    found, expected = results(run), results(undisturbed)
    assert found["rows"].keys() == expected["rows"].keys()
    wrong = [line for name in expected for line in differences(found[name], expected[name], name)]
    assert close(found, expected), wrong[:5]
    again = launch(1, [*words, f"run_dir={run}", "distributed.zero_stage=0"], tmp_path / "again", launcher=LAUNCHER)
    assert "mechanism: complete, skipped" in again
    assert "The capability subspace " in again


def test_weights_and_biases_has_the_verdict_the_table_and_the_files(undisturbed):
    mirrored = read_offline_run(undisturbed)
    assert mirrored.job_type == "mechanism"
    logged = {name for row in mirrored.history for name in row}
    assert {"mechanism/effect", "mechanism/p_value", "mechanism/matched_p_value"} <= logged
    made = {one.name.removeprefix("run-"): one for one in mirrored.artifacts if not one.is_input}
    assert {"subspace", "mechanism"} <= made.keys()
    assert set(made["mechanism"].files) == {"mechanism.json", "details.json", "rows.parquet", "mechanism.html"}


def test_a_run_ends_in_the_sentence_if_its_config_says_so(words, undisturbed, tmp_path):
    few = ["evaluate.arms=[base]", f"run_dir={undisturbed}"]
    text = launch(1, [*words, *few, "mechanism.in_run=true"], tmp_path / "log")
    assert "mechanism: complete, skipped" in text
    assert text.index(" base ") < text.index("The capability subspace ")


def test_a_finished_run_stays_good_if_its_rows_do_not_suffice(words, tmp_path):
    few = ["evaluate.arms=[base]", "data.num_test=1", f"run_dir={tmp_path}", "mechanism.in_run=true"]
    text = launch(1, [*words, *few], tmp_path / "log")
    assert "The mechanism test was not done: data.test: 1 of 1 rows have a reference answer" in text
    assert (tmp_path / "report.json").exists()


@pytest.mark.parametrize(("word", "message"), [
    ("mechanism.controls=[activations]", "mechanism.controls: 'activations' is no control; the nearest is"),
    ("mechanism.explore=[rank=3]", "mechanism.explore: 'rank=3' is no comparison; write kinds="),
    ("mechanism.explore=[layers=1+99]", "mechanism.explore: keys and values can't be taken from layer 99 of "),
    ("project.insertion=head", "project.insertion: head is not valid for the mechanism test"),
])  # fmt: skip
def test_what_cannot_be_compared_is_refused(words, tmp_path, word, message):
    code = 3 if "layers" in word else 2
    output = launch(2, [*words, f"run_dir={tmp_path}", word], tmp_path / "log", code=code, launcher=LAUNCHER)
    assert output.count("error: ") == 1
    assert "calibrate: " not in output
    assert message in output


def test_a_run_that_could_not_be_measured_at_its_end_is_refused_at_its_start(words, tmp_path):
    wrong = ["mechanism.in_run=true", "mechanism.explore=[rank=3]", f"run_dir={tmp_path}"]
    output = launch(1, [*words, *wrong], tmp_path / "log", code=2)
    assert "mechanism.explore: 'rank=3' is no comparison" in output
    assert "calibrate" not in output


def test_a_bfloat16_model_that_stays_sharded_has_logits_of_float32(words, tmp_path):
    """On two ranks: the output layer's weights are there within its call alone."""
    few = [
        "mechanism.num_rows=4", "mechanism.num_random=2", "mechanism.num_explored_rows=4", "mechanism.explore=[]",
        "mechanism.num_explored_random=2", "mechanism.num_generated=0", "evaluate.placement=layerwise",
    ]  # fmt: skip
    run = tmp_path / "run"
    launch(2, [*words, *few, "model.dtype=bfloat16", f"run_dir={run}"], tmp_path / "log", launcher=LAUNCHER)
    odds = [row["log_odds"] for row in results(run)["rows"].values() if row["log_odds"] is not None]
    in_bfloat16 = torch.tensor(odds).bfloat16().double().tolist()
    assert odds != in_bfloat16, "differences of rounded logits would be rounded numbers"
    assert any(value * 2**14 % 1 for value in odds)
