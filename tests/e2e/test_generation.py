"""Generation by the launcher: shared by an array of jobs, stopped on request between two completions."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import SMALL, Launch, launch
from tiny import save_tiny_model

from spd_dist.process.signals import STOP_FILE
from spd_dist.storage.completions import read_completions

ARMS = "evaluate.arms=[base,ssd,spd]"
LONGER = ["data.num_train=24", "generate.max_new_tokens=40"]


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    model = save_tiny_model(tmp_path_factory.mktemp("policy") / "model")
    return [f"model.name={model}", *SMALL, *LONGER, ARMS, "--until", "generate"]


def corpora(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in run.glob("**/completions/*.jsonl")}


def written(run: Path) -> list[Path]:
    """The parts of ranks, of both arms."""
    return [path for arm in (run, run / "arms/ssd") for path in arm.glob("generate/completions/part-*.jsonl")]


@pytest.mark.slow  # a real array does it in tests/cluster
def test_tasks_of_an_array_share_one_corpus_and_a_stop_loses_nothing(words, tmp_path):
    launch(2, [*words, f"run_dir={tmp_path / 'whole'}"], tmp_path / "log")
    whole = corpora(tmp_path / "whole")
    assert set(whole) == {"generate/completions/completions.jsonl", "arms/ssd/generate/completions/completions.jsonl"}

    shared = tmp_path / "shared"
    for task, num_ranks in ((1, 1), (0, 2)):
        assert not (shared / "generate" / "manifest.json").exists()
        settings = [f"run_dir={shared}", "generate.num_tasks=2", f"generate.task_index={task}"]
        launch(num_ranks, [*words, *settings], tmp_path / f"log-{task}")
    assert corpora(shared) == whole
    assert (shared / "generate" / "manifest.json").exists()

    refused = tmp_path / "refused"
    again = [*words, f"run_dir={refused}"]
    output = launch(2, [*again, "generate.max_length_rate=0.1"], tmp_path / "log-refused", code=3)
    assert "above generate.max_length_rate=0.1; look at them with launchers/corpus.py" in output
    output = launch(2, [*again, "generate.max_length_rate=1"], tmp_path / "log-raised")
    assert "24 of 24 completions were made before" in output
    assert corpora(refused) == whole

    stopped = tmp_path / "stopped"
    settings = [*words, f"run_dir={stopped}", "generate.batch_size=1"]
    run = Launch(2, settings, tmp_path / "log-stopped")
    run.when(lambda: any(path.stat().st_size for path in written(stopped)), (stopped / STOP_FILE).touch)
    assert run.wait() == [75, 75], run.output()
    assert "stopped on request" in run.output()
    left = [one for part in written(stopped) for one in read_completions(part)]
    assert 1 <= len(left) < 24
    launch(2, settings, tmp_path / "log-again")
    assert corpora(stopped) == whole
