"""Which engine generates and answers, and where a server is found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from spd_dist.config.setting import setting

Engine = Literal["auto", "hf", "hf_cb", "vllm", "server", "command"]


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible server of the user's that completes token ids, for engine=server."""

    url: str | None = setting(None, "as http://host:8000/v1")
    models: dict[str, Any] = setting({}, "{ARM: NAME}: what the server calls the model or adapter of each arm")
    concurrency: int = setting(64, "requests under way at once, over all ranks", at_least=1)
    retries: int = setting(8, "tries again after 429, 5xx or a closed connection, ever later", at_least=0)
    key_variable: str = setting("OPENAI_API_KEY", "environment variable that may hold the server's key")


def engine_of(engine: str, vllm_python: str | None, command: str | None) -> str:
    """The engine that generates: under `auto` the program that the config names, else our own loop."""
    if engine != "auto":
        return engine
    if vllm_python is not None:
        return "vllm"
    return "hf" if command is None else "command"
