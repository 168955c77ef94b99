"""A run is restarted from a stage: what it made moves aside, the rest stays, and nothing is deleted."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from spd_dist.distributed.world import World
from spd_dist.errors import ConfigError
from spd_dist.overrides import load_config
from spd_dist.storage.records import write_record
from spd_dist.storage.restart import Status, restart
from spd_dist.storage.run_folder import RunFolder
from spd_dist.storage.settings import first_reader
from spd_dist.tracking.metrics import read_metrics

ALONE = World(0, 1, torch.device("cpu"))
MADE = [
    "project",
    "generate",
    "finetune",
    "evaluate/spd",
    "evaluate",
    "arms/psr/generate",
    "arms/psr/finetune",
    "mechanism",
]
STEPS = [("calibrate", 1), ("finetune", 1), ("finetune", 2), ("evaluate", 1)]


def plain(*words: str) -> dict:
    return dataclasses.asdict(load_config([], words))


@pytest.fixture
def run(tmp_path) -> Path:
    """A folder with every stage finished."""
    folder = RunFolder(tmp_path / "run", plain(), ALONE)
    for stage in MADE:
        (folder.start(stage, {}) / "made").write_text(stage)
        folder.finish(stage, {}, ["made"], seconds=1.0)
    (folder.path / "report.json").touch()
    (folder.path / "rounds" / "2" / "project").mkdir(parents=True)
    (folder.path / "metrics").mkdir()
    rows = [json.dumps({"time": index, "stage": stage, "step": step}) for index, (stage, step) in enumerate(STEPS)]
    (folder.path / "metrics" / "rank_00000.jsonl").write_text("\n".join(rows) + "\n")
    return folder.path


def there(folder: Path) -> set[str]:
    return {stage for stage in MADE if (folder / stage / "made").exists()}


def test_what_a_stage_and_later_ones_made_is_moved_and_the_rest_stays(run):
    restart(run, "finetune", plain("finetune.num_epochs=3"))
    (replaced,) = (run / "replaced").iterdir()
    assert there(run) == {"project", "generate", "arms/psr/generate", "mechanism"}
    assert there(replaced) == {"finetune", "evaluate/spd", "evaluate", "arms/psr/finetune"}
    assert (replaced / "report.json").exists()
    assert (replaced / "rounds" / "2" / "project").is_dir()
    assert [row["stage"] for row in read_metrics(run / "metrics")] == ["calibrate"]
    assert [row["stage"] for row in read_metrics(replaced / "metrics")] == [stage for stage, _ in STEPS]
    RunFolder(run, plain("finetune.num_epochs=3"), ALONE)


def test_a_restart_that_was_killed_goes_on_with_the_same_command(run):
    (run / "replaced" / "earlier").mkdir(parents=True)
    (run / "evaluate").rename(run / "replaced" / "earlier" / "evaluate")
    restart(run, "sketch", plain("sketch.method=gram"))
    assert there(run) == set()
    assert len(list((run / "replaced").rglob("made"))) == len(MADE)


def test_stages_that_read_what_changed_are_not_kept(run):
    with pytest.raises(
        ConfigError, match=r"--restart-from finetune: earlier .*\(data.task is 'arithmetic' there and 'svamp'"
    ):
        restart(run, "finetune", plain("data.task=svamp", "finetune.num_epochs=3"))
    assert there(run) == set(MADE)
    assert not (run / "replaced").exists()
    restart(run, "calibrate", plain("data.task=svamp", "finetune.num_epochs=3"))


@pytest.mark.parametrize(("key", "stage"), [
    ("model.name", "calibrate"), ("project.rank", "calibrate"), ("project.mode", "generate"), ("seed", "generate"),
    ("finetune.lora_rank", "finetune"), ("evaluate.max_new_tokens", "evaluate"), ("distributed.deepspeed", "evaluate"),
])  # fmt: skip
def test_each_key_knows_the_first_stage_that_reads_it(key, stage):
    assert first_reader([key]) == stage
    assert first_reader(["evaluate.arms", key]) == stage


STATUS = Status("failed", "", 1.0, "evaluate", 1, "host", 1, None)


def test_a_folder_without_a_run_and_one_that_is_at_work_are_refused(run, tmp_path):
    with pytest.raises(ConfigError, match=r"--restart-from generate: .*empty holds no run yet; leave it out"):
        restart(tmp_path / "empty", "generate", plain())
    write_record(run / "status.json", dataclasses.replace(STATUS, state="running"))
    (run / "heartbeat").mkdir()
    (run / "heartbeat" / "rank_00000.json").touch()
    with pytest.raises(ConfigError, match=r"may be at work, a rank was seen 0 s ago; stop it \(touch .*PREEMPT\)"):
        restart(run, "generate", plain())
    write_record(run / "status.json", STATUS)
    restart(run, "generate", plain())
