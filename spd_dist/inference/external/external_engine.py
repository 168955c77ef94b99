"""Engines in a process of their own: how one is started and ended, and the one that is a program of the user's."""

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

from spd_dist.distributed.world import World
from spd_dist.errors import ConfigError, DataError
from spd_dist.inference.packed_weights import CACHES
from spd_dist.inference.requests import Decoded, Request
from spd_dist.inference.sampling import Sampling
from spd_dist.models.policy import Policy
from spd_dist.redaction import redacted

log = logging.getLogger(__name__)

GUARD = Path(__file__).with_name("guard.py")
GRACE_SECONDS = 10.0
"""Between the request to end and the kill: less than SLURM gives a job."""


@contextmanager
def running(
    command: Sequence[str], environment: Mapping[str, str], log: BinaryIO, *, is_piped: bool = False
) -> Generator[subprocess.Popen[bytes]]:
    """`command` at work, in a process group that is gone at the end: asked by SIGTERM first, if it still runs.

    With `is_piped` its input and output are pipes, else nothing and the log.

    A guard leads the group. While it is not waited for, the group's number is not given again.

    Raises:
        OSError: it can't be started.
    """
    words = [sys.executable, "-I", "-S", str(GUARD), str(os.getpid())]
    guard = subprocess.Popen(words, stdin=subprocess.DEVNULL, process_group=0)
    stdin, stdout = (subprocess.PIPE, subprocess.PIPE) if is_piped else (subprocess.DEVNULL, log)
    try:
        with subprocess.Popen(
            command, env=environment, stdin=stdin, stdout=stdout, stderr=log, process_group=guard.pid
        ) as process:
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


@dataclass
class ExternalEngine:
    """A program that reads a prompts file and writes a completions file."""

    label: str
    """The key that asks for it, with its value: for messages."""
    command: Sequence[str]
    """Its words, with {prompts} and {output} to be filled in."""
    policy: Policy
    scratch: Path
    """Where this rank's files are."""
    environment: Mapping[str, str]
    name: str = "command"
    _has_warned: bool = False

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> Generator[Decoded, None, None]:
        """Completions as the program writes them.

        Raises:
            DataError: the program failed, or left a request without an answer.
            ConfigError: there is no such program.
        """
        prompts, output, log = (self.scratch / name for name in ("prompts.jsonl", "output.jsonl", "engine.log"))
        lines = [self._line(request, sampling) for request in requests]
        try:
            self.scratch.mkdir(parents=True, exist_ok=True)
            prompts.write_text("".join(lines), encoding="utf-8")
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

    def _line(self, request: Request, sampling: Sampling) -> str:
        """A line of `{prompts}`: the prompt, as tokens and as text, and how its completion is drawn."""
        asked = {
            "id": request.id,
            "sample": request.sample,
            "seed": request.seed,
            "prompt_tokens": request.tokens,
            "prompt": self.policy.tokenizer.decode(list(request.tokens)),
            "eos_token_ids": self.policy.eos_token_ids,
            **asdict(sampling),
        }
        return json.dumps(asked) + "\n"

    @contextmanager
    def _running(self, command: Sequence[str], log: Path) -> Generator[subprocess.Popen[bytes]]:
        try:
            with open(log, "wb") as file, ExitStack() as stack:
                try:
                    process = stack.enter_context(running(command, self.environment, file))
                except OSError as error:
                    raise ConfigError(
                        f"{self.label} cannot start {command[0]!r}: {error.strerror}; give the path of an installed "
                        "program"
                    ) from error
                yield process
        finally:
            said = log.read_text(encoding="utf-8", errors="replace")
            log.write_text(redacted(said), encoding="utf-8")

    def _decoded(self, line: bytes, waiting: dict[tuple[str, int], Request], sampling: Sampling) -> Decoded:
        try:
            row = json.loads(line)
            request = waiting.pop((row["id"], row["sample"]))
            is_text, reason = "tokens" not in row, row.get("finish_reason", "stop")
            tokens = self._tokens(row["text"], reason) if is_text else integers(row["tokens"])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self.label} wrote a line that answers no open request ({error!r}): {line[:200]!r}; "
                'a line is {"id": ..., "sample": ..., "tokens": [...]}, or "text" with "finish_reason", '
                '"stop" or "length", for tokens'
            ) from error
        if is_text and reason == "length" and not set(tokens) & set(self.policy.eos_token_ids):
            return Decoded(request, tuple(tokens[: sampling.max_new_tokens]), "length")
        return decoded_of(self.label, request, tokens, sampling, self.policy)

    def _tokens(self, text: str, finish_reason: str) -> list[int]:
        """The tokens of a text, made anew: names of special tokens in it are text, and only a whole one has an end."""
        if finish_reason not in ("stop", "length"):
            raise ValueError("finish_reason must be stop or length")
        if not self._has_warned:
            log.warning(
                "%s answers in text, whose tokens are made anew here: they may differ from those that "
                'were sampled, and a text without finish_reason counts as ended; write "tokens" if it can',
                self.label,
            )
            self._has_warned = True
        tokens = self.policy.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return [*tokens, self.policy.eos_token_ids[0]] if finish_reason == "stop" else tokens

    def _check(self, code: int, waiting: Mapping[tuple[str, int], Request], log: Path) -> None:
        if code == 0 and not waiting:
            return
        what = f"ended with exit code {code}" if code else f"left {len(waiting)} requests without an answer"
        raise DataError(f"{self.label} {what}; {last_lines(log)}")


def last_lines(log: Path, count: int = 12) -> str:
    """The end of an engine's log, for a message."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:]
    return "\n".join([f"the end of {log}:", *lines])


def decoded_of(label: str, request: Request, tokens: Sequence[int], sampling: Sampling, policy: Policy) -> Decoded:
    """An engine's tokens as a completion: cut where the policy ends, or at `max_new_tokens`.

    Raises:
        DataError: the tokens neither end nor are as many as may be, or are none of the policy's.
    """
    kept = tokens[: sampling.max_new_tokens]
    stops = [index for index, token in enumerate(kept) if token in policy.eos_token_ids]
    if not stops and len(kept) < sampling.max_new_tokens:
        raise DataError(
            f"{label} answered {request.id!r}, sample {request.sample}, with {len(kept)} "
            f"tokens that neither end nor are max_new_tokens={sampling.max_new_tokens}; it aborted "
            "that request, or has a limit of its own: raise that"
        )
    vocabulary_size = policy.model.config.get_text_config().vocab_size
    foreign = [token for token in kept if not 0 <= token < vocabulary_size]
    if foreign:
        raise DataError(
            f"{label} answered {request.id!r} with token {foreign[0]}, and the policy has {vocabulary_size}; it runs "
            "another model: give it this one"
        )
    return Decoded(request, tuple(kept[: stops[0] + 1] if stops else kept), "stop" if stops else "length")


def command_of(template: str | None, model: Path | str, adapter: Path | None = None) -> list[str]:
    """The words of the user's command line; {prompts} and {output} are filled in for each call.

    Raises:
        ConfigError: a part of the template is missing.
    """
    needed = ["{model}", "{prompts}", "{output}"] + (["{adapter}"] if adapter is not None else [])
    missing = [name for name in needed if name not in (template or "")]
    if template is None or missing:
        raise ConfigError(
            f"generate.command: {template!r} lacks {', '.join(missing)}; engine=command needs a template like "
            f"'my_engine {' '.join(needed)}'"
        )
    places = {"{model}": str(model), "{adapter}": "" if adapter is None else str(adapter)}
    words = shlex.split(template)
    for place, value in places.items():
        words = [word.replace(place, value) for word in words]
    return words


def environment_of(
    world: World, environment: Mapping[str, str] = os.environ, *, num_devices: int = 1
) -> dict[str, str]:
    """What the program inherits: nothing by which it would take itself for a rank, and its devices only.

    Those are this rank's and the `num_devices` - 1 that follow it.
    """
    others = {name: value for name, value in environment.items() if CACHES.get(name) != value}
    kept = {name: value for name, value in others.items() if not name.startswith(LAUNCHER_VARIABLES)}
    if world.device.type == "cuda":
        visible, first = environment.get("CUDA_VISIBLE_DEVICES"), world.device.index
        names = visible.split(",") if visible else [str(index) for index in range(first + num_devices)]
        kept["CUDA_VISIBLE_DEVICES"] = ",".join(names[first : first + num_devices])
    return kept


def integers(tokens: Any) -> list[int]:
    """The tokens of a line, if that is what they are: a program may write anything."""
    if not isinstance(tokens, list) or not all(type(token) is int for token in tokens):
        raise ValueError("tokens must be a list of integers")
    return tokens


def _follow(lines: BinaryIO, process: subprocess.Popen[bytes]) -> Iterator[bytes]:
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
