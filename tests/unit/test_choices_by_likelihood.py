"""`choices.scoring=likelihood`: the likeliest choice is the answer, and nothing is written by the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny import save_tiny_model

from spd_dist.config import Calibrate, Choices, Config, Data, Distributed, Evaluate, Model
from spd_dist.data.prompts import make_test_set
from spd_dist.data.tasks import find_task
from spd_dist.data.templates import render_prompt
from spd_dist.distributed.world import World
from spd_dist.errors import ConfigError
from spd_dist.models.policy import load_policy
from spd_dist.stages.context import StageContext
from spd_dist.stages.evaluate import evaluate_arm
from spd_dist.storage.answers import answers_path, read_answers

WORLD = World(0, 1, torch.device("cpu"))
CONFIG = Config(
    data=Data(task="mmlu", template="plain"),
    calibrate=Calibrate(span_policy="overlap"),
    choices=Choices(scoring="likelihood"),
    evaluate=Evaluate(batch_size=3),
)


@dataclasses.dataclass(frozen=True)
class ByText:
    """MMLU's rows, answered by the text of a choice: of unequal lengths."""

    name: str = "by_text"
    metric: str = "accuracy"

    def prompt(self, row):
        return f"{row['question']} "

    def answer(self, row):
        return row["answer"]

    def alternatives(self, row):
        return [{**row, "answer": text} for text in row["choices"]]


def rows(count=6):
    choices = ["one", "seventeen", "no", "it is not known"]
    return [
        {"id": str(n), "question": "How many? " * (n + 1), "choices": choices, "answer": choices[n % 4], "subject": ""}
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def likelihoods(policy, prompt, texts):
    """Summed over the bytes of each text, one at a time and without batches."""
    found = []
    for text in texts:
        before, tokens = (
            policy.tokenizer(one, add_special_tokens=False)["input_ids"] for one in (prompt, prompt + text)
        )
        with torch.no_grad():
            log_probs = policy.model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        found.append(sum(log_probs[at - 1, tokens[at]].item() for at in range(len(before), len(tokens))))
    return found


def test_the_likeliest_choice_is_the_answer_by_its_bytes_and_as_it_is(model, tmp_path):
    policy = load_policy(Model(str(model)), Distributed(zero_stage=0), WORLD)
    test_set = make_test_set(rows(), ByText(), policy.tokenizer, CONFIG)
    evaluate_arm(policy, test_set, CONFIG.evaluate, StageContext(tmp_path, 42, WORLD), arm="base")
    answers = read_answers(answers_path(tmp_path, "base", "by_text"))
    differs = 0
    for row, answer in zip(rows(), answers, strict=True):
        prompt = render_prompt(ByText().prompt(row), policy.tokenizer, CONFIG.data)
        scores = likelihoods(policy, prompt, row["choices"])
        by_length = [score / len(text) for score, text in zip(scores, row["choices"], strict=True)]
        assert answer.strict == row["choices"][scores.index(max(scores))]
        assert answer.lenient == answer.extracted == row["choices"][by_length.index(max(by_length))]
        assert (answer.correct, answer.strict_correct) == (
            answer.extracted == row["answer"],
            answer.strict == row["answer"],
        )
        differs += answer.strict != answer.lenient
    assert differs  # else the two would not be told apart


def test_mmlu_has_its_letters_and_a_task_without_choices_is_refused(model):
    policy = load_policy(Model(str(model)), Distributed(zero_stage=0), WORLD)
    row = {"id": "1", "subject": "", "question": "?", "choices": ["a", "b", "c"], "answer": "B"}
    test_set = make_test_set([row], find_task("mmlu"), policy.tokenizer, CONFIG)
    assert [one.id for one in test_set.choices["1"]] == ["1#0", "1#1", "1#2"]
    with pytest.raises(ConfigError, match=r"choices\.scoring: likelihood is not valid with the task 'gsm8k'"):
        make_test_set([], find_task("gsm8k"), policy.tokenizer, CONFIG)


def test_a_described_task_asks_for_it_by_its_metric(model, tmp_path):
    file = tmp_path / "task.yaml"
    file.write_text('{name: t, prompt: "{question}", answer: " {choice}", gold: "{answer}", metric: likelihood}')
    task, config = find_task(str(file)), dataclasses.replace(CONFIG, choices=Choices())
    read = [task.normalise(row, "") for row in rows()]
    policy = load_policy(Model(str(model)), Distributed(zero_stage=0), WORLD)
    test_set = make_test_set(read, task, policy.tokenizer, config)
    evaluate_arm(policy, test_set, config.evaluate, StageContext(tmp_path, 42, WORLD), arm="base")
    answers = read_answers(answers_path(tmp_path, "base", "t"))
    assert [answer.num_tokens for answer in answers] == [0] * len(read)
    assert {answer.extracted for answer in answers} <= set(rows()[0]["choices"])
