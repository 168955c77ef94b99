"""Randomness by name: a generator is made of the run's seed and what it is for; the global one is never used."""

from __future__ import annotations

import hashlib
import json

import torch


def seed_of(seed: int, *names: str | int) -> int:
    """An integer in [0, 2**63) made of `seed` and `names` by blake2b; ("a", "bc") and ("ab", "c") differ."""
    digest = hashlib.blake2b(json.dumps([seed, *names]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, *names: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for `names`: it does not depend on what was drawn elsewhere, nor on the world size."""
    return torch.Generator(device).manual_seed(seed_of(seed, *names))


def row_seed(seed: int, prompt_id: str, sample: int) -> int:
    """The seed of one completion, in [0, 2**63): the corpus depends neither on batches nor on ranks."""
    return seed_of(seed, "completion", prompt_id, sample)
