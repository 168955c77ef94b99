import json
import math

import pytest
from recording import Recorder

from spd_dist.tracking.metrics import MetricLogger, read_metrics


def test_a_line_holds_time_stage_step_and_named_values(tmp_path):
    metrics = MetricLogger(tmp_path / "metrics", rank=3)
    metrics.log("calibrate", {"loss": 1.5, "step_tokens": 20}, 7)
    line = json.loads((tmp_path / "metrics" / "rank_00003.jsonl").read_text())  # before it is closed: flushed per line
    assert line.pop("time") > 1e9
    assert line == {"stage": "calibrate", "step": 7, "calibrate/loss": 1.5, "calibrate/step_tokens": 20}
    metrics.finish()


def test_a_line_torn_by_a_kill_is_dropped_and_logging_goes_on(tmp_path):
    with MetricLogger(tmp_path) as metrics:
        metrics.log("finetune", {"loss": 1.0}, 1)
    with open(metrics.path, "a") as file:
        file.write('{"time": 17')
    with MetricLogger(tmp_path) as metrics:
        metrics.log("finetune", {"loss": 0.5}, 2)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_rows_of_all_ranks_are_read_in_the_order_of_time(tmp_path):
    with MetricLogger(tmp_path, 0) as zero, MetricLogger(tmp_path, 1, prefix="task-00001_") as one:
        for step in range(4):
            (zero, one)[step % 2].log("generate", {"x": step}, step)
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rank_00000.jsonl", "task-00001_rank_00001.jsonl"]


def test_values_that_json_lacks_stay_visible(tmp_path):
    mirror = Recorder()
    with MetricLogger(tmp_path, mirror=mirror) as metrics:
        metrics.log("finetune", {"loss": math.nan, "norm": math.inf}, 1)
    (row,) = read_metrics(tmp_path)
    assert (row["finetune/loss"], row["finetune/norm"]) == ("nan", "inf")
    assert math.isnan(mirror.rows[0]["finetune/loss"])


def test_the_mirror_sees_the_same_values_with_the_stages_own_step(tmp_path):
    mirror = Recorder()
    with MetricLogger(tmp_path, mirror=mirror) as metrics:
        metrics.log("calibrate", {"loss": 1.0}, 5)
        metrics.log("finetune", {"loss": 2.0}, 1)
        metrics.table("generate", "samples", ["id", "text"], [["a", "b"]])
    assert mirror.rows == [{"calibrate/step": 5, "calibrate/loss": 1.0}, {"finetune/step": 1, "finetune/loss": 2.0}]
    assert mirror.tables == [("generate/samples", ["id", "text"], [["a", "b"]])]
    assert mirror.exit_code == 0


def test_another_arm_has_names_and_steps_of_its_own(tmp_path):
    mirror = Recorder()
    with MetricLogger(tmp_path, mirror=mirror) as metrics:
        metrics.labelled("psr").log("finetune", {"loss": 3.0}, 1)
        metrics.log("finetune", {"loss": 2.0}, 1)
    assert [row.get("finetune/psr_loss") for row in read_metrics(tmp_path)] == [3.0, None]
    assert mirror.rows[0] == {"finetune/psr_step": 1, "finetune/psr_loss": 3.0}


def test_a_mirror_can_wait_until_the_logger_is_entered(tmp_path):
    mirror, opened = Recorder(), []
    metrics = MetricLogger(tmp_path, opening=lambda: opened.append(True) or mirror)
    assert not opened
    with metrics:
        metrics.labelled("psr").log("finetune", {"loss": 1.0}, 1)
    assert (mirror.rows, mirror.exit_code) == ([{"finetune/psr_step": 1, "finetune/psr_loss": 1.0}], 0)


def test_the_mirror_hears_that_the_run_failed(tmp_path):
    mirror = Recorder()
    with pytest.raises(KeyError), MetricLogger(tmp_path, mirror=mirror):
        raise KeyError
    assert mirror.exit_code == 1
