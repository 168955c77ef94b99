"""Which characters a mask marks, and which tokens lie inside."""

import itertools
from importlib.metadata import EntryPoint

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from spd_dist.data import spans
from spd_dist.data.spans import MASKS, find_mask, merged, tokens_in_spans
from spd_dist.errors import ConfigError, DataError

PROMPT, ANSWER = "Tom has 3 apples and buys 5.\nGive it after '#### '.", "\n3 + 5 = 8\n#### 8\n"


def marked(name, prompt, answer, row=None):
    return [(prompt + answer)[start:stop] for start, stop in find_mask(name)(prompt, answer, row or {})]


def test_final_is_what_follows_the_last_marker_of_the_answer():
    assert marked("final", PROMPT, ANSWER) == ["8"]
    assert marked("final", PROMPT, "#### 1\n#### 1,000 dollars") == ["1,000 dollars"]
    assert marked("final", PROMPT, "no marker") == []
    assert marked("final", PROMPT, "####") == []


def test_full_and_answer_mark_everything_they_name():
    assert marked("full", PROMPT, ANSWER) == [PROMPT + ANSWER]
    assert marked("answer", PROMPT, ANSWER) == [ANSWER]
    assert marked("answer", PROMPT, "") == []


@pytest.mark.parametrize(
    ("prompt", "answer", "kept"),
    [
        ("Which?\nA. x\nAnswer:", " B", [" B"]),
        ("Which?", "It is so. Answer: C", [" C"]),
        ("Answer: A?\nAnswer:", " (D)", [" (D)"]),
        ("Which?\nAnswer:", " Because", []),
        ("Which?", "B", []),
    ],
)
def test_letter_follows_the_last_answer_wherever_it_stands(prompt, answer, kept):
    assert marked("letter", prompt, answer) == kept


def test_boxed_marks_the_content_of_the_last_box_of_the_answer():
    assert marked("boxed", r"Put it in \boxed{}.", r"So \boxed{1} or \boxed{\frac{1}{2}}.") == [r"\frac{1}{2}"]
    assert marked("boxed", r"Put it in \boxed{}.", "1") == []


def test_asserts_are_marked_wherever_they_stand_and_as_often():
    test, other = "assert f(1) == 2", "assert f(2) == 3"
    prompt = f"Write f.\n{test}\n{other}\nCode:"
    assert marked("asserts", prompt, f"\ndef f(x): ...\n{test}", {"tests": [f" {test} ", other]}) == [test, other, test]
    assert marked("asserts", prompt, f"\n    {test}  ") == [test, other, test]
    assert marked("asserts", "Write f, and assert it.", "") == []
    assert marked("asserts", prompt, "", {"tests": []}) == []


def test_tests_that_overlap_are_marked_once():
    assert marked("asserts", "assert f(1) == 10", "", {"tests": ["assert f(1) == 1", "assert f(1) == 10"]}) == [
        "assert f(1) == 10"
    ]


def test_a_pattern_marks_its_group_or_its_whole_match():
    assert marked(r"regex:\d+", PROMPT, ANSWER) == ["3", "5", "3", "5", "8", "8"]
    assert marked(r"regex:= (\d+)$", PROMPT, ANSWER) == ["8"]
    assert marked(r"regex:x(y)?", "x xy", "") == ["y"]
    assert marked("regex:z*", "ab", "") == []


def test_given_spans_come_from_the_row():
    assert marked("spans", "abc", "def", {"spans": [[4, 6], [0, 1]]}) == ["ef", "a"]


@pytest.mark.parametrize("row", [{}, {"spans": 3}, {"spans": [1, 2]}, {"spans": [["0", "1"]]}, {"spans": [[1, 2, 3]]}])
def test_rows_without_spans_of_their_own_are_refused(row):
    with pytest.raises(
        DataError, match=r"row 'r1', field spans: .* is not a list of \[start, stop\]; add it to the row"
    ):
        find_mask("spans")("abc", "def", {"id": "r1"} | row)


def test_an_unknown_mask_names_every_choice():
    with pytest.raises(
        ConfigError, match=r"calibrate\.mask: 'finale' is not a mask; use task, regex:PATTERN, full, .*spd_dist\.masks"
    ):
        find_mask("finale")


def test_a_broken_pattern_is_refused():
    with pytest.raises(ConfigError, match=r"calibrate\.mask: '\(' is not a regular expression"):
        find_mask("regex:(")


def test_a_plug_in_is_found_by_its_entry_point(monkeypatch):
    point = EntryPoint("mine", "spd_dist.data.spans:full", "spd_dist.masks")
    monkeypatch.setattr(spans, "entry_points", lambda group, name=None: [point])
    assert find_mask("mine") is MASKS["full"]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30))))
def test_merging_keeps_the_characters_and_nothing_else(pairs):
    inside = {place for start, stop in pairs for place in range(start, stop)}
    result = merged([pair for pair in pairs if pair[0] <= pair[1]])
    assert {place for start, stop in result for place in range(start, stop)} == inside
    assert all(left[1] < right[0] for left, right in itertools.pairwise(result))


def subword_tokenizer(text: str, trim: bool) -> Tokenizer:
    """Byte-level BPE with tokens that carry a leading space, as GPT-2's, Llama 3's or Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([text] * 20, trainer)
    return tokenizer


@pytest.mark.parametrize("trim", [True, False])
def test_a_token_with_a_leading_space_lies_inside_a_span_that_starts_behind_the_space(trim):
    text = "Tom has 8 #### 8\n"
    encoding = subword_tokenizer(text, trim).encode(text)
    assert "\u01208" in encoding.tokens  # " 8"
    kept = tokens_in_spans(encoding.offsets, text, [(15, 16)], "inside")
    assert [encoding.tokens[position] for position in kept] == ["\u01208"]


@given(st.text("ab 5#\n\u00e9\u4e2d", min_size=1, max_size=30), st.integers(0, 30), st.integers(0, 30))
def test_the_kept_tokens_do_not_depend_on_trimmed_offsets(text, start, stop):
    trimmed = TRIMMED.encode(text).offsets
    whole = WHOLE.encode(text).offsets
    for policy in ("inside", "overlap"):
        assert tokens_in_spans(trimmed, text, [(start, stop)], policy) == tokens_in_spans(
            whole, text, [(start, stop)], policy
        )


TRIMMED, WHOLE = (subword_tokenizer("Tom has 8 apples\n\n#### 5\n ab ba", trim) for trim in (True, False))


@given(st.text(max_size=30), st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=3))
def test_every_token_inside_also_overlaps_and_none_is_outside(text, pairs):
    offsets = WHOLE.encode(text).offsets
    inside = tokens_in_spans(offsets, text, pairs, "inside")
    overlapping = tokens_in_spans(offsets, text, pairs, "overlap")
    assert set(inside) <= set(overlapping)
    assert 0 not in overlapping
    for position in inside:
        token = range(*offsets[position])
        assert (
            any(start <= place < stop for start, stop in pairs for place in token if not text[place].isspace())
            or not text[token.start : token.stop].strip()
        )


def test_the_full_span_keeps_every_token_but_the_first():
    text = "Tom has 8\n\n  apples, \u4e2d\u6587 #### 8"
    for tokenizer in (TRIMMED, WHOLE):
        offsets = tokenizer.encode(text).offsets
        assert tokens_in_spans(offsets, text, [(0, len(text))], "inside") == list(range(1, len(offsets)))


def test_special_tokens_without_characters_are_never_kept():
    assert tokens_in_spans([(0, 0), (0, 1), (1, 3), (0, 0)], "abc", [(0, 3)], "inside") == [1, 2]


def test_a_token_across_the_border_of_a_span_is_kept_by_overlap_alone():
    assert tokens_in_spans([(0, 1), (1, 4)], "x8)\n", [(1, 2)], "inside") == []
    assert tokens_in_spans([(0, 1), (1, 4)], "x8)\n", [(1, 2)], "overlap") == [1]
