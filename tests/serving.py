"""A server that speaks OpenAI's completions protocol for a tiny policy, and can be told to fail.

On loopback inside a test, or as a program of its own: `python tests/serving.py MODEL PORT`.
"""

from __future__ import annotations

import json
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch
from generating import policy_of

from spd_dist.models.policy import Policy


class Serving:
    """What the server knows, did, and is to do wrong."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.lock = policy, threading.Lock()
        self.faults: deque[int | str | Callable[[dict], dict]] = deque()
        """Of the next requests: a status, `close`, or a function of the answer."""
        self.bodies: list[dict] = []
        self.url = ""

    @torch.no_grad()
    def choice(self, body: dict) -> dict:
        """The greedy completion, with the log-probabilities of its tokens."""
        prompt = torch.tensor([body["prompt"]])
        tokens, logprobs = [], []
        while len(tokens) < body["max_tokens"] and not (tokens and tokens[-1] in body["stop_token_ids"]):
            whole = torch.cat([prompt, torch.tensor([tokens], dtype=torch.long)], 1)
            logprob_V = self.policy.model(input_ids=whole).logits[0, -1].double().log_softmax(-1)
            tokens.append(int(logprob_V.argmax()))
            logprobs.append(float(logprob_V[tokens[-1]]))
        is_stop = tokens[-1] in body["stop_token_ids"]
        found = {"token_ids": tokens, "finish_reason": "stop" if is_stop else "length"}
        return found | {"logprobs": {"token_logprobs": logprobs} if body["logprobs"] else None}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        serving: Serving = self.server.serving
        with serving.lock:
            serving.bodies.append(body)
            fault = serving.faults.popleft() if serving.faults else None
            answer = {} if isinstance(fault, (int, str)) else {"choices": [serving.choice(body)]}
        if fault == "close":
            self.close_connection = True
            self.connection.close()
            return
        status = fault if isinstance(fault, int) else 200
        if callable(fault):
            answer = fault(answer)
        text = json.dumps(answer if status == 200 else {"error": "too many requests"}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        """Healthy."""
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing."""


def _server(found: Serving, address: str, port: int) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer((address, port), _Handler)
    server.daemon_threads, server.serving = True, found
    return server


@contextmanager
def serving(policy: Policy) -> Iterator[Serving]:
    """The policy served on loopback."""
    found = Serving(policy)
    server = _server(found, "127.0.0.1", 0)
    found.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


if __name__ == "__main__":
    _server(Serving(policy_of(Path(sys.argv[1]))), "0.0.0.0", int(sys.argv[2])).serve_forever()
