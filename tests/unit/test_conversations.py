"""Rows of messages: several turns, tools and their calls, and which turn is asked for and supervised."""

import json
from dataclasses import replace

import pytest
from tiny import tiny_tokenizer

from spd_dist.config import Calibrate, Config, Data
from spd_dist.data.prompts import make_examples, make_prompts, make_references, make_test_set
from spd_dist.data.sources import load_rows
from spd_dist.data.tasks import find_task
from spd_dist.errors import DataError

TASK = find_task("messages")
CHAT, CALIBRATE = Data(task="messages"), Calibrate()
TURNS = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "1."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "2."},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
CALLS = [
    {"role": "system", "content": "Count."},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]},
    {"role": "tool", "content": 2},
    {"role": "assistant", "content": "It is 2."},
]
CALLING = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}"
    "</call>{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def read(tmp_path, *rows, task=TASK):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_rows(task, "train", Data(train=str(path)))


def tokenizer_with(template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def kept(tokenizer, example):
    return tokenizer.decode([example.tokens[target] for target in example.targets])


@pytest.mark.parametrize(
    ("turn", "asked", "supervised"),
    [("last", 3, "2."), ("first", 1, "1."), (0, 1, "1."), (-1, 3, "2."), (1, 3, "2."), ("all", 3, "1.2.")],
)
def test_a_turn_is_asked_for_behind_all_that_stands_before_it(tmp_path, turn, asked, supervised):
    tokenizer, data = tiny_tokenizer(), replace(CHAT, turn=turn)
    rows = read(tmp_path, {"messages": TURNS})
    before = "".join(f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n" for one in TURNS[:asked])
    [prompt] = make_prompts(rows, TASK, tokenizer, data)
    assert prompt.text == before + "<|im_start|>assistant\n"
    [example], _ = make_examples(rows, TASK, tokenizer, data, CALIBRATE)
    assert kept(tokenizer, example) == supervised
    assert tokenizer.decode(example.tokens).startswith(prompt.text)
    [reference] = make_references(rows, TASK, tokenizer, data, eos_token_ids=(2,))
    assert tokenizer.decode(reference.tokens) == TURNS[asked]["content"] + "<|im_end|>"
    found = make_test_set(rows, TASK, tokenizer, replace(Config(), data=data))
    assert found.prompts == [prompt]
    assert kept(tokenizer, found.examples[0]) == supervised


def test_tools_and_their_calls_reach_the_template(tmp_path):
    rows = read(tmp_path, {"messages": CALLS, "tools": TOOLS}, {"messages": CALLS[:3], "tools": json.dumps(TOOLS)})
    tokenizer = tokenizer_with(CALLING)
    prompts = make_prompts(rows, TASK, tokenizer, CHAT)
    assert prompts[0].text.startswith(f"<tools>{json.dumps(TOOLS)}</tools><|im_start|>system\nCount.")
    assert '<call>add {"a": 1}</call><|im_end|>\n<|im_start|>tool\n2<|im_end|>' in prompts[0].text
    answer, call = make_examples(rows, TASK, tokenizer, CHAT, CALIBRATE)[0]
    assert kept(tokenizer, answer) == "It is 2."
    assert kept(tokenizer, call) == '<call>add {"a": 1}</call>'


def test_a_system_prompt_is_for_conversations_without_one(tmp_path):
    data = replace(CHAT, system="Be brief.")
    own, none = make_prompts(read(tmp_path, {"messages": CALLS}, {"messages": TURNS}), TASK, tiny_tokenizer(), data)
    assert own.text.startswith("<|im_start|>system\nCount.")
    assert none.text.startswith("<|im_start|>system\nBe brief.")


MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_marks_of_the_template_say_what_the_assistant_wrote(tmp_path):
    tokenizer, rows = tokenizer_with(MARKED), read(tmp_path, {"messages": TURNS})
    for turn, supervised in (("last", "2.<|im_end|>"), ("all", "1.<|im_end|>2.<|im_end|>"), ("first", "1.<|im_end|>")):
        [example], _ = make_examples(rows, TASK, tokenizer, replace(CHAT, turn=turn), CALIBRATE)
        assert kept(tokenizer, example) == supervised


def test_sharegpt_rows_and_parts_of_text_are_messages(tmp_path):
    rows = read(
        tmp_path,
        {"conversations": [{"from": "human", "value": "One?"}, {"from": "gpt", "value": "1."}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "One?"}]}, TURNS[1]]},
    )
    first, second = make_prompts(rows, TASK, tiny_tokenizer(), CHAT)
    assert first.text == second.text == "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n"


def test_a_described_task_of_messages_has_any_metric(tmp_path):
    (tmp_path / "task.yaml").write_text(
        'name: sums\nmessages: "{chat}"\nanswer: "{answer}"\nmetric: numeric\nmask: regex:(\\d+)\n'
    )
    task = find_task(str(tmp_path / "task.yaml"))
    rows = read(tmp_path, {"chat": TURNS[:3], "answer": 2}, task=task)
    assert task.score(rows[0], "So it is 2.").correct
    assert task.problem(rows[0]) == "user: One?\nassistant: 1.\nuser: Two?"
    tokenizer = tiny_tokenizer()
    [prompt] = make_prompts(rows, task, tokenizer, CHAT)
    assert prompt.text.endswith("Two?<|im_end|>\n<|im_start|>assistant\n")
    [example], _ = make_examples(rows, task, tokenizer, CHAT, replace(CALIBRATE, mask="answer"))
    assert kept(tokenizer, example) == "2"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "x"}, r"field 'messages': 'x' must be a list of objects with role and content"),
        ({"messages": []}, r"field 'messages': \[\] must be a list"),
        ({"messages": ["x"]}, r"field 'messages', message 0: 'x' must be an object with role and content"),
        ({"messages": [{"content": "x"}]}, r"field 'messages', message 0: its role None must be text"),
        ({"messages": [{"role": "user"}]}, r"field 'messages', message 0: its content None must be text"),
        (
            {"messages": [*TURNS, {"role": "user", "content": {}}]},
            r"field 'messages', message 4: its content \{\} must be text",
        ),
        (
            {"messages": [TURNS[0], {"role": "assistant", "tool_calls": [1]}]},
            r"field 'messages', message 1: 1 is no call of a tool",
        ),
        ({"messages": TURNS, "tools": [1]}, r"field 'tools': \[1\] must be a list of objects"),
        ({"prompt": "x"}, r"field 'messages': missing, the row has id, prompt"),
    ],
)
def test_messages_of_another_form_are_refused_where_they_stand(tmp_path, row, message):
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 1[:,] {message}"):
        read(tmp_path, row)


STRIPPING = (  # as Qwen3's: a thought of a past turn is not written
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_what_cannot_be_asked_for_is_one_sentence(tmp_path):
    tokenizer = tiny_tokenizer()
    rows = read(tmp_path, {"messages": TURNS})
    with pytest.raises(DataError, match=r"data\.turn: 2 is not valid for a conversation with 2 turns of the assistant"):
        make_prompts(rows, TASK, tokenizer, replace(CHAT, turn=2))
    (tmp_path / "task.yaml").write_text('name: sums\nmessages: "{messages}"\ngold: "1"\n')
    asking = find_task(str(tmp_path / "task.yaml"))
    with pytest.raises(DataError, match=r"row 'rows/1': .* does not end with a turn of the assistant"):
        make_examples(read(tmp_path, {"messages": TURNS[:3]}, task=asking), asking, tokenizer, CHAT, CALIBRATE)
    thinking = [TURNS[0], {"role": "assistant", "content": "<think>a</think>1."}, *TURNS[2:]]
    stripping = tokenizer_with(STRIPPING)
    [example], _ = make_examples(read(tmp_path, {"messages": thinking}), TASK, stripping, CHAT, CALIBRATE)
    assert kept(stripping, example) == "2."
    with pytest.raises(
        DataError, match=r"turn 1: its example does not begin with its prompt, .* set .*data\.turn=last"
    ):
        make_examples(read(tmp_path, {"messages": thinking}), TASK, stripping, replace(CHAT, turn="all"), CALIBRATE)
