"""What is learned is what was sampled, token by token; a template that would write it in another way is named."""

import dataclasses

import pytest
from tiny import tiny_tokenizer

from spd_dist.config import Data
from spd_dist.data.prompts import make_prompts
from spd_dist.data.sources import load_rows
from spd_dist.data.tasks import find_task
from spd_dist.data.thinking import as_sampled
from spd_dist.errors import DataError
from spd_dist.types import Completion

TASK, CHAT = find_task("arithmetic"), Data()
ROWS = load_rows(TASK, "train", CHAT)[:3]
DROPPING = (  # as templates of reasoning models: the thought of a past turn is not written, and its ends are trimmed
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'].split('</think>')[-1] | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def sampled(tokenizer, *texts):
    prompts = make_prompts(ROWS, TASK, tokenizer, CHAT)
    return [
        Completion(prompt.id, 0, 0, prompt.tokens, (*tokenizer.encode(text, add_special_tokens=False), 2), text, "stop")
        for prompt, text in zip(prompts, texts, strict=True)
    ]


def test_turns_that_the_template_writes_as_they_were_sampled_are_passed_over(caplog):
    tokenizer = tiny_tokenizer()
    completions = sampled(tokenizer, "<think>so</think> 1", " 2", "3\n")
    assert as_sampled(completions, ROWS, TASK, tokenizer, CHAT) == completions
    assert as_sampled(completions, [], TASK, tokenizer, CHAT) == completions
    assert not caplog.records


def test_turns_that_it_rewrites_are_counted_and_learned_as_they_were_sampled(caplog):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = DROPPING
    completions = sampled(tokenizer, "<think>so</think>1", " 2", "3")
    assert as_sampled(completions, ROWS, TASK, tokenizer, CHAT) == completions
    [record] = caplog.records
    assert "would write 2 of 3 sampled turns in another way" in record.getMessage()


def test_completions_of_another_prompt_stop_the_run():
    tokenizer = tiny_tokenizer()
    completions = sampled(tokenizer, "1", "2", "3")
    other = dataclasses.replace(CHAT, system="Be brief.")
    message = rf"generate/completions: '{ROWS[0]['id']}' was sampled after another prompt .* --restart-from generate"
    with pytest.raises(DataError, match=message):
        as_sampled(completions, ROWS, TASK, tokenizer, other)
