"""Which engine generates and answers, and where a server is found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from spd_dist.config.setting import setting

Engine = Literal["auto", "hf", "hf_cb", "vllm", "server", "command"]
BatchSize = int | Literal["auto"]
PLANNED_ROWS = 32
"""Rows that `auto` counts as where no memory is looked at: in estimates, and where a result depends on the batch."""


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server of the user's that completes token ids, for engine=server."""

    url: str | None = setting(None, "as http://host:8000/v1; several, with commas between, share the work")
    models: dict[str, Any] = setting({}, "{ARM: NAME}: what the server calls the model or adapter of each arm")
    concurrency: int = setting(64, "requests under way at once, over all ranks", at_least=1)
    retries: int = setting(8, "tries again after 429, 5xx or a closed connection, ever later", at_least=0)
    key_variable: str = setting("OPENAI_API_KEY", "environment variable that may hold the server's key")


def planned_rows(batch_size: BatchSize) -> int:
    """The rows of a batch whose size may be left to the memory that is free."""
    return PLANNED_ROWS if batch_size == "auto" else batch_size


def engine_of(engine: str, vllm_python: str | None, command: str | None) -> str:
    """The engine that generates: under `auto` the program that the config names, else our own loop."""
    if engine != "auto":
        return engine
    if vllm_python is not None:
        return "vllm"
    return "hf" if command is None else "command"
