"""A rank that lags is named, with what it did last: on an error, and while all wait in silence."""

import time

import pytest
import torch

from spd_dist.distributed.heartbeat import Heartbeat, brief, naming_lagging_ranks, telling_of_silence
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


def test_beats_reach_the_disk_when_due_by_overwriting_one_file(tmp_path, monkeypatch):
    own = heartbeat(tmp_path, size=1)
    own.beat("step 1 " + "of a long name " * 100, now=True)
    [file] = tmp_path.iterdir()
    before = (file.stat().st_ino, file.stat().st_size, tmp_path.stat().st_mtime_ns)
    own.beat("step 2")
    own.write_if_due()
    assert "step 1" in own.lines()[0]
    monkeypatch.setattr("spd_dist.distributed.heartbeat.SECONDS_BETWEEN", 0.0)
    own.write_if_due()
    assert own.lines()[0].endswith("last at step 2")
    own.beat("step 3", now=True)
    assert own.lines()[0].endswith("last at step 3")
    assert (file.stat().st_ino, file.stat().st_size, tmp_path.stat().st_mtime_ns) == before
    own.close()


def test_of_a_thousand_ranks_one_a_host_says_where_the_ten_are_that_matter(tmp_path):
    first, second = heartbeat(tmp_path, 3, 1024), heartbeat(tmp_path, 4, 1024)
    for rank in (first, second):
        rank.beat(f"step {rank.world.rank}", now=True)
    (tmp_path / "rank_00007.json").write_text('{"place": "st')  # a damaged file hides no cause
    lines = first.table().splitlines()
    assert len(lines) == 9
    assert lines[0].startswith("A rank that failed or lags")
    assert "never seen" in lines[1]
    assert lines[-1] == f"and 1017 more in {tmp_path}"
    assert second.table() == "rank 4 was at step 4; another rank of this host says where all were last seen"
    assert first.table().splitlines() == lines
    again = heartbeat(tmp_path, 4, 1024)  # in the next attempt
    again.beat("step 1", now=True)
    assert len(again.table().splitlines()) == 9
    for rank in (first, second, again):
        rank.close()


def test_a_lost_rank_takes_ten_lines_of_the_log_and_the_traceback_a_file(tmp_path):
    own = heartbeat(tmp_path, 0, 1024)
    with pytest.raises(RuntimeError) as caught, naming_lagging_ranks(own):
        raise RuntimeError("connection closed by peer\nException raised from recv at tcp.cpp:81\nframe #0: ...")
    lines = brief(caught.value).splitlines()
    assert len(lines) == 10
    assert lines[0] == "RuntimeError: connection closed by peer (tracebacks: RUN_DIR/heartbeat/failed_*)"
    assert "frame #0" in (tmp_path / "failed_00000.txt").read_text()
    assert brief(RuntimeError("a fault of ours")) is None
    own.close()
