"""Rows of several turns and tools: rendered by the template, masked in their last turn, refused in one sentence."""

from __future__ import annotations

import dataclasses
import json

import pytest
from tiny import CHAT_TEMPLATE, tiny_tokenizer

from spd_dist.config import Calibrate, Data
from spd_dist.data.masking import mask_row, preview_masks
from spd_dist.data.prompts import make_prompts, make_references
from spd_dist.data.sources import load_rows
from spd_dist.data.tasks import find_task
from spd_dist.errors import ConfigError, DataError

TOOLED = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] or '' }}"
    "{% for call in m['tool_calls'] or [] %}[call {{ call['function']['name'] }}]{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT_TEMPLATE
TOOL = {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "What time is it?"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "clock", "arguments": "{}"}}]},
    {"role": "tool", "content": "12:00"},
    {"role": "assistant", "content": "It is noon."},
    {"role": "user", "content": "Thanks"},
]
TASK = find_task("messages")


def tokenizer(template=TOOLED):
    fast = tiny_tokenizer()
    fast.chat_template = template
    return fast


def row(turns=TURNS, tools=(TOOL,)):
    return TASK.normalise({"id": "1", "messages": turns, "tools": list(tools)}, "")


def test_the_policy_is_asked_all_turns_before_the_last_of_the_assistant():
    (prompt,) = make_prompts([row()], TASK, tokenizer(), Data())
    assert prompt.text.startswith("<|im_start|>tools\n")
    assert prompt.text.endswith("[call clock]<|im_end|>\n<|im_start|>tool\n12:00<|im_end|>\n<|im_start|>assistant\n")
    assert "Thanks" not in prompt.text
    assert "It is noon." not in prompt.text


@pytest.mark.parametrize(("mask", "kept"), [
    ("task", ["It is noon."]), ("answer", ["It is noon."]), ("regex:noon", ["noon"]),
    ("full", ["Be brief.", "Hello", "Hi.", "What time is it?", "12:00", "It is noon."]),
])  # fmt: skip
def test_the_supervised_turn_is_the_last_and_masks_reach_every_content(mask, kept):
    masked = mask_row(row(), TASK, tokenizer(), Data(), dataclasses.replace(Calibrate(), mask=mask))
    assert [masked.text[start:stop] for start, stop in masked.kept()] == kept
    assert masked.text.endswith("assistant\nIt is noon.<|im_end|>\n")
    calibrate = dataclasses.replace(Calibrate(), mask=mask)
    (shown,) = preview_masks([row()], TASK, tokenizer(), Data(), calibrate, colour=False)
    assert all(f"[[{part}]]" in shown.plain for part in kept)


def test_a_reference_is_what_follows_the_prompt_and_ends():
    (reference,) = make_references([row()], TASK, tokenizer(), Data(), eos_token_ids=[2])
    assert tokenizer().decode(reference.tokens) == "It is noon.<|im_end|>"


def test_a_file_of_rows_is_read_with_nulls_and_tools_as_text(tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [{"messages": TURNS[:3]}, {"messages": TURNS, "tools": json.dumps([TOOL])}]
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    first, second = load_rows(TASK, "train", Data(train=str(file)))
    assert [TASK.conversation(one).tools for one in (first, second)] == [(), (TOOL,)]
    assert all(value is not None for turn in TASK.conversation(second).messages for value in turn.values())
    plain = make_prompts([first], TASK, tokenizer(), Data(template="plain"))[0]
    assert plain.text == "system: Be brief.\n\nuser: Hello\n\nassistant:"


@pytest.mark.parametrize(("turns", "fault"), [
    ([], "must be a list of objects with role and content"),
    ("Hello", "must be a list of objects with role and content"),
    ([{"content": "Hello"}], "its role None must be text"),
    ([{"role": "assistant", "content": "Hi."}], "with a turn before it"),
    (TURNS[:2], "with a turn before it"),
])  # fmt: skip
def test_turns_without_an_answer_name_the_row(turns, fault):
    with pytest.raises(DataError, match=rf"^field 'messages'.*{fault}"):
        row(turns)


def test_a_template_that_has_no_tools_or_refuses_a_role_is_named():
    with pytest.raises(ConfigError, match=r"data\.template: 'chat' is not valid for rows with tools"):
        make_prompts([row(TURNS[:3])], TASK, tokenizer(CHAT_TEMPLATE), Data())
    with pytest.raises(ConfigError, match=r"fails on the roles system, user: no system role; set data\.template"):
        make_prompts([row(TURNS[:3], ())], TASK, tokenizer(NO_SYSTEM), Data())
    own = row(TURNS[1:3], ())
    assert make_prompts([own], TASK, tokenizer(NO_SYSTEM), Data())[0].text.endswith(
        "Hello<|im_end|>\n<|im_start|>assistant\n"
    )
