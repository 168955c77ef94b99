"""Texts as tokens: the right ones are supervised, and none is lost without a word."""

import dataclasses
import json
from dataclasses import replace
from io import StringIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tiny import tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from spd_dist.config import Calibrate, Data
from spd_dist.data.masking import mask_row, preview_masks
from spd_dist.data.prompts import make_examples, make_prompts, make_references
from spd_dist.data.sources import load_rows
from spd_dist.data.tasks import find_task
from spd_dist.data.templates import render_example, render_prompt
from spd_dist.errors import ConfigError, DataError

TOKENIZER = tiny_tokenizer()
TASK = find_task("arithmetic")
ROWS = load_rows(TASK, "calibration", Data())
CHAT, PLAIN, CALIBRATE = Data(), Data(template="plain"), Calibrate()
MBPP_ROW = {
    "id": "m1",
    "prompt": "Double it.",
    "code": "def f(x): ...",
    "tests": ["assert f(1) == 2", "assert f(2) == 4"],
}


def kept(example):
    return TOKENIZER.decode([example.tokens[target] for target in example.targets])


@pytest.mark.parametrize("data", [CHAT, PLAIN], ids=["chat", "plain"])
def test_the_supervised_tokens_spell_the_answer(data):
    examples, audit = make_examples(ROWS, TASK, TOKENIZER, data, CALIBRATE)
    assert [kept(example) for example in examples] == [row["answer"] for row in ROWS[:50]]
    for example in examples:
        assert example.targets[-1] == len(example.tokens) - 1
        assert min(example.targets) >= 1
    assert audit.num_examples == 50
    assert audit.num_targets == sum(len(example.targets) for example in examples)
    assert audit.num_tokens == sum(len(example.tokens) + example.num_tokens_after for example in examples)


@pytest.mark.parametrize("data", [CHAT, PLAIN], ids=["chat", "plain"])
def test_an_example_begins_with_the_tokens_of_its_prompt(data):
    examples, _ = make_examples(ROWS, TASK, TOKENIZER, data, CALIBRATE)
    for example, prompt in zip(examples, make_prompts(ROWS[:50], TASK, TOKENIZER, data), strict=True):
        assert example.id == prompt.id
        assert example.tokens[: len(prompt.tokens)] == prompt.tokens
        assert tuple(TOKENIZER(prompt.text, add_special_tokens=False)["input_ids"]) == prompt.tokens


@pytest.mark.parametrize("data", [CHAT, PLAIN], ids=["chat", "plain"])
def test_references_read_as_completions_that_ended_by_themselves(data):
    prompts = make_prompts(ROWS[:5], TASK, TOKENIZER, data)
    references = make_references(ROWS[:5], TASK, TOKENIZER, data, eos_token_ids=(2,))
    for row, prompt, reference in zip(ROWS, prompts, references, strict=False):
        assert (reference.id, reference.prompt_tokens, reference.finish_reason) == (prompt.id, prompt.tokens, "stop")
        assert reference.tokens.count(2) == 1
        assert reference.tokens[-1] == 2
        assert TOKENIZER.decode(reference.tokens[:-1]).strip() == reference.text == TASK.answer(row).strip()


def test_a_template_that_rewrites_past_turns_gives_no_example():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKING + "{% if add_generation_prompt %}assistant: {% endif %}"
    message = r"its example does not begin with its prompt, .* set data\.template_options"
    with pytest.raises(DataError, match=message):
        make_references(ROWS[:1], TASK, tokenizer, CHAT, eos_token_ids=(2,))
    with pytest.raises(DataError, match=message):
        make_examples(ROWS, TASK, tokenizer, CHAT, CALIBRATE)


OPENING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}KEPT{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.mark.parametrize("kept", ["", "<think>\n\n</think>\n\n"])
def test_a_thought_that_the_prompt_opens_is_closed_before_the_answer_and_never_opened_twice(kept):
    """As of reasoning models: past turns are written with an empty thought, or without one."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = OPENING.replace("KEPT", kept)
    [prompt], [example] = (
        make_prompts(ROWS[:1], TASK, tokenizer, CHAT),
        make_references(ROWS[:1], TASK, tokenizer, CHAT, eos_token_ids=(2,)),
    )
    assert prompt.text.endswith("<|im_start|>assistant\n<think>\n")
    text = tokenizer.decode(example.prompt_tokens + example.tokens)
    assert text == f"{prompt.text}\n</think>\n\n{TASK.answer(ROWS[0]).strip()}<|im_end|>"
    [supervised], _ = make_examples(ROWS[:1], TASK, tokenizer, CHAT, CALIBRATE)
    assert tokenizer.decode(supervised.tokens).startswith(prompt.text)
    assert tokenizer.decode(supervised.tokens).count("<think>") == 1
    assert kept_text(tokenizer, supervised) == ROWS[0]["answer"]


def kept_text(tokenizer, example):
    return tokenizer.decode([example.tokens[target] for target in example.targets])


NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + OPENING.replace("KEPT", "")
)


def test_a_template_that_refuses_the_system_names_the_key():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = NO_SYSTEM
    assert make_prompts(ROWS[:1], TASK, tokenizer, CHAT)
    message = r"^data\.system: 'Be brief\.' is refused by the chat template .*: System role not supported; unset"
    for make in (make_prompts, lambda *a: make_examples(*a, CALIBRATE)):
        with pytest.raises(ConfigError, match=message):
            make(ROWS[:1], TASK, tokenizer, replace(CHAT, system="Be brief."))


FAILING = [
    "{% for m in messages %}",
    "{{ messages[0].content.nothing.more }}",
    "{{ 1 / 0 }}",
    "{{ raise_exception('no') }}",
    "{{ 'x' * 10 ** 15 }}",
]


@pytest.mark.parametrize("template", FAILING)
def test_a_template_that_fails_is_one_sentence(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    for data in (CHAT, replace(CHAT, system="Be brief.")):
        with pytest.raises(
            ConfigError, match=r"^data\.template: the chat template of this model fails on .*; set"
        ) as caught:
            make_prompts(ROWS[:1], TASK, tokenizer, data)
        assert "\n" not in str(caught.value)


def test_a_template_is_told_the_same_day_whenever_it_is_asked():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}"
    assert render_prompt("p", tokenizer, CHAT) == "26 Jul 2024: p"
    assert render_prompt("p", tokenizer, replace(CHAT, date="2026-01-02")) == "02 Jan 2026: p"


def test_chat_prompts_end_where_the_assistant_begins():
    [prompt] = make_prompts(ROWS[:1], TASK, TOKENIZER, replace(CHAT, system="Be brief."))
    assert prompt.text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{TASK.prompt(ROWS[0])}<|im_end|>\n<|im_start|>assistant\n"
    )
    [plain] = make_prompts(ROWS[:1], TASK, TOKENIZER, PLAIN)
    assert plain.text == TASK.prompt(ROWS[0])
    assert make_prompts([], TASK, TOKENIZER, CHAT) == []


@pytest.mark.parametrize("data", [CHAT, PLAIN], ids=["chat", "plain"])
def test_asserts_in_the_prompt_are_supervised_and_the_program_is_not(data):
    [example], audit = make_examples([MBPP_ROW], find_task("mbpp"), TOKENIZER, data, CALIBRATE)
    assert kept(example) == "".join(MBPP_ROW["tests"])
    assert audit.shown[0].kept == tuple(MBPP_ROW["tests"])
    text = TOKENIZER.decode(example.tokens)
    assert text.endswith("assert f(2) == 4")
    whole = mask_row(MBPP_ROW, find_task("mbpp"), TOKENIZER, data, CALIBRATE)
    assert example.num_tokens_after == len(whole.tokens) - len(example.tokens)
    assert "def f(x)" in whole.text[len(text) :]


def test_the_full_mask_keeps_prompt_and_answer_but_no_token_of_the_template():
    [example], _ = make_examples(ROWS[:1], TASK, TOKENIZER, CHAT, replace(CALIBRATE, mask="full"))
    assert kept(example) == TASK.prompt(ROWS[0]) + TASK.answer(ROWS[0]).strip()
    [plain], _ = make_examples(ROWS[:1], TASK, TOKENIZER, PLAIN, replace(CALIBRATE, mask="full"))
    assert plain.targets == tuple(range(1, len(plain.tokens)))


def test_spans_of_the_row_and_patterns_work_through_the_template():
    row = ROWS[0] | {"spans": [[0, 1], [len(TASK.prompt(ROWS[0])), len(TASK.prompt(ROWS[0])) + 3]]}
    [example], _ = make_examples([row], TASK, TOKENIZER, CHAT, replace(CALIBRATE, mask="spans"))
    assert kept(example) == TASK.prompt(row)[0] + TASK.answer(row)[1:3], (
        "the line break before the answer is the template's"
    )
    [example], _ = make_examples([row], TASK, TOKENIZER, CHAT, replace(CALIBRATE, mask="regex:^#### (.*)$"))
    assert kept(example) == row["answer"]


def test_a_prompt_without_target_span_is_an_error_that_names_row_mask_and_remedy():
    message = (
        r"row 'm1': the mask 'boxed' finds no target span in it; .*calibrate\.mask, or set calibrate\.allow_empty=true"
    )
    with pytest.raises(DataError, match=message):
        make_examples([MBPP_ROW], find_task("mbpp"), TOKENIZER, CHAT, replace(CALIBRATE, mask="boxed"))


def test_a_span_within_no_token_is_an_error_that_names_the_policy():
    row = {"id": "r", "question": "q", "solution": "\u4e2d", "answer": "1", "spans": [[0, 1]]}
    with pytest.raises(
        DataError,
        match=r"row 'r': the mask 'spans' marks \['q'\], but no token lies inside; set calibrate\.span_policy",
    ):
        make_examples([row], TASK, TOKENIZER, PLAIN, replace(CALIBRATE, mask="spans"))


@pytest.mark.parametrize("spans", [[[-1, 2]], [[3, 2]], [[0, 10_000]]])
def test_a_span_outside_the_text_is_an_error(spans):
    with pytest.raises(
        DataError, match=r"row 'm1': the mask 'spans' gives the span \[.*\), outside the \d+ characters"
    ):
        make_examples(
            [MBPP_ROW | {"spans": spans}], find_task("mbpp"), TOKENIZER, CHAT, replace(CALIBRATE, mask="spans")
        )


def test_a_span_lost_by_truncation_is_an_error_that_names_the_length_it_needs():
    whole, _ = make_examples(ROWS[:1], TASK, TOKENIZER, CHAT, CALIBRATE)
    needed = len(whole[0].tokens)
    short = replace(CALIBRATE, max_tokens=needed - 1)
    name = ROWS[0]["id"]
    lost = rf"row '{name}': the mask 'task' has 1 of \d tokens behind calibrate\.max_tokens={needed - 1}"
    with pytest.raises(DataError, match=rf"{lost}; raise calibrate\.max_tokens to {needed}, or set"):
        make_examples(ROWS[:1], TASK, TOKENIZER, CHAT, short)
    exact, _ = make_examples(ROWS[:1], TASK, TOKENIZER, CHAT, replace(CALIBRATE, max_tokens=needed))
    assert exact[0].num_tokens_after == 0
    assert replace(exact[0], num_tokens_after=whole[0].num_tokens_after) == whole[0]


def test_allowed_losses_are_counted():
    long, short = MBPP_ROW | {"prompt": "Double it. " * 30, "id": "long"}, MBPP_ROW
    empty = MBPP_ROW | {"tests": [], "id": "empty"}
    masked = mask_row(short, find_task("mbpp"), TOKENIZER, CHAT, CALIBRATE)
    allowed = replace(CALIBRATE, allow_empty=True, max_tokens=masked.targets[-1])
    examples, audit = make_examples([long, short, empty], find_task("mbpp"), TOKENIZER, CHAT, allowed)
    assert [example.id for example in examples] == ["m1"]
    assert kept(examples[0]) == "".join(MBPP_ROW["tests"])[:-1]
    assert (audit.num_skipped_empty, audit.num_skipped_truncated, audit.num_truncated, audit.num_examples) == (
        1,
        1,
        1,
        1,
    )
    with pytest.raises(
        DataError, match=r"calibrate\.mask: 'task' keeps no token in any of 2 examples; .*--preview-masks"
    ):
        make_examples([long, empty], find_task("mbpp"), TOKENIZER, CHAT, allowed)


def test_the_audit_is_plain_data():
    _, audit = make_examples(ROWS, TASK, TOKENIZER, CHAT, replace(CALIBRATE, num_examples=7, span_policy="overlap"))
    plain = json.loads(json.dumps(dataclasses.asdict(audit)))
    assert (plain["mask"], plain["num_examples"]) == ("task", 7)
    assert plain["min_targets"] <= plain["mean_targets"] <= plain["max_targets"]
    assert plain["shown"][0] == {"id": ROWS[0]["id"], "kept": [ROWS[0]["answer"]]}
    assert "partly inside a span" in plain["rule"]


def test_prompts_that_are_too_long_are_an_error():
    with pytest.raises(
        DataError, match=r"data\.max_prompt_tokens: 3 of 3 prompts are longer than 20 tokens, row '.*' has \d+; raise"
    ):
        make_prompts(ROWS[:3], TASK, TOKENIZER, replace(CHAT, max_prompt_tokens=20))


def test_a_tokenizer_without_chat_template_needs_the_plain_one():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    for make in (
        lambda data: make_prompts(ROWS[:1], TASK, tokenizer, data),
        lambda data: make_examples(ROWS, TASK, tokenizer, data, CALIBRATE),
    ):
        with pytest.raises(
            ConfigError, match=r"data\.template: 'chat' is not valid, .* no chat template; set data\.template=plain"
        ):
            make(CHAT)
        assert make(PLAIN)


def test_a_slow_tokenizer_is_refused():
    class Slow:
        chat_template, is_fast = None, False

    with pytest.raises(DataError, match=r"model\.name: its tokenizer is not a fast one"):
        mask_row(ROWS[0], TASK, Slow(), PLAIN, CALIBRATE)


TRIMMING = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
THINKING = (
    "{% for m in messages %}{{ m['role'] }}:"
    "{% if m['role'] == 'assistant' and not think %}<think></think>{% endif %}{{ m['content'] }}{% endfor %}"
)


@given(st.text("a \n<", max_size=8), st.text("a1 \n#", max_size=8), st.sampled_from([TRIMMING, THINKING]))
def test_characters_are_followed_through_any_template_that_keeps_the_texts(prompt, answer, template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    rendered = render_example(prompt, answer, tokenizer, CHAT)
    for place, character in enumerate(prompt + answer):
        for start, stop in rendered.spans([(place, place + 1)]):
            assert rendered.text[start:stop] == character
        assert rendered.spans([(place, place + 1)]) or character.isspace()


def test_options_reach_the_chat_template():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = THINKING
    assert "<think>" in render_example("p", "a", tokenizer, CHAT).text
    assert "<think>" not in render_example("p", "a", tokenizer, replace(CHAT, template_options={"think": True})).text


def test_a_template_that_changes_the_text_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    assert render_prompt("p", tokenizer, CHAT) == "P"
    with pytest.raises(
        DataError, match=r"data\.template=chat: the chat template changes the text of 'p' .* set data\.template=plain"
    ):
        render_example("p", "a", tokenizer, CHAT)


def test_the_opening_token_of_a_plain_text_is_no_target():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    [example], _ = make_examples(ROWS[:1], TASK, tokenizer, PLAIN, replace(CALIBRATE, mask="full"))
    assert example.tokens[0] == 1
    assert example.targets == tuple(range(1, len(example.tokens)))
    [chat], _ = make_examples(ROWS[:1], TASK, tokenizer, CHAT, CALIBRATE)
    assert chat.tokens[:2] != (1, 1), "the chat template has the opening token already"


def test_a_token_that_template_and_tokenizer_both_write_opens_a_text_once():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|pad|> $A", special_tokens=[("<|pad|>", 0)]
    )
    tokenizer.chat_template = "<|pad|>" + tokenizer.chat_template
    assert tokenizer("a")["input_ids"][0] == 0
    for data in (CHAT, PLAIN):
        [prompt] = make_prompts(ROWS[:1], TASK, tokenizer, data)
        [example], _ = make_examples(ROWS[:1], TASK, tokenizer, data, CALIBRATE)
        for tokens in (prompt.tokens, example.tokens):
            assert (tokens[0], tokens.count(0)) == (0, 1)


def printed(rows, task, calibrate, *, colour):
    console = Console(file=StringIO(), force_terminal=colour, width=200, color_system="standard" if colour else None)
    for text in preview_masks(rows, task, TOKENIZER, CHAT, calibrate, colour=colour):
        console.print(text)
    return console.file.getvalue()


def test_the_preview_marks_the_kept_tokens():
    plain = printed(ROWS[:2], TASK, CALIBRATE, colour=False)
    for row in ROWS[:2]:
        assert f"#### [[{row['answer']}]]<|im_end|>" in plain
        assert f"{row['id']}: {len(row['answer'])} of " in plain
    coloured = printed([MBPP_ROW], find_task("mbpp"), CALIBRATE, colour=True)
    assert "[[" not in coloured
    assert "\x1b[1;30;42massert f(1) == 2\x1b[0m" in coloured


def test_the_preview_says_what_is_missing_or_cut():
    assert "m1: 0 of " in printed([MBPP_ROW], find_task("mbpp"), replace(CALIBRATE, mask="final"), colour=True)
    cut = printed([MBPP_ROW], find_task("mbpp"), replace(CALIBRATE, max_tokens=60), colour=True)
    assert "cut off at calibrate.max_tokens=60" in cut
    assert "\x1b[9;31m" in cut
