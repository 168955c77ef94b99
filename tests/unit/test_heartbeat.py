"""A rank that lags is named, with what it did last: on an error, and while all wait in silence."""

import time

import torch

from spd_dist.distributed.heartbeat import Heartbeat, telling_of_silence
from spd_dist.distributed.world import World


def heartbeat(folder, rank=0, size=2):
    return Heartbeat(folder, World(rank, size, torch.device("cpu")))


def test_a_silence_is_told_once_and_a_beat_ends_it(tmp_path):
    told = []
    own, other = heartbeat(tmp_path), heartbeat(tmp_path, 1)
    other.beat("generate, 3/9 completions", now=True)
    own.beat("generate, 9/9 completions", now=True)
    with telling_of_silence(own, 0.25, told.append):
        deadline = time.monotonic() + 5
        while not told and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        assert len(told) == 1
        own.beat("finetune", now=True)
        while len(told) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "no unit was done for" in told[0]
    assert told[0].splitlines()[1].startswith("rank 1 on ")
    assert told[0].splitlines()[1].endswith("last at generate, 3/9 completions")
    assert len(told) == 2


def test_a_folder_that_cannot_be_written_is_a_warning_and_no_failure(tmp_path, caplog):
    (tmp_path / "file").touch()
    heartbeat(tmp_path / "file").beat("step 1", now=True)
    assert "rank_00000.json cannot be written" in caplog.text
    assert heartbeat(tmp_path / "file").lines() == ["rank 0: never seen", "rank 1: never seen"]


def test_beats_reach_the_disk_only_every_few_seconds(tmp_path):
    own = heartbeat(tmp_path, size=1)
    own.beat("step 1")
    own.beat("step 2")
    assert own.lines()[0].endswith("last at step 1")
    own.beat("step 3", now=True)
    assert own.lines()[0].endswith("last at step 3")
