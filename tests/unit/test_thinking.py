"""Thought and answer are told apart by sampled tokens; templates are asked for no thought, or refuse."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny import CHAT_TEMPLATE, tiny_tokenizer

from spd_dist.config import Config, Data
from spd_dist.data.masking import mask_row, preview_masks
from spd_dist.data.prompts import make_prompts
from spd_dist.data.tasks.described import DescribedTask, Description
from spd_dist.data.thinking import Thought, find_thought, learned_parts, thought_budget
from spd_dist.errors import ConfigError, DataError
from spd_dist.inference.drawing import Drawer
from spd_dist.inference.requests import DecodeSettings, Request
from spd_dist.inference.sampling import Sampling
from spd_dist.overrides import load_config
from spd_dist.stages.finetune.sequences import training_sequences
from spd_dist.types import Completion, ThoughtBudget

NO_THOUGHT = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
SWITCHED = CHAT_TEMPLATE.replace("assistant\n{% endif %}", f"assistant\n{NO_THOUGHT}{{% endif %}}")
"""As Qwen3's: thoughts by default, an empty one where none is wanted."""
OPENING = CHAT_TEMPLATE.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
"""As DeepSeek-R1's: the prompt ends inside of a thought."""
TASK = DescribedTask(Description(name="sums", prompt="{q}", answer="{a}", mask="after_thought"))
ROWS = [{"id": "1", "q": "1 + 1?", "a": "<think>one more than 1</think>\n\n2"}]


def tokenizer(template=CHAT_TEMPLATE, special=()):
    fast = tiny_tokenizer()
    fast.chat_template = template
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *special]})
    return fast


def completion(fast, text, prompt="<|im_start|>assistant\n", finish="stop"):
    tokens = [fast(part, add_special_tokens=False)["input_ids"] for part in (prompt, text)]
    return Completion(
        "1", 0, 0, tuple(tokens[0]), (*tokens[1], 2) if finish == "stop" else tuple(tokens[1]), text, finish
    )


def config(*words) -> Config:
    return load_config([], words)


@pytest.mark.parametrize("special", [(), ("<think>", "</think>")], ids=["spelled", "special tokens"])
@pytest.mark.parametrize(("text", "answer"), [
    ("<think>a\nb</think>\n\n2", "\n\n2"),
    ("<think>a</think>1<think>b</think>2", "2"),
    ("<THINKING>a</THINKING>2", "2"),
    ("[THINK]a[/THINK]2", "2"),
    ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>2",
     "<|channel|>final<|message|>2"),
    ("2", None),
    ("is 1 < 2? </b> 2", None),
])  # fmt: skip
def test_the_answer_is_what_follows_the_last_thought_token_by_token(special, text, answer):
    fast = tokenizer(special=special)
    one = completion(fast, text)
    found = find_thought(one, fast, ())
    assert not found.is_unfinished
    expected = text if answer is None else answer
    assert one.tokens[found.num_tokens :] == (*fast(expected, add_special_tokens=False)["input_ids"], 2)


def test_marks_of_ones_own_and_thoughts_that_were_cut():
    fast = tokenizer()
    own = completion(fast, "(hm: two)2")
    assert find_thought(own, fast, ()) == Thought(0, is_unfinished=False)
    assert find_thought(own, fast, ("(hm:", ")")).num_tokens == len("(hm: two)")
    cut = completion(fast, "<think>so we", finish="length")
    assert find_thought(cut, fast, ()) == Thought(len(cut.tokens), is_unfinished=True)
    begun = completion(fast, "so we", prompt="<|im_start|>assistant\n<think>\n", finish="length")
    assert find_thought(begun, fast, ()).is_unfinished
    ended = completion(fast, "so</think>2", prompt="<|im_start|>assistant\n<think>\n")
    assert find_thought(ended, fast, ()).num_tokens == len("so</think>")


@pytest.mark.parametrize(("words", "context", "learned"), [
    (["data.thinking=keep"], "", "<think>a</think>2"),
    (["data.thinking=drop"], "", "2"),
    (["finetune.loss_on=after_thought"], "<think>a</think>", "2"),
    (["finetune.loss_on=thought"], "", "<think>a</think>"),
    (["finetune.loss_on=completion"], "", "<think>a</think>2"),
])  # fmt: skip
def test_what_is_learned_is_a_part_of_the_sampled_tokens_byte_for_byte(words, context, learned):
    fast, wanted = tokenizer(), config(*words)
    one = completion(fast, "<think>a</think>2")
    (sequence,) = training_sequences(learned_parts([one], fast, wanted), wanted.finetune, pad_token_id=0)
    end = () if "thought" in words[0].split("=")[1:] else (2,)
    ids = [tuple(fast(part, add_special_tokens=False)["input_ids"]) for part in (context, learned)]
    assert sequence.tokens == (*one.prompt_tokens, *ids[0], *ids[1], *end)
    first = 1 if wanted.finetune.loss_on == "prompt_and_completion" else len(one.prompt_tokens) + len(ids[0])
    assert sequence.first_target == first


def test_unfinished_thoughts_are_left_out_counted_and_an_error_above_the_limit(caplog):
    fast = tokenizer()
    both = [completion(fast, "<think>a</think>2"), completion(fast, "<think>so we", finish="length")]
    assert [one.text for one in learned_parts(both, fast, config("data.thinking=drop"))] == ["<think>a</think>2"]
    assert "1 of 2 completions were cut at generate.max_new_tokens=256 while they thought" in caplog.text
    assert learned_parts(both, fast, config()) == both
    with pytest.raises(
        DataError, match=r"rate of unfinished thoughts is 0\.500, above generate\.max_unfinished_rate=0\.4"
    ):
        learned_parts(both, fast, config("generate.max_unfinished_rate=0.4"))
    with pytest.raises(DataError, match=r"data\.thinking=drop.*of 1 completions nothing is left"):
        learned_parts(both[1:], fast, config("data.thinking=drop"))


def test_a_template_with_a_switch_is_asked_for_no_thought_and_one_without_refuses():
    fast = tokenizer(SWITCHED)
    (kept,), (off,) = (make_prompts(ROWS, TASK, fast, Data(thinking=how)) for how in ("keep", "off"))
    assert off.text == kept.text + "<think>\n\n</think>\n\n"
    with pytest.raises(ConfigError, match=r"data\.thinking: off is not valid with this tokenizer.*enable_thinking"):
        make_prompts(ROWS, TASK, tokenizer(), Data(thinking="off"))
    with pytest.raises(ConfigError, match=r"data\.thinking: drop is not valid .*finetune\.loss_on=after_thought"):
        make_prompts(ROWS, TASK, tokenizer(OPENING), Data(thinking="drop"))
    assert make_prompts(ROWS, TASK, tokenizer(OPENING), Data())[0].text.endswith("assistant\n<think>\n")


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, SWITCHED, OPENING], ids=["plain", "switch", "opening"])
@pytest.mark.parametrize(("mask", "kept"), [("after_thought", ["2"]), ("thought", ["one more than 1</think>"])])
def test_a_reference_that_thinks_stands_behind_its_prompt_and_is_masked_by_part(template, mask, kept):
    calibrate = dataclasses.replace(config().calibrate, mask=mask)
    masked = mask_row(ROWS[0], TASK, tokenizer(template), Data(), calibrate)
    (prompt,) = make_prompts(ROWS, TASK, tokenizer(template), Data())
    assert masked.text.startswith(prompt.text)
    assert masked.text.count("<think>") == 1
    found = [masked.text[start:stop].removeprefix("<think>").strip() for start, stop in masked.kept()]
    assert found == kept
    (shown,) = preview_masks(ROWS, TASK, tokenizer(template), Data(), calibrate, colour=False)
    assert "[[" in shown.plain


def test_a_thought_is_closed_at_its_budget_and_the_answer_is_sampled():
    fast = tokenizer(special=("<think>", "</think>"))
    budget = thought_budget(fast, 3, (), "generate.max_thought_tokens")
    opening, closing = (fast(mark, add_special_tokens=False)["input_ids"][0] for mark in ("<think>", "</think>"))
    assert budget == ThoughtBudget(3, opening, closing)
    sampling = Sampling(temperature=0.0, max_new_tokens=8)

    def written(prompt, wanted):
        """What comes of it if the model would write `wanted`, token by token."""
        drawer = Drawer(DecodeSettings(sampling, frozenset(), 0), 1, torch.device("cpu"))
        drawer.admit([Request("1", 0, prompt, 0, budget)], 300)
        for token in wanted:
            drawer.draw(torch.nn.functional.one_hot(torch.tensor([token]), 300).float())
        return drawer.rows[0].tokens

    assert written((5, 6), [opening, 7, 8, 9, 10]) == [opening, 7, 8, closing, 10]
    assert written((5, opening), [7, 8, 9, 10, 11]) == [7, 8, 9, closing, 11]
    assert written((5, opening), [7, closing, 9, 10, 11]) == [7, closing, 9, 10, 11]
    assert written((5, 6), [7, 8, 9, 10, 11]) == [7, 8, 9, 10, 11]
    assert written((5, opening, closing), [7, 8, 9, 10]) == [7, 8, 9, 10]


def test_a_budget_needs_marks_of_one_token():
    with pytest.raises(ConfigError, match=r"evaluate\.max_thought_tokens: 3 is not valid with this tokenizer.*=null"):
        thought_budget(tokenizer(), 3, (), "evaluate.max_thought_tokens")
    own = thought_budget(tokenizer(special=("(hm", "hm)")), 3, ("(hm", "hm)"), "evaluate.max_thought_tokens")
    assert own.open_token != own.close_token
    assert thought_budget(tokenizer(), None, (), "") is None
