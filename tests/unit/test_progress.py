import logging

import pytest

from spd_dist.tracking.metrics import MetricLogger, read_metrics
from spd_dist.tracking.progress import Progress, ProgressReports, RunEstimate, RunPart, clock_time


class Clock:
    seconds = 0.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, "spd_dist")
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_line_every_few_seconds_with_units_speed_and_time_left(lines):
    clock = Clock()
    with Progress("generate", 100, "prompts", ProgressReports(every_seconds=5), clock=clock) as progress:
        for _ in range(10):
            clock.seconds += 1
            progress.advance(5, tokens=50)
    assert lines() == [
        "generate: starts, 100 prompts",
        "generate: 25/100 prompts, 50 tokens/s, ETA 0:15",
        "generate: 50/100 prompts, 50 tokens/s, ETA 0:10",
        "generate: done, 50/100 prompts, 50 tokens/s, 10.0 s",
    ]


def test_the_last_unit_is_said_once(lines):
    clock = Clock()
    with Progress("finetune", 4, "steps", ProgressReports(every_seconds=1), clock=clock) as progress:
        for _ in range(4):
            clock.seconds += 2
            progress.advance()
    assert lines()[-2:] == ["finetune: 3/4 steps, 0.50 steps/s", "finetune: done, 4/4 steps, 8.0 s"]


def test_the_time_of_the_whole_run_is_told_once_its_later_stages_have_a_pace(lines):
    clock, run = Clock(), RunEstimate()
    run.expect([RunPart("generate", "generate", 10), RunPart("evaluate/spd", "evaluate", 20, "generate"),
                RunPart("finetune", "finetune", 5, "calibrate", 4.0)])  # fmt: skip
    run.now = "generate"
    for stage in ("generate", "finetune"):
        with Progress(stage, 10, "units", ProgressReports(every_seconds=1, run=run), clock=clock) as progress:
            for _ in range(5):
                clock.seconds += 2
                progress.advance()
        run.measure("calibrate", 1.0)
    assert "generate: 5/10 units, 0.50 units/s, ETA 0:10" in lines()
    run.finish("finetune")
    run.finish("generate")
    assert run.seconds_left(3.0) == 3.0 + 20 * 2.0


def test_it_works_without_a_total_and_without_tokens(lines):
    clock = Clock()
    with Progress("calibrate", None, "batches", ProgressReports(every_seconds=2), clock=clock) as progress:
        clock.seconds += 4
        progress.advance(2)
    assert lines() == [
        "calibrate: starts, batches",
        "calibrate: 2 batches, 0.50 batches/s",
        "calibrate: done, 2 batches, 4.0 s",
    ]


def test_what_an_earlier_attempt_did_counts_as_done_and_not_as_speed(lines):
    clock = Clock()
    with Progress("generate", 100, "prompts", ProgressReports(every_seconds=1), clock=clock) as progress:
        progress.skip(90)
        clock.seconds += 2
        progress.advance(1)
        assert "generate: 91/100 prompts, 0.50 prompts/s" in lines()
        for _ in range(3):
            clock.seconds += 2
            progress.advance(1)
    assert lines()[-2] == "generate: 94/100 prompts, 0.50 prompts/s, ETA 0:12"


def test_a_total_may_be_learned_when_the_work_is_planned(lines):
    with Progress("finetune", None, "steps", clock=Clock()) as progress:
        progress.begin(10, skipped=4)
        progress.advance(6)
    assert lines() == ["finetune: starts, steps", "finetune: done, 10/10 steps, 0.0 s"]


def test_a_stage_that_fails_says_where_it_stopped(lines):
    with pytest.raises(KeyError), Progress("sketch", 3, "shards", clock=Clock()):
        raise KeyError
    assert lines()[-1] == "sketch: stopped, 0/3 shards, 0.0 s"


def test_progress_is_in_the_metrics_too(tmp_path):
    clock = Clock()
    with (
        MetricLogger(tmp_path) as metrics,
        Progress("generate", 2, "prompts", ProgressReports(metrics, 1), clock=clock) as progress,
    ):
        clock.seconds += 6
        progress.advance(1, tokens=30)
        progress.advance(1, tokens=10)
    first, last = read_metrics(tmp_path)
    assert (first["step"], first["generate/done_count"], first["generate/tokens_per_second"]) == (1, 1, 5.0)
    assert (last["step"], last["generate/tokens_per_second"], last["generate/elapsed_seconds"]) == (2, 6.7, 6.0)


def test_times_are_written_as_clocks():
    assert [clock_time(seconds) for seconds in (0, 59.6, 61, 3600, 100_000)] == [
        "0:00",
        "1:00",
        "1:01",
        "1:00:00",
        "27:46:40",
    ]


def test_each_unit_is_a_place_for_the_heartbeat_and_an_error_ends_in_stopped(lines):
    places = []

    def one_unit_and_no_more():
        with Progress("generate", 3, "prompts", ProgressReports(beat=places.append)) as progress:
            progress.advance()
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="disk"):
        one_unit_and_no_more()
    assert places == ["generate, 1/3 prompts"]
    assert lines()[-1].startswith("generate: stopped, 1/3 prompts")
