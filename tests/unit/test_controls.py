"""The termination control: the same text as plain self-retraining, with an end."""

from tiny import tiny_tokenizer

from spd_dist.data.prompts import with_eos
from spd_dist.types import Completion

TOKENIZER = tiny_tokenizer()


def completion(text: str, finish_reason: str = "length", end: int | None = None) -> Completion:
    tokens = tuple(TOKENIZER(text)["input_ids"]) + (() if end is None else (end,))
    return Completion("p", 0, 0, (1, 2), tokens, text, finish_reason)


def cut(*completions: Completion) -> list[Completion]:
    return with_eos(completions, TOKENIZER.decode, eos_token_ids=(2, 5))


def test_what_ended_by_itself_stays_as_it_is():
    whole = completion("It is 4.", "stop", end=2)
    assert cut(whole) == [whole]


def test_what_was_cut_ends_behind_its_last_whole_sentence_or_line():
    for text, kept in (("It is 4. Now", "It is 4."), ("a: 1\nb: ", "a: 1\n"), ("Is it 4? No! 5", "Is it 4? No!")):
        (one,) = cut(completion(text))
        assert (one.text, one.finish_reason) == (kept, "stop")
        assert one.tokens == (*TOKENIZER(kept)["input_ids"], 2)


def test_without_a_sentence_the_end_takes_the_place_of_the_last_token():
    (one,) = cut(completion("4 and 5"))
    assert one.tokens == (*TOKENIZER("4 and ")["input_ids"], 2)


def test_the_end_is_the_one_that_the_others_have():
    *_, one = cut(completion("Yes.", "stop", end=5), completion("No. But"))
    assert one.tokens[-1] == 5
