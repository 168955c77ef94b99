"""Near-duplicates are found exactly as a comparison of every pair finds them."""

import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spd_dist.config import Data
from spd_dist.data.leaks import find_leaks, without_leaks
from spd_dist.data.sources import load_rows
from spd_dist.data.tasks import find_task

REAL_ROWS = Path("../shared/data")
BBH = find_task("bbh")
SENTENCES = st.lists(st.sampled_from("abcd"), min_size=1, max_size=12).map(" ".join)


def rows(texts, name):
    return [{"id": f"{name}{index}", "task": "t", "input": text, "target": ""} for index, text in enumerate(texts)]


def similarity(left, right):
    """Jaccard of word 5-grams, by the definition."""
    grams = []
    for words in (left.split(), right.split()):
        size = min(5, len(words))
        grams.append({tuple(words[start : start + size]) for start in range(len(words) - size + 1)})
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


@given(st.lists(SENTENCES, max_size=6), st.lists(SENTENCES, max_size=6), st.sampled_from([0.2, 0.5, 0.7, 1.0]))
def test_the_index_finds_what_every_pair_compared_finds(left, right, bound):
    [report] = find_leaks({"left": rows(left, "l"), "right": rows(right, "r")}, BBH, similarity=bound)
    expected = {}
    for index, text in enumerate(left):
        best = max((similarity(text, other) for other in right), default=0.0)
        if best >= bound:
            expected[f"l{index}"] = best
    assert {leak.id: leak.similarity for leak in report.leaks} == expected
    assert report.num_exact == sum(value == 1.0 for value in expected.values())
    assert report.num_exact + report.num_near == len(expected)
    kept = list(without_leaks(rows(left, "l"), [report]))
    assert [row["id"] for row in kept] == [f"l{index}" for index in range(len(left)) if f"l{index}" not in expected]


def test_case_and_white_space_do_not_hide_a_duplicate():
    splits = {"train": rows(["How  MANY are\nthere, Tom?"], "a"), "test": rows(["how many are there , tom?"], "b")}
    [report] = find_leaks(splits, BBH, similarity=0.5)
    assert (report.num_exact, report.leaks[0].other_id) == (1, "b0")


@pytest.mark.data
@pytest.mark.skipif(not REAL_ROWS.is_dir(), reason=f"the benchmark rows are not at {REAL_ROWS}")
def test_the_known_duplicates_of_mbpp_are_found():
    config = Data(
        train=f"{REAL_ROWS}/mbpp/train.jsonl, {REAL_ROWS}/mbpp/validation.jsonl", test=f"{REAL_ROWS}/mbpp/test.jsonl"
    )
    task = find_task("mbpp")
    train, test = (load_rows(task, split, config) for split in ("train", "test"))
    [report] = find_leaks({"train": train, "test": test}, task, similarity=0.5)
    assert len(train) == 464
    assert report.num_near == 28
    assert {leak.id for leak in report.leaks if leak.similarity == 1} == {"mbpp/602", "mbpp/704", "mbpp/872"}


class LazyRows(Sequence):
    """Many rows that are made when they are read."""

    def __init__(self, num: int) -> None:
        self.num = num

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> dict:
        if index >= self.num:
            raise IndexError
        words = [f"{index % 1000}x{(index * place) % 997}" for place in range(1, 80)]
        return {"id": f"t{index}", "task": "t", "input": " ".join(words), "target": ""}


@pytest.mark.parametrize("order", [("train", "test"), ("test", "train")])
def test_the_n_grams_of_the_larger_split_are_not_held(order):
    splits = {
        "train": LazyRows(4000),
        "test": [LazyRows(4000)[index] | {"id": f"s{index}"} for index in range(5, 3000, 1000)],
    }
    tracemalloc.start()
    try:
        [report] = find_leaks({name: splits[name] for name in order}, BBH, similarity=0.9)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert report.num_exact == 3
    assert peak < 2e6, "bytes; all 4000 x 75 n-grams take a hundred megabytes"
