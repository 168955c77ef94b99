"""A slow rank 0 ends no run, and a dead rank ends all that wait for it, without a parent that looks after them."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import SMALL, Launch
from tiny import save_tiny_model

SLOW = "tests/slow_main_rank.py"


@pytest.fixture
def words(tmp_path, monkeypatch) -> list[str]:
    monkeypatch.setenv("SLOW_PLACES", str(tmp_path / "places"))
    monkeypatch.setenv("SLOW_SECONDS", "20")
    folder = save_tiny_model(tmp_path / "model")
    return [f"model.name={folder}", *SMALL, f"run_dir={tmp_path / 'run'}"]


def places(folder: Path) -> list[str]:
    """Where rank 0 was slowed so far."""
    file = folder / "places"
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.slow
def test_a_run_ends_well_though_rank_0_is_slower_than_a_collective_may_be_wherever_it_works_alone(tmp_path, words):
    run = Launch(2, [*words, "evaluate.arms=[base,spd]", "distributed.timeout_seconds=5"], tmp_path / "log", SLOW)
    assert run.wait(1500) == [0, 0], run.output()
    assert len(places(tmp_path)) > 15, places(tmp_path)
    assert (tmp_path / "run" / "report.json").exists()


@pytest.mark.slow
def test_two_ranks_that_wait_end_when_the_third_dies_with_nobody_to_kill_them(tmp_path, words):
    """Rank 0 is at work alone, rank 1 waits in the store; a collective's time would be an hour."""
    words = [*words, "distributed.timeout_seconds=3600"]
    run = Launch(3, words, tmp_path / "log", SLOW)
    run.when(lambda: len(places(tmp_path)) == 2, run.ranks[2].kill, 300)
    codes = run.wait(60)
    assert codes[2] == -9
    assert all(code == 1 for code in codes[:2]), run.output()
    assert "rank 2 on " in run.output()
    assert "its process is gone" in run.output()
