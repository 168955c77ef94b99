"""A server of the user's that speaks OpenAI's completions protocol: token ids in and out, over HTTP.

What the server runs is the user's business, so its log-probabilities are compared with those of the very policy before
any work. vLLM (0.10.2 or later) and servers like it give token ids (`return_token_ids`); one that doesn't is refused.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import queue
import threading
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from urllib.parse import urlsplit

from spd_dist.config import Generate, Server
from spd_dist.distributed.world import World
from spd_dist.errors import ConfigError, DataError
from spd_dist.inference.engine_probes import CLOSE_LOGITS, References
from spd_dist.inference.external.external_engine import decoded_of, integers
from spd_dist.inference.requests import Decoded, Request
from spd_dist.inference.sampling import Sampling
from spd_dist.models.policy import Policy
from spd_dist.projection.fold import refuse_inexact
from spd_dist.projection.operators import parts_by_module
from spd_dist.types import Projection

BUSY = (408, 429, 500, 502, 503, 504)
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.5, 60.0
KEPT = "what is written is kept: start the same command again"


def check_server(server: Server, arm: str, projection: Projection | None) -> None:
    """Refuse settings that name no model, and projections that no weights can hold.

    Raises:
        ConfigError: naming the key.
    """
    for url in urls_of(server):
        address = urlsplit(url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ConfigError(
                f"generate.server.url: {server.url!r} is not valid with engine=server; set it to http://HOST:PORT/v1"
            )
        if address.username is not None:
            raise ConfigError(
                "generate.server.url: a name or password in an address is not sent; put the server's key into the "
                f"variable that generate.server.key_variable names, {server.key_variable}"
            )
    if arm not in server.models:
        known = ", ".join(server.models) or "none"
        raise ConfigError(
            f"generate.server.models: it names what the server calls the policy of {known}, and not of {arm}; set "
            f"generate.server.models.{arm}=NAME"
        )
    if projection is not None:
        parts = [part for group in parts_by_module(projection.operators).values() for part in group]
        refuse_inexact(parts, projection.insertion)


def urls_of(server: Server) -> tuple[str, ...]:
    """The addresses of servers that share the work."""
    return tuple(url.strip() for url in (server.url or "").split(","))


@dataclass(frozen=True)
class _Completed:
    """What the server said to one request."""

    tokens: list[int]
    logprobs: list[float]


class ServerEngine:
    """Requests under way at once, each tried again, and with the next server if there is one, while one is busy."""

    name = "server"

    def __init__(self, policy: Policy, config: Generate, arm: str, world: World, label: str) -> None:
        self.policy, self.server, self.label = policy, config.server, label
        self.model = str(config.server.models[arm])
        self.urls, self.rank = urls_of(config.server), world.rank
        self.num_threads = max(1, config.server.concurrency // world.size)
        self.timeout_seconds = config.engine_timeout_seconds

    def complete(self, requests: Sequence[Request], sampling: Sampling) -> Generator[Decoded, None, None]:
        """Completions as they come. To close this takes back what is not sent, and waits for nothing.

        Raises:
            DataError: the server refuses, stays busy, is gone, or answers what was not asked.
        """
        waiting: queue.SimpleQueue[Request] = queue.SimpleQueue()
        answers: queue.SimpleQueue[tuple[Request, _Completed | Exception]] = queue.SimpleQueue()
        for request in requests:
            waiting.put(request)
        is_over = threading.Event()

        def work(number: int) -> None:
            first = (self.rank + number) % len(self.urls)
            urls = self.urls[first:] + self.urls[:first]
            while not is_over.is_set():
                try:
                    request = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    answers.put((request, self._ask(request, sampling, is_over, urls)))
                except (DataError, ConfigError) as error:
                    answers.put((request, error))
                    return

        for number in range(min(self.num_threads, len(requests))):
            threading.Thread(target=work, args=(number,), name="server", daemon=True).start()
        try:
            for _ in requests:
                request, found = answers.get()
                if isinstance(found, Exception):
                    raise found
                yield decoded_of(self.label, request, found.tokens, sampling, self.policy)
        finally:
            is_over.set()

    def verify(self, expected: References) -> None:
        """Compare each server's log-probabilities of its greedy tokens with the policy's own.

        Raises:
            DataError: it gives none, or those of another policy or precision.
        """
        limit = CLOSE_LOGITS[self.policy.model.dtype]
        for url, reference in itertools.product(self.urls, expected.answers):
            found = self._ask(reference.request, expected.sampling, threading.Event(), (url,), logprobs=1)
            logprob_TV = reference.logits_TV.double().log_softmax(-1)
            pairs = zip(found.tokens, found.logprobs, reference.tokens, strict=False)
            for index, (token, logprob, own) in enumerate(pairs):
                expected_logprob = float(logprob_TV[index, token]) if 0 <= token < logprob_TV.shape[1] else math.nan
                if not abs(logprob - expected_logprob) <= limit:
                    raise DataError(
                        f"{self.label}: to token {index} of its greedy answer to prompt {reference.request.id!r}, "
                        f"{self.model!r} of {url} gives the log-probability {logprob:.4f}, and this policy gives it "
                        f"{expected_logprob:.4f}: the server runs another policy, or another precision than "
                        f"{str(self.policy.model.dtype).removeprefix('torch.')}; serve this arm's weights "
                        "(launchers/export.py writes folded ones), or set engine=hf"
                    )
                if token != own:
                    break
            if not found.logprobs:
                raise DataError(f"{self.label}: the server gives no log-probabilities: its policy can't be known")

    def _ask(
        self,
        request: Request,
        sampling: Sampling,
        is_over: threading.Event,
        urls: Sequence[str],
        logprobs: int | None = None,
    ) -> _Completed:
        """One answer, of the first of `urls` that gives it."""
        body = self._body(request, sampling, logprobs)
        pause, said = FIRST_PAUSE_SECONDS, ""
        for attempt in range(self.server.retries + 1):
            url, is_first = urls[attempt % len(urls)], attempt % len(urls) == 0
            if attempt and is_over.wait(pause if is_first else 0):
                break
            try:
                status, retry_after, text = self._post(url, body)
            except (OSError, HTTPException) as error:
                said = f"no answer ({type(error).__name__}: {error})"
            else:
                if status == 200:
                    return self._completed(url, request, text)
                said = f"{status}: {text[:300].decode(errors='replace')}"
                if status not in BUSY:
                    raise DataError(f"{self.label}: {url} refuses prompt {request.id!r} with {said}")
                pause = max(pause, float(retry_after) if retry_after.isdigit() else 0.0)
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS) if is_first else pause
        raise DataError(
            f"{self.label}: {', '.join(urls)} failed {self.server.retries + 1} times (generate.server.retries), the "
            f"last with {said}; {KEPT}"
        )

    def _body(self, request: Request, sampling: Sampling, logprobs: int | None) -> bytes:
        """Every field that may change a token, by name, as JSON: nothing is left to the server's defaults."""
        asked = {
            "model": self.model, "prompt": list(request.tokens), "seed": request.seed % 2**63, "n": 1,
            "max_tokens": sampling.max_new_tokens, "temperature": sampling.temperature, "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1, "min_p": sampling.min_p, "repetition_penalty": sampling.repetition_penalty,
            "presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": {}, "stop": [], "min_tokens": 0,
            "stop_token_ids": list(self.policy.eos_token_ids), "ignore_eos": False, "logprobs": logprobs,
            "return_token_ids": True, "skip_special_tokens": False, "stream": False,
        }  # fmt: skip
        return json.dumps(asked).encode()

    def _post(self, url: str, body: bytes) -> tuple[int, str, bytes]:
        """Status, Retry-After, and text."""
        address = urlsplit(url)
        kind = HTTPSConnection if address.scheme == "https" else HTTPConnection
        headers = {"Content-Type": "application/json", "Connection": "close"}
        if key := os.environ.get(self.server.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        with closing(kind(address.hostname or "", address.port, timeout=self.timeout_seconds)) as connection:
            connection.request("POST", f"{address.path.rstrip('/')}/completions", body, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheader("Retry-After", ""), answer.read()

    def _completed(self, url: str, request: Request, text: bytes) -> _Completed:
        try:
            (choice,) = json.loads(text)["choices"]
            tokens = integers(choice["token_ids"])
            logprobs = [float(value) for value in ((choice.get("logprobs") or {}).get("token_logprobs") or [])]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self.label}: {url} answered prompt {request.id!r} with {text[:200]!r}, which has no "
                f"choices[0].token_ids ({error!r}); take a server that gives token ids, as vLLM, or engine=command"
            ) from error
        if any(math.isnan(value) for value in logprobs):
            raise DataError(f"{self.label}: {url} gives log-probabilities that are NaN: check its weights")
        ends = self.policy.eos_token_ids
        if choice.get("finish_reason") == "stop" and (not tokens or tokens[-1] not in ends):
            reason = choice.get("stop_reason")  # a server may keep the token that ends to itself
            tokens.append(reason if isinstance(reason, int) else ends[0])
        return _Completed(tokens, logprobs)
