"""A time is told when it can be known: after three units, when steady; of the run once all paces are known."""

import pytest

from spd_dist.arms import chosen, iterations_of
from spd_dist.config import Config
from spd_dist.overrides import config_of_arm, load_config
from spd_dist.runs.rounds import parts_of
from spd_dist.tracking.progress import RunEstimate, RunPart, StageEstimate


def parts(config: Config, num_ranks: int = 1) -> list[RunPart]:
    arms = [each for arm in chosen(config.evaluate.arms) for each in iterations_of(arm, config_of_arm(config, arm))]
    return parts_of(config, {arm: config_of_arm(config, arm) for arm in arms}, num_ranks)


def paces(times):
    """What is told after each unit that ends at one of `times`."""
    estimate, told = StageEstimate(), []
    for count, seconds in enumerate(times, 1):
        estimate.observe(count, seconds)
        told.append(estimate.seconds_a_unit(count, seconds))
    return told


def test_nothing_is_told_before_three_units_are_done_and_one_more_agrees():
    assert paces([2.0, 4.0, 6.0, 8.0, 10.0]) == [None, None, None, 2.0, 2.0]


def test_nothing_is_told_while_the_estimate_moves_by_more_than_half():
    # The first unit took forty seconds, the others one each, as where many prompts are decoded at once.
    told = paces([40.0 + count for count in range(40)])
    first = next(count for count, pace in enumerate(told, 1) if pace is not None)
    assert told[3] is not None or first > 3
    for count, pace in enumerate(told, 1):
        if pace is not None:
            half = -(-count // 2)
            assert abs((40.0 + half - 1) / half - pace) <= pace * 0.51 or half < 3


def test_a_pace_that_jumps_is_not_told_until_it_is_steady_again():
    times = [1.0, 2.0, 3.0, 4.0, 5.0, 25.0, 45.0]
    assert paces(times)[4:] == [1.0, None, None]


def test_a_million_units_leave_a_few_hundred_sights():
    estimate = StageEstimate()
    for count in range(1, 1_000_001):
        estimate.observe(count, float(count))
    assert len(estimate._seen) < 400


def test_the_run_takes_its_stage_and_all_that_come_after():
    run = RunEstimate()
    run.expect([RunPart("generate", "generate", 10), RunPart("finetune", "finetune", 4, "calibrate", 2.0),
                RunPart("evaluate/base", "evaluate", 5, "generate")])  # fmt: skip
    run.now = "generate"
    run.measure("generate", 3.0)
    assert run.seconds_left(12.0) is None
    run.measure("calibrate", 1.0)
    assert run.seconds_left(12.0) == 12.0 + 4 * 2.0 * 1.0 + 5 * 3.0
    run.measure("finetune", 7.0)
    run.finish("generate")
    assert run.seconds_left(0.0) == 4 * 7.0 + 5 * 3.0


def test_a_run_of_all_rows_that_there_are_has_no_estimate_before_they_are_counted():
    config = load_config(["configs/quickstart.yaml"], ["data.num_train=null", "data.num_test=null"])
    run = RunEstimate()
    run.expect(parts(config))
    run.now = "project"
    run.measure("calibrate", 1.0)
    run.measure("generate", 1.0)
    assert run.seconds_left(3.0) is None


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_the_parts_are_those_of_the_arms(num_ranks):
    config = load_config(["configs/quickstart.yaml"], ["data.num_train=96"])
    found = parts(config, num_ranks)
    assert [part.folder for part in found] == [
        "project", "arms/psr/generate", "generate", "arms/psr/finetune", "finetune", "evaluate/base", "evaluate/psr",
        "evaluate/spd", "evaluate/projected",
    ]  # fmt: skip
    assert [part.units for part in found[:2]] == [32 / num_ranks, 96 / num_ranks]
    assert found[3].units == 12


def units(*overrides: str) -> dict[str, float | None]:
    config = load_config(["configs/quickstart.yaml"], ["data.num_train=96", "data.num_test=10", *overrides])
    return {part.folder: part.units for part in parts(config)}


def test_each_arm_counts_by_its_own_settings():
    names = "[base,spd,filtered,spd@finetune.num_epochs=3,psr@finetune.global_batch_size=4,supervised]"
    found = units(f"evaluate.arms={names}", "finetune.global_batch_size=8", "finetune.num_epochs=1")
    assert (found["generate"], found["arms/filtered/generate"]) == (96, 4 * 96)
    assert (found["finetune"], found["arms/filtered/finetune"]) == (12, 4 * 12)
    assert found["arms/spd@finetune.num_epochs=3/finetune"] == 36
    assert found["arms/psr@finetune.global_batch_size=4/finetune"] == 24
    assert "arms/supervised/generate" not in found
    assert found["arms/supervised/finetune"] == 4, "on 32 calibration examples"


def test_what_is_answered_again_is_trained_once():
    names = "[base,spd,spd@evaluate.temperature=0.5@evaluate.num_samples=3]"
    config = load_config(["configs/quickstart.yaml"], [f"evaluate.arms={names}", "data.num_test=10"])
    folders = [part.folder for part in parts(config)]
    assert folders.count("generate") == folders.count("finetune") == 1
    assert units(f"evaluate.arms={names}")["evaluate/spd@evaluate.temperature=0.5@evaluate.num_samples=3"] == 30


def test_iterations_share_the_prompts_and_round_their_steps_up():
    found = units("evaluate.arms=[spd_onpolicy]", "finetune.num_on_policy_iterations=5", "finetune.num_epochs=1",
                  "finetune.global_batch_size=8")  # fmt: skip
    last = "arms/spd_onpolicy"
    assert (found["arms/spd_onpolicy_iteration1/generate"], found[f"{last}/generate"]) == (20, 19)
    assert found["arms/spd_onpolicy_iteration1/finetune"] == found[f"{last}/finetune"] == 3
