"""A tiny policy that has learned its answers by heart: what it says is known, and the rest of the way is real."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from tiny import tiny_model, tiny_tokenizer

from spd_dist.config import Data
from spd_dist.data.prompts import make_prompts
from spd_dist.data.tasks.protocol import Row, Task

END = 2


def save_memorised(folder: Path, task: Task, rows: list[Row], answers: Mapping[str, str]) -> Path:
    """A checkpoint that answers each row by `answers[row id]`, greedily, and then ends."""
    tokenizer, model = tiny_tokenizer(), tiny_model(max_position_embeddings=1024).train()
    prompts = make_prompts(rows, task, tokenizer, Data())
    examples = [(prompt.tokens, [*tokenizer(answers[prompt.id])["input_ids"], END]) for prompt in prompts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(400):
        losses = [loss_of(model, prompt, answer) for prompt, answer in examples]
        optimizer.zero_grad()
        torch.stack(losses).mean().backward()
        optimizer.step()
        if max(losses) < 0.02:
            break
    assert max(losses) < 0.1, losses
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def loss_of(model: torch.nn.Module, prompt: tuple[int, ...], answer: list[int]) -> torch.Tensor:
    """The mean loss on the answer's tokens."""
    logits_TV = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits_TV, torch.tensor(answer))
