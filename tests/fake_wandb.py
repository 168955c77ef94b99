"""A W&B server that is small, local, and ill on demand: enough of the protocol for runs, files and artifacts."""

from __future__ import annotations

import base64
import gzip
import json
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ENTITY = "me"


@dataclass
class ServedRun:
    """What the server knows of a run."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    config: str = "{}"
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)
    exit_code: int | None = None


class FakeWandb:
    """`with FakeWandb() as server`: it listens on `server.url`.

    `failing` operations (names of GraphQL operations, or `file_stream`, or `*`) are answered by 500, so many times;
    each answer comes after `delay_seconds`; `refuse()` closes the door while a run is on.
    """

    def __init__(self) -> None:
        self.runs: dict[str, ServedRun] = {}
        self.order: list[str] = []
        """Names of runs, as often as they were opened."""
        self.artifacts: list[dict[str, Any]] = []
        self.used_artifacts: list[dict[str, Any]] = []
        self.views: list[dict[str, Any]] = []
        self.operations: Counter[str] = Counter()
        self.unknown: set[str] = set()
        self.failing: Counter[str] = Counter()
        self.delay_seconds = 0.0
        self._server = _Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeWandb:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.refuse()

    def refuse(self) -> None:
        """Answer nobody from here on."""
        self._server.shutdown()
        self._server.server_close()

    def fails(self, operation: str) -> bool:
        """Whether this one is to fail; counts it."""
        self.operations[operation] += 1
        for name in (operation, "*"):
            if self.failing[name] > 0:
                self.failing[name] -= 1
                return True
        return False

    def stream(self, name: str, sent: dict[str, Any]) -> None:
        """Take in lines of a run's history, and its summary."""
        run = self.runs[name]
        for file, content in (sent.get("files") or {}).items():
            lines = [json.loads(line) for line in content["content"]] if file.endswith((".jsonl", ".json")) else []
            if file == "wandb-history.jsonl":
                run.history[content.get("offset", 0) :] = lines
            elif file == "wandb-summary.json":
                run.summary |= lines[-1]
        if "complete" in sent:
            run.exit_code = sent.get("exitcode")

    def graphql(self, operation: str, variables: dict[str, Any], query: str) -> dict[str, Any]:
        """The answer's `data`."""
        answer = ANSWERS.get(operation)
        if answer is not None:
            return answer(self, variables)
        if "serverInfo" in query:
            return {"serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None, "features": []}}
        self.unknown.add(operation)
        return {}


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that leaves in the middle is none of our business."""


def _handler(fake: FakeWandb) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def body(self) -> bytes:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

        def answer(self, content: dict[str, Any], code: int = 200) -> None:
            time.sleep(fake.delay_seconds)
            data = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self.body()
            self.answer({}, 500 if fake.fails("GET") else 200)

        def do_PUT(self) -> None:
            self.body()
            self.answer({})

        def do_POST(self) -> None:
            data = self.body()
            streamed = re.match(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path)
            if streamed:
                if fake.fails("file_stream"):
                    return self.answer({}, 500)
                fake.stream(streamed[1], json.loads(data))
                return self.answer({"limits": {}})
            asked = json.loads(data)
            named = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
            operation = asked.get("operationName") or (named[1] if named else "?")
            if fake.fails(operation):
                return self.answer({"errors": [{"message": "made to fail"}]}, 500)
            variables = asked.get("variables") or {}
            return self.answer({"data": fake.graphql(operation, variables, asked["query"])})

    return Handler


def _id(kind: str, name: str) -> str:
    return base64.b64encode(f"{kind}:v1:{name}".encode()).decode()


def _viewer(_: FakeWandb, __: dict[str, Any]) -> dict[str, Any]:
    names = {"entity": ENTITY, "username": ENTITY, "name": ENTITY, "email": ""}
    return {"viewer": {"id": "u", "flags": "{}", "admin": False, "teams": {"edges": []}, **names}}


def _upsert(fake: FakeWandb, variables: dict[str, Any]) -> dict[str, Any]:
    name = variables.get("name") or variables.get("id")
    is_new = name not in fake.runs
    run = fake.runs.setdefault(name, ServedRun(name))
    if not fake.order or fake.order[-1] != name:
        fake.order.append(name)
    run.settings |= {key: value for key, value in variables.items() if value is not None}
    run.config = variables.get("config") or run.config
    project = {"id": "p", "name": variables.get("project") or "", "entity": {"id": "e", "name": ENTITY}}
    bucket = {
        "id": _id("Run", name), "name": name, "displayName": variables.get("displayName") or name, "description": "",
        "config": run.config, "sweepName": None, "historyLineCount": len(run.history), "project": project,
    }  # fmt: skip
    return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}


def _resume_status(fake: FakeWandb, variables: dict[str, Any]) -> dict[str, Any]:
    run = fake.runs.get(variables["name"])
    bucket = None if run is None else {
        "id": _id("Run", run.name), "name": run.name, "displayName": run.name, "config": run.config, "tags": [],
        "summaryMetrics": json.dumps(run.summary), "historyLineCount": len(run.history), "eventsLineCount": 0,
        "logLineCount": 0, "historyTail": json.dumps([json.dumps(row) for row in run.history[-1:]]), "eventsTail": "[]",
        "wandbConfig": '{"t": 1}',
    }  # fmt: skip
    return {"model": {"id": "p", "name": "", "entity": {"id": "e", "name": ENTITY}, "bucket": bucket}}


def _create_files(fake: FakeWandb, variables: dict[str, Any]) -> dict[str, Any]:
    name = variables.get("run") or variables.get("runName")
    fake.runs[name].files |= set(variables["files"])
    files = [{"name": file, "uploadUrl": f"{fake.url}/upload/{name}/{file}"} for file in variables["files"]]
    return {"createRunFiles": {"runID": _id("Run", name), "uploadHeaders": [], "files": files}}


def _create_artifact(fake: FakeWandb, variables: dict[str, Any]) -> dict[str, Any]:
    fake.artifacts.append(variables)
    sequence = {"id": "s", "latestArtifact": None}
    made = {"id": f"a{len(fake.artifacts)}", "state": "COMMITTED", "artifactSequence": sequence}
    return {"createArtifact": {"artifact": made}}


def _use_artifact(fake: FakeWandb, variables: dict[str, Any]) -> dict[str, Any]:
    fake.used_artifacts.append(variables)
    return {"useArtifact": {"artifact": {"id": variables.get("artifactID"), "digest": "", "description": ""}}}


def _upsert_view(fake: FakeWandb, variables: dict[str, Any]) -> dict[str, Any]:
    fake.views.append(variables)
    project = {"id": "p", "name": variables["projectName"], "entityName": variables["entityName"]}
    echoed = {key: variables.get(key) or "" for key in ("name", "type", "displayName", "description", "spec")}
    view = {"id": _id("View", str(len(fake.views))), "updatedAt": None, "project": project, **echoed}
    return {"upsertView": {"view": view, "inserted": True}}


ANSWERS = {
    "Viewer": _viewer,
    "ViewerFull": _viewer,
    "UpsertBucket": _upsert,
    "RunResumeStatus": _resume_status,
    "CreateRunFiles": _create_files,
    "ArtifactType": lambda *_: {"project": None},
    "CreateArtifact": _create_artifact,
    "UseArtifact": _use_artifact,
    "UpsertView2": _upsert_view,
    "upsertView": _upsert_view,
    "GetProjects": lambda *_: {"models": {"edges": [], "pageInfo": {"endCursor": None, "hasNextPage": False}}},
    "ProjectInternalId": lambda *_: {"project": {"internalId": "p1"}},
    "OrganizationCoreWeaveOrganizationID": lambda *_: {"entity": None},
    "RunStoppedStatus": lambda *_: {"project": {"run": {"stopped": False}}},
    "ServerFeaturesQuery": lambda *_: {"serverInfo": {"features": []}},
}
