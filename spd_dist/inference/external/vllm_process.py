"""The process of vLLM's engine: how it is started, talked to by lines, ended, and kept for the next that needs it."""

from __future__ import annotations

import dataclasses
import json
import logging
import queue
import shutil
import subprocess
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from spd_dist.config import Generate
from spd_dist.errors import ConfigError, DataError
from spd_dist.inference.external.external_engine import integers, last_lines, running

log = logging.getLogger(__name__)

INSIDE = Path(__file__).with_name("inside_vllm")
POLL_SECONDS = 0.5


@dataclasses.dataclass(frozen=True, order=True)
class VLLMSite:
    """A site as the plugin finds it in vLLM's model."""

    name: str
    module: str
    kind: str
    width: int
    after_rope: bool


@dataclasses.dataclass(frozen=True)
class VLLMSettings:
    """What an engine is started with; one that is at work serves whatever has the same."""

    model: str
    revision: str | None
    dtype: str
    trust_remote_code: bool
    max_length: int
    tensor_parallel: int
    pipeline_parallel: int
    sites: tuple[VLLMSite, ...]
    """Those that may be projected."""
    lora_rank: int
    """Of the largest adapter; 0 if there is none."""
    options: str
    """Of the user, as JSON."""


class VLLMProcess:
    """An engine at work, by lines in and out."""

    def __init__(self, python: str, folder: Path, environment: Mapping[str, str], silence_seconds: float) -> None:
        """Start the process, which imports vllm; it takes no device before its settings come.

        Raises:
            ConfigError: there is no such interpreter.
            DataError: the folder can't be written.
        """
        self.folder, self.environment, self.silence_seconds = folder, environment, silence_seconds
        self.settings: VLLMSettings | None = None
        self.log = folder / "engine.log"
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        self._outbox: queue.Queue[bytes | None] = queue.Queue()
        with ExitStack() as stack:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(open(self.log, "wb"))
            except OSError as error:
                raise DataError(f"{folder} can't be written: {error.strerror}; make room there") from error
            try:
                words = [python, str(INSIDE / "serve.py")]
                self.process = stack.enter_context(running(words, environment, file, is_piped=True))
            except OSError as error:
                raise ConfigError(
                    f"generate.vllm_python: {python!r} cannot be started: {error.strerror}; give the path of a Python "
                    "interpreter that has vllm"
                ) from error
            self._stack = stack.pop_all()
        for work in (self._read, self._write):
            threading.Thread(target=work, name="vllm", daemon=True).start()

    def begin(self, settings: VLLMSettings) -> None:
        """Give the engine its settings and wait until it is ready.

        Raises:
            DataError: vLLM can't run the model, or says nothing for `silence_seconds`.
        """
        started = time.monotonic()
        self.settings = settings
        try:
            self.send(dataclasses.asdict(settings))
            self.version = self.receive("ready")["vllm"]
        except BaseException:
            self.close()
            raise
        log.info("vLLM %s is ready after %.0f s", self.version, time.monotonic() - started)

    def may_serve(self, settings: VLLMSettings, environment: Mapping[str, str]) -> bool:
        """Whether it is at work and has these settings, or none yet; its sequences may be longer."""
        if self.settings is None:
            return self.environment == environment and self.process.poll() is None
        own = dataclasses.replace(self.settings, max_length=settings.max_length)
        return own == settings and self.settings.max_length >= settings.max_length and self.process.poll() is None

    def send(self, asked: Mapping[str, Any]) -> None:
        """Write a line; never waits for the engine."""
        self._outbox.put(json.dumps(asked).encode() + b"\n")

    def receive(self, kind: str) -> Any:
        """The next line, which must be of this kind: the engine's answers come one by one.

        Raises:
            DataError: the engine has ended, is silent, or said something else.
        """
        waited_since = time.monotonic()
        while True:
            try:
                line = self._lines.get(timeout=POLL_SECONDS)
                break
            except queue.Empty:
                if time.monotonic() - waited_since > self.silence_seconds:
                    what = f"has said nothing for generate.engine_timeout_seconds={self.silence_seconds:g}"
                    raise self.fault(what) from None
        if line is None:
            try:
                code = self.process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                code = None
            raise self.fault(f"ended with exit code {code}")
        try:
            row = json.loads(line)
            return row[kind] if kind != "key" else (row["key"], integers(row["tokens"]))
        except (ValueError, KeyError, TypeError) as error:
            raise self.fault(f"wrote {line[:200]!r}, which is no {kind!r} ({error!r})") from error

    def fault(self, what: str) -> DataError:
        """The error of an engine that did `what`, with what it said last."""
        return DataError(
            f"engine=vllm {what}; start the same command again, what is written is kept; {last_lines(self.log)}"
        )

    def close(self) -> None:
        """End it, and what it has started."""
        self._outbox.put(None)
        self._stack.close()

    def _read(self) -> None:
        assert self.process.stdout is not None  # it is piped
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _write(self) -> None:
        inbox = self.process.stdin
        assert inbox is not None  # it is piped
        while (line := self._outbox.get()) is not None:
            try:
                inbox.write(line)
                if self._outbox.empty():
                    inbox.flush()
            except (OSError, ValueError):  # it has ended: what it said last is read elsewhere
                return


class EnginePool:
    """The engine that is at work, kept between uses of the same settings."""

    def __init__(self, folder: Path | None = None) -> None:
        """Logs are in `folder`; without it, where the first work of an engine keeps its files."""
        self.folder = folder
        self.process: VLLMProcess | None = None
        self.num_starts = 0
        self._num_told = 0
        self.sites: tuple[VLLMSite, ...] = ()
        """Sites that later uses will project."""
        self.lora_rank = 0
        """Of the largest adapter of later uses."""

    def prepare(self, config: Generate, folder: Path, environment: Mapping[str, str]) -> None:
        """Start the process of an engine whose settings come later, unless one is at work."""
        if self.process is None:
            assert config.vllm_python is not None  # a rule of the config
            self.process = VLLMProcess(
                config.vllm_python, self.folder or folder, environment, config.engine_timeout_seconds
            )
            self.num_starts += 1

    def of(self, config: Generate, settings: VLLMSettings, folder: Path, environment: Mapping[str, str]) -> VLLMProcess:
        """The engine of these settings: the one at work if it has them, else another in its place."""
        if self.process is not None and not self.process.may_serve(settings, environment):
            self.close()
        self.prepare(config, folder, environment)
        assert self.process is not None
        if self.process.settings is None:
            self.process.begin(settings)
        return self.process

    def new_starts(self) -> int:
        """Processes that were started since this was asked last."""
        before, self._num_told = self._num_told, self.num_starts
        return self.num_starts - before

    @contextmanager
    def closed_at_the_end(self) -> Generator[EnginePool]:
        """The pool, without an engine after the body; the log of one that failed stays."""
        try:
            yield self
        except BaseException:
            self.close(keep_log=True)
            raise
        self.close()

    def close(self, *, keep_log: bool = False) -> None:
        """End the engine, if one is at work, and remove its files."""
        if self.process is not None:
            process, self.process = self.process, None
            process.close()
            if not keep_log:
                shutil.rmtree(process.folder, ignore_errors=True)
