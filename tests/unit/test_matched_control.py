"""Rows along which a random subspace is matched to the method's own."""

from types import SimpleNamespace

import pytest

from spd_dist.arms import ARMS, iterations_of
from spd_dist.config import Config
from spd_dist.data.tasks import find_task
from spd_dist.errors import ConfigError, DataError
from spd_dist.overrides import load_config
from spd_dist.side_stages.matched_control import NUM_ROWS, matched_rows
from spd_dist.stage_inputs import check_students


def run_of(rows: list[dict], config: Config) -> SimpleNamespace:
    return SimpleNamespace(config=config, task=find_task("codealpaca"), rows=lambda split: {"calibration": rows}[split])


def asked(count: int) -> list[dict]:
    return [{"id": str(k), "instruction": f"{k} + 1?", "output": f"{k + 1}"} for k in range(count)]


def test_rows_are_the_first_calibration_rows_with_an_answer():
    rows = asked(50)
    rows[2] = {**rows[2], "output": " "}
    few = matched_rows(run_of(rows, load_config(overrides=["calibrate.num_examples=5"])))
    assert [row["id"] for row in few] == [rows[k]["id"] for k in (0, 1, 3, 4)]
    many = matched_rows(run_of(rows, load_config(overrides=["calibrate.num_examples=50"])))
    assert len(many) == NUM_ROWS - 1


def test_rows_without_any_answer_are_refused():
    rows = [{**row, "output": ""} for row in asked(4)]
    with pytest.raises(DataError, match=r"project\.match_kl: none of the calibration rows .* project\.match_kl=false"):
        matched_rows(run_of(rows, load_config()))


def test_fewer_prompts_than_iterations_are_refused_before_anything_is_loaded():
    config = load_config(overrides=["finetune.num_on_policy_iterations=3", "evaluate.arms=[spd_onpolicy]"])
    run = SimpleNamespace(config=config, rows=lambda _: asked(2), config_of=lambda _: config)
    with pytest.raises(
        ConfigError, match=r"finetune\.num_on_policy_iterations: 3 is not valid with 2 training prompts"
    ):
        check_students(run, iterations_of(ARMS["spd_onpolicy"], config))


def test_iterations_of_an_arm_share_its_subspace_and_its_match_alone():
    config = load_config(overrides=["finetune.num_on_policy_iterations=3"])
    arm = ARMS["random_onpolicy"]
    first, second, last = iterations_of(arm, config)
    assert [one.stage("finetune") for one in (first, second, last)] == [
        "arms/random_onpolicy_iteration1/finetune",
        "arms/random_onpolicy_iteration2/finetune",
        "arms/random_onpolicy/finetune",
    ]
    assert {one.stage(verb) for one in (first, second, last) for verb in ("project", "match")} == {
        "arms/random_onpolicy/project",
        "arms/random_onpolicy/match",
    }
    assert (first.before, second.before, last.before) == (None, first, second)
    assert [one.iteration for one in (first, second, last)] == [(1, 3), (2, 3), (3, 3)]
    assert [one.stage("generate") for one in iterations_of(ARMS["spd"], config)] == ["generate"]
