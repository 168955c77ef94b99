"""What the corpus tools say of a corpus can be counted by hand."""

from __future__ import annotations

import json
import runpy
import sys

import pytest

from spd_dist.analysis.corpus import corpus_diff, corpus_stats, length_histogram, load_corpus, pairs
from spd_dist.errors import DataError
from spd_dist.types import Completion


def completion(index, tokens, text="words", finish="stop", sample=0):
    return Completion(f"p{index}", sample, index, (1,), tuple(tokens), text, finish)


LEFT = [completion(0, range(10)), completion(1, range(4), "", "length"), completion(2, [7, 8] * 20, "again", "length")]
RIGHT = [completion(0, range(10)), completion(1, [0, 1, 9]), completion(5, [3])]


def write(path, completions):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(vars(one)) + "\n" for one in completions))


def test_stats_count_what_is_there():
    found = corpus_stats(LEFT)
    assert (found.num_completions, found.num_prompts, found.num_tokens, found.max_tokens) == (3, 3, 54, 40)
    assert found.mean_tokens == 18
    assert found.median_tokens == 10
    assert found.stop_rate == found.empty_rate == found.repetition_rate == pytest.approx(1 / 3)
    assert found.distinct_rate == 1


def test_a_histogram_counts_every_completion_once():
    bars = length_histogram(LEFT, 4)
    assert [(bar.start, bar.stop, bar.num_completions) for bar in bars] == [
        (0, 11, 2),
        (11, 22, 0),
        (22, 33, 0),
        (33, 44, 1),
    ]
    assert [bar.num_completions for bar in length_histogram([completion(0, [])])] == [1]


def test_a_diff_compares_the_prompts_that_both_answered():
    found = corpus_diff(LEFT, RIGHT)
    assert (found.num_both, found.num_only_left, found.num_only_right) == (2, 1, 1)
    assert found.same_rate == 0.5
    assert found.mean_shared_tokens == 6
    assert (found.mean_left_tokens, found.mean_right_tokens) == (7, 6.5)
    assert (found.left_stop_rate, found.right_stop_rate) == (0.5, 1)


def test_a_corpus_is_found_in_a_run_an_arm_or_a_file(tmp_path):
    write(tmp_path / "generate" / "completions" / "completions.jsonl", LEFT)
    write(tmp_path / "arms" / "psr" / "generate" / "completions" / "completions.jsonl", RIGHT)
    for path in (tmp_path, tmp_path / "generate", tmp_path / "generate/completions/completions.jsonl"):
        assert load_corpus(path) == LEFT
    assert load_corpus(tmp_path / "arms" / "psr") == RIGHT


def test_no_completion_is_counted_twice(tmp_path):
    folder = tmp_path / "generate" / "completions"
    write(folder / "task-00000-of-00002.part-00000-of-00001.jsonl", LEFT[:2])
    write(folder / "task-00001-of-00002.part-00000-of-00001.jsonl", LEFT[1:])
    assert load_corpus(tmp_path) == LEFT
    write(folder / "completions.jsonl", LEFT[::-1])  # killed before the parts were removed
    assert load_corpus(tmp_path) == LEFT[::-1]


def test_what_cannot_be_compared_is_named(tmp_path):
    with pytest.raises(DataError, match="holds no completions; give a run folder"):
        load_corpus(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no prompt and sample in common; give two arms of one run"):
        pairs(LEFT[:1], RIGHT[1:])


def test_the_launcher_prints_stats_a_diff_and_completions_side_by_side(tmp_path, monkeypatch, capsys):
    write(tmp_path / "a.jsonl", LEFT)
    write(tmp_path / "b.jsonl", RIGHT)
    monkeypatch.setenv("COLUMNS", "200")

    def printed(*words, code=0):
        monkeypatch.setattr(sys, "argv", ["corpus.py", *map(str, words)])
        with pytest.raises(SystemExit) as done:
            runpy.run_path("launchers/corpus.py", run_name="__main__")
        assert done.value.code == code
        return capsys.readouterr()

    left, right = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    assert "repetition_rate" in printed("stats", left, right).out
    assert "same_rate" in printed("diff", left, right).out
    shown = printed("show", left, right, "--differing").out
    assert "p1" in shown
    assert "p0" not in shown
    assert "[10 tokens, stop]" in printed("show", left, "--id", "p0").out
    assert "error: " in printed("stats", tmp_path / "none", code=3).err
