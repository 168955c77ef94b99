"""Engines in a process of their own: prompts and a model folder in, completions out, line by line."""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from spd_dist.config import Generate
from spd_dist.distributed.world import World
from spd_dist.errors import ConfigError, DataError
from spd_dist.inference.requests import Decoded, Request
from spd_dist.inference.sampling import Sampling
from spd_dist.models.policy import Policy

log = logging.getLogger(__name__)

GUARD = Path(__file__).with_name("guard.py")
GRACE_SECONDS = 10.0
"""Between the request to end and the kill: less than SLURM gives a job."""


@contextmanager
def running(command: Sequence[str], environment: Mapping[str, str], log: BinaryIO) -> Iterator[subprocess.Popen[bytes]]:
    """`command` at work, in a process group that is gone at the end: asked by SIGTERM first, if it still runs.

    A guard leads the group. While it is not waited for, the group's number is not given again.

    Raises:
        OSError: it can't be started.
    """
    words = [sys.executable, "-I", "-S", str(GUARD), str(os.getpid())]
    guard = subprocess.Popen(words, stdin=subprocess.DEVNULL, process_group=0)
    settings = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "process_group": guard.pid}
    try:
        with subprocess.Popen(command, env=environment, **settings) as process:
            try:
                yield process
            finally:
                if process.poll() is None:
                    os.killpg(guard.pid, signal.SIGTERM)
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(GRACE_SECONDS)
                os.killpg(guard.pid, signal.SIGKILL)
    finally:
        os.killpg(guard.pid, signal.SIGKILL)
        guard.wait()


POLL_SECONDS = 0.05
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_", "PYTHONPATH")
WORKER = Path(__file__).with_name("vllm_worker.py")


@dataclass
class ExternalEngine:
    """A program that reads a prompts file and writes a completions file."""

    name: str
    command: Sequence[str]
    """Its words, with {prompts} and {output} to be filled in."""
    policy: Policy
    scratch: Path
    """Where this rank's files are."""
    environment: Mapping[str, str]
    _has_warned: bool = False

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> Generator[Decoded, None, None]:
        """Completions as the program writes them.

        Raises:
            DataError: the program failed, or left a request without an answer.
            ConfigError: there is no such program.
        """
        prompts, output, log = (self.scratch / name for name in ("prompts.jsonl", "output.jsonl", "engine.log"))
        rows = [self._row(request, sampling) for request in requests]
        try:
            self.scratch.mkdir(parents=True, exist_ok=True)
            prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            output.unlink(missing_ok=True)
            output.touch()
        except OSError as error:
            raise DataError(f"{self.scratch} can't be written: {error.strerror}; make room there") from error
        waiting = {(request.id, request.sample): request for request in requests}
        command = [word.replace("{prompts}", str(prompts)).replace("{output}", str(output)) for word in self.command]
        with self._running(command, log) as process, open(output, "rb") as lines:
            for line in _follow(lines, process):
                yield self._decoded(line, waiting, sampling)
            self._check(process.returncode, waiting, log)

    def _row(self, request: Request, sampling: Sampling) -> dict[str, Any]:
        return {
            "id": request.id,
            "sample": request.sample,
            "seed": request.seed,
            "prompt_tokens": request.tokens,
            "prompt": self.policy.tokenizer.decode(request.tokens),
            "eos_token_ids": self.policy.eos_token_ids,
            **asdict(sampling),
        }

    @contextmanager
    def _running(self, command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
        with open(log, "wb") as file, ExitStack() as stack:
            try:
                process = stack.enter_context(running(command, self.environment, file))
            except OSError as error:
                raise ConfigError(
                    f"generate.engine={self.name} cannot start {command[0]!r}: {error.strerror}; give the path of an "
                    "installed program"
                ) from error
            yield process

    def _decoded(self, line: bytes, waiting: dict[tuple[str, int], Request], sampling: Sampling) -> Decoded:
        try:
            row = json.loads(line)
            request = waiting.pop((row["id"], row["sample"]))
            is_text, reason = "tokens" not in row, row.get("finish_reason", "stop")
            tokens = self._tokens(row["text"], reason) if is_text else _integers(row["tokens"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"generate.engine={self.name} wrote a line that answers no open request ({error!r}): {line[:200]!r}; "
                'a line is {"id": ..., "sample": ..., "tokens": [...]}, or "text" with "finish_reason", '
                '"stop" or "length", for tokens'
            ) from error
        kept = tokens[: sampling.max_new_tokens]
        stops = [index for index, token in enumerate(kept) if token in self.policy.eos_token_ids]
        is_cut_text = is_text and reason == "length"
        if not stops and len(kept) < sampling.max_new_tokens and not is_cut_text:
            raise DataError(
                f"generate.engine={self.name} answered {request.id!r}, sample {request.sample}, with {len(kept)} "
                f"tokens that neither end nor are generate.max_new_tokens={sampling.max_new_tokens}; it aborted that "
                "request, or has a limit of its own: raise that"
            )
        return Decoded(request, tuple(kept[: stops[0] + 1] if stops else kept), "stop" if stops else "length")

    def _tokens(self, text: str, finish_reason: str) -> list[int]:
        """The tokens of a text, made anew: names of special tokens in it are text, and only a whole one has an end."""
        if finish_reason not in ("stop", "length"):
            raise ValueError("finish_reason must be stop or length")
        if not self._has_warned:
            log.warning(
                "generate.engine=%s answers in text, whose tokens are made anew here: they may differ from those that "
                'were sampled, and a text without finish_reason counts as ended; write "tokens" if it can',
                self.name,
            )
            self._has_warned = True
        tokens = self.policy.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return [*tokens, self.policy.eos_token_ids[0]] if finish_reason == "stop" else tokens

    def _check(self, code: int, waiting: Mapping[tuple[str, int], Request], log: Path) -> None:
        if code == 0 and not waiting:
            return
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])
        what = f"ended with exit code {code}" if code else f"left {len(waiting)} requests without an answer"
        raise DataError(f"generate.engine={self.name} {what}; the end of {log}:\n{tail}")


def command_of(config: Generate, model: Path) -> list[str]:
    """The words of the engine's command line; {prompts} and {output} are filled in for each call.

    Raises:
        ConfigError: the setting that the engine needs is missing or wrong.
    """
    if config.engine == "vllm":
        if config.vllm_python is None:
            raise ConfigError("generate.engine=vllm needs generate.vllm_python: a Python interpreter that has vllm")
        return [config.vllm_python, str(WORKER), str(model), "{prompts}", "{output}"]
    missing = [name for name in ("{model}", "{prompts}", "{output}") if name not in (config.command or "")]
    if missing:
        raise ConfigError(
            f"generate.command: {config.command!r} lacks {', '.join(missing)}; generate.engine=command needs a "
            "template like 'my_engine {model} {prompts} {output}'"
        )
    return [word.replace("{model}", str(model)) for word in shlex.split(config.command)]


def environment_of(world: World, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What the program inherits: nothing by which it would take itself for a rank, and this rank's device only."""
    kept = {name: value for name, value in environment.items() if not name.startswith(LAUNCHER_VARIABLES)}
    if world.device.type == "cuda":
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        index = world.device.index
        kept["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index] if visible else str(index)
    return kept


def _integers(tokens: Any) -> list[int]:
    """The tokens of a line, if that is what they are: a program may write anything."""
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise ValueError("tokens must be a list of integers")
    return tokens


def _follow(lines: BinaryIO, process: subprocess.Popen) -> Iterator[bytes]:
    """Whole lines while the process runs, and at its end what is left: of a process that failed, a torn line."""
    begun = b""
    while True:
        is_running = process.poll() is None
        *whole, begun = (begun + lines.read()).split(b"\n")
        yield from whole
        if not is_running:
            break
        if not whole:
            time.sleep(POLL_SECONDS)
    if begun and process.returncode == 0:
        yield begun
