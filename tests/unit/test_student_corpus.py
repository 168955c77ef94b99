"""What a student is not given, and why."""

import dataclasses
import logging

import pytest
from tiny import tiny_tokenizer

from spd_dist.config import Config, Finetune
from spd_dist.data.tasks import find_task
from spd_dist.errors import ConfigError, DataError
from spd_dist.student_corpus import FilterSummary, filtered, votes_by
from spd_dist.types import Completion

LOOP = (7, 8) * 20
ALL = ("ended", "loops", "agreed")


def completion(prompt: str, sample: int, text: str, *, ended: bool = True, tokens: tuple[int, ...] = ()) -> Completion:
    tokens = tokens or tuple(tiny_tokenizer().encode(text, add_special_tokens=False))
    return Completion(prompt, sample, 0, (5, 6), tokens, text, "stop" if ended else "length")


def keep(*filters: str) -> Config:
    return dataclasses.replace(Config(), finetune=Finetune(filter=filters))


def by_text(one: Completion) -> str | None:
    return one.text or None


CORPUS = [
    completion("a", 0, "12"), completion("a", 1, "12"), completion("a", 2, "13"), completion("a", 3, ""),
    completion("b", 0, "1"), completion("b", 1, "2"),
    completion("c", 0, "9", ended=False), completion("c", 1, "9", tokens=LOOP), completion("c", 2, "8"),
]  # fmt: skip


def kept(*filters: str) -> list[tuple[str, int]]:
    return [(one.id, one.sample) for one in filtered(CORPUS, keep(*filters), by_text)[0]]


def test_without_filters_the_corpus_is_what_it_was():
    assert filtered(CORPUS, Config(), by_text) == (CORPUS, None)
    assert filtered(CORPUS, Config(), by_text)[0] is CORPUS


def test_each_filter_leaves_out_what_it_names_and_keeps_the_order():
    everything = [(one.id, one.sample) for one in CORPUS]
    assert kept("ended") == [one for one in everything if one != ("c", 0)]
    assert kept("loops") == [one for one in everything if one != ("c", 1)]
    assert kept("agreed") == [("a", 0), ("a", 1), ("c", 0), ("c", 1)]
    assert kept(*ALL) == [("a", 0), ("a", 1)], "what is left out already has no vote"


@pytest.mark.parametrize(
    ("answers", "places"),
    [
        (["7", "", "", ""], []),
        (["7"], []),
        (["7", "7", "", ""], [0, 1]),
        (["7", "8", "7", "9"], [0, 2]),
        (["7", "8", "7", "8"], []),
        (["7", "8", "9", "6"], []),
    ],
)
def test_an_answer_is_kept_that_two_samples_give_and_no_other_as_often(answers, places):
    corpus = [completion("a", sample, text) for sample, text in enumerate(answers)]
    corpus += [completion("b", sample, "1") for sample in range(2)]  # so that something is left
    found, summary = filtered(corpus, keep("agreed"), by_text)
    assert [one.sample for one in found if one.id == "a"] == places
    assert ("alone" in summary.num_rejected) == (set(answers) <= {"7", ""} and not places)


def test_the_summary_counts_every_completion_once_by_its_first_reason(caplog):
    with caplog.at_level(logging.INFO, "spd_dist.student_corpus"):
        _, summary = filtered(CORPUS, keep(*ALL), by_text)
    counts = {"alone": 1, "cut": 1, "loops": 1, "minority": 1, "no answer": 1, "tie": 2}
    assert summary == FilterSummary(9, 2, counts)
    assert summary.num_kept + sum(summary.num_rejected.values()) == summary.num_completions
    assert (
        "2 of 9 completions are kept; left out: 1 alone, 1 cut, 1 loops, 1 minority, 1 no answer, 2 tie" in caplog.text
    )


def test_a_filter_that_leaves_nothing_says_why():
    with pytest.raises(DataError, match=r"finetune\.filter: of 2 completions nothing is left \(2 tie\); name fewer"):
        filtered(CORPUS[4:6], keep("agreed"), by_text)


def test_votes_are_the_answers_of_the_task_in_one_spelling_whatever_the_reference():
    row = {"id": "a", "question": "How many?", "answer": "3", "solution": "1 + 2 = 3"}
    vote = votes_by([row], find_task("arithmetic"), tiny_tokenizer(), keep("agreed"))
    texts = ["#### 1,200", "so it is 1200.0\n#### 1200.0", "nothing"]
    assert [vote(completion("a", 0, text)) for text in texts] == ["1200", "1200", None]


def test_programs_are_not_compared():
    with pytest.raises(ConfigError, match=r"finetune\.filter: agreed is not valid with the task 'mbpp', whose answers"):
        votes_by([], find_task("mbpp"), tiny_tokenizer(), keep("agreed"))
    votes_by([], find_task("mbpp"), tiny_tokenizer(), keep("ended"))
