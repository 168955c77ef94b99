"""From a grid to runs, and back to one table."""

from __future__ import annotations

import csv
import dataclasses
import json
import runpy
import time
from pathlib import Path

import pytest
from answering import ARMS, answers

from spd_dist.reports.run_report import Asked, write_report
from spd_dist.storage.answers import answers_path
from spd_dist.storage.keyed_parts import write_merged
from spd_dist.storage.records import write_record
from spd_dist.storage.restart import Status

SWEEP = runpy.run_path("spd_dist/launch/sweep.py")
main, points = SWEEP["main"], SWEEP["points"]


def write(folder: Path, **changes: object) -> Path:
    sweep = {
        "folder": str(folder / "runs"),
        "config": ["configs/quickstart.yaml"],
        "overrides": {"project.rank_rule": "fraction", "evaluate.arms": ["base", "spd"]},
        "grid": {"project.fraction": [0.25, 0.5], "calibrate.layers": [["middle", "last"], [2]], "seed": [1, 2]},
    }
    file = folder / "sweep.yaml"
    file.write_text(json.dumps({key: value for key, value in (sweep | changes).items() if value is not None}))
    return file


@pytest.fixture
def plan(tmp_path, capsys) -> Path:
    assert main(["plan", str(write(tmp_path))]) == 0
    assert "8 points" in capsys.readouterr().out
    return tmp_path / "runs" / "plan.json"


def error(capsys, *words: object, code: int = 2) -> str:
    assert main([*map(str, words)]) == code
    return capsys.readouterr().err


@pytest.mark.parametrize("path", sorted(Path("configs/sweeps").glob("*.yaml")), ids=str)
def test_every_shipped_sweep_plans_and_says_how(path, tmp_path):
    assert path.read_text().startswith(f"# python launchers/sweep.py plan {path}\n")
    _, found = points(path)
    assert len({point.run_dir for point in found}) == len(found)
    for point in found:
        SWEEP["load_config"](*SWEEP["split_words"](point.words))


def test_every_combination_is_a_run_of_its_own_whose_words_are_read_back(plan, capsys):
    assert main(["words", str(plan), "2"]) == 0
    words = capsys.readouterr().out.splitlines()
    assert words == [
        "--config", "configs/quickstart.yaml", "project.rank_rule=fraction", "evaluate.arms=[base,spd]",
        "project.fraction=0.25", "calibrate.layers=[2]", "seed=1",
        f"run_dir={plan.parent}/002-fraction0.25-layers-2-seed1",
    ]  # fmt: skip
    config = SWEEP["load_config"](*SWEEP["split_words"](words))
    assert (config.calibrate.layers, config.project.fraction, config.evaluate.arms) == ((2,), 0.25, ("base", "spd"))
    assert "has the points 0 to 7, and no 8; correct --array" in error(capsys, "words", plan, 8)


def test_a_wrong_sweep_is_refused_with_what_is_wrong(tmp_path, capsys):
    assert "cannot be read as YAML" in error(capsys, "plan", tmp_path / "none.yaml")
    assert "a sweep has folder, config, overrides and grid, not" in error(capsys, "plan", write(tmp_path, grids={}))
    assert "grid.seed: 3 is not a list of values; write [3]" in error(capsys, "plan", write(tmp_path, grid={"seed": 3}))
    wrong = write(tmp_path, grid={"project.fractoin": [0.5]})
    assert "the nearest valid key is project.fraction" in error(capsys, "plan", wrong)
    assert not (tmp_path / "runs").exists()
    assert "is no plan" in error(capsys, "status", tmp_path / "plan.json")


def test_a_plan_is_not_replaced_by_another(plan, tmp_path, capsys):
    assert main(["plan", str(write(tmp_path))]) == 0
    assert "is the plan of another sweep" in error(capsys, "plan", write(tmp_path, grid={"seed": [1]}))
    plan.write_text('{"points": [{"index": 0}]}')
    assert f"is no plan (KeyError('run_dir')); delete {plan} and start" in error(capsys, "plan", write(tmp_path))


STATUS = Status("failed", "DataError: no rows", 1.0, "evaluate", 1, "host", 1, None)


def put(file: Path, value: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def test_status_says_of_each_run_how_it_is_and_where(plan, capsys):
    runs = [point.run_dir for point in SWEEP["read_plan"](plan)]
    write_record(runs[0] / "status.json", STATUS)
    for run, age in ((runs[1], 0), (runs[2], 3600)):
        write_record(run / "status.json", dataclasses.replace(STATUS, state="running"))
        put(run / "project" / "manifest.json", {})
        put(run / "heartbeat" / "rank_00000.json", {"place": "generate, 3/9", "time": time.time() - age})
    assert main(["status", str(plan)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("failed (DataError: no rows)" in line for line in lines)
    assert any("running  " in line and "project" in line and "generate, 3/9, 0 s ago" in line for line in lines)
    assert any("running? silent" in line and "3600 s ago" in line for line in lines)
    assert sum("absent" in line for line in lines) == 5


def finish(run: Path, seed: int, num_correct: int) -> None:
    for arm, more in (("base", 0), ("spd", 1)):
        write_merged(answers_path(run / "evaluate", arm, "arithmetic"), answers(num_correct + more, num=10))
    write_report(run, {arm: ARMS[arm] for arm in ("base", "spd")}, Asked("arithmetic", "accuracy", seed))


def test_collect_puts_finished_runs_in_one_file_and_shows_the_spread_of_seeds(plan, capsys):
    assert "no point is finished yet" in error(capsys, "collect", plan, code=3)
    runs = [point.run_dir for point in SWEEP["read_plan"](plan)]
    finish(runs[0], 1, 4)
    finish(runs[1], 2, 6)
    finish(runs[6], 1, 5)
    assert main(["collect", str(plan)]) == 0
    output = capsys.readouterr().out
    assert "project.fraction=0.25, calibrate.layers=[middle,last]" in output
    assert "2 seeds (1, 2)" in output
    assert "a spread between seeds needs at least 2 runs, not 1" in output
    assert "3 of 8 points, a line an arm" in output
    rows = list(csv.DictReader((plan.parent / "results.csv").read_text().splitlines()))
    assert len(rows) == 6
    assert rows[1] | {"arm": "spd", "value": "0.5", "seed": "1", "project.fraction": "0.25"} == rows[1]
