"""A Hugging Face hub that is small, local, and ill on demand: repositories, LFS, commits, revisions and downloads."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_writes"
PREFIX = {"models": "", "datasets": "datasets/"}
LARGE = (".safetensors", ".bin", ".parquet")
"""Files that go by LFS; the others are in the commit itself."""


@dataclass
class ServedRepo:
    """What the hub knows of a repository."""

    private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    """Oid and all files, oldest first; the last is `main`."""
    branches: dict[str, str] = field(default_factory=dict)
    """Other names of commits: tags."""

    def commit(self, files: dict[str, bytes]) -> str:
        """Add one on top of the last."""
        tree = (self.commits[-1][1] if self.commits else {}) | files
        content = json.dumps([len(self.commits), {name: _sha256(data) for name, data in sorted(tree.items())}])
        oid = hashlib.sha1(content.encode(), usedforsecurity=False).hexdigest()
        self.commits.append((oid, tree))
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit that a branch, a tag or an oid names."""
        oid = self.branches.get(revision, revision)
        named = [one for one in self.commits if one[0] == oid]
        return self.commits[-1] if revision == "main" and self.commits else next(iter(named), None)


class FakeHub:
    """`with FakeHub() as hub`: it listens on `hub.url`, which HF_ENDPOINT takes.

    `failing` steps (create, preupload, batch, blob, commit, resolve, info) are answered by `status`, so many times.
    """

    def __init__(self) -> None:
        self.repos: dict[str, ServedRepo] = {}
        """By their address: `me/model`, `datasets/me/corpus`."""
        self.blobs: dict[str, bytes] = {}
        self.asked: Counter[str] = Counter()
        """Steps, and files: `GET me/model/config.json`, `PUT <sha256>`."""
        self.failing: Counter[str] = Counter()
        self.status = 503
        self.unknown: set[str] = set()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, address: str, folder: Path, *, private: bool = False) -> str:
        """A repository with the files of a folder; its commit."""
        files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        return self.repos.setdefault(address, ServedRepo(private)).commit(files)

    def variables(self, home: Path) -> dict[str, str]:
        """What a process needs in its environment to talk to this hub and to no other, with a cache of its own."""
        found = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        return found | {"HF_HUB_OFFLINE": "0", "HF_DATASETS_CACHE": str(home / "datasets")}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: FakeHub


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _git_oid(data)}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": _sha256(data), "size": len(data), "pointerSize": 130}
    return entry


def _known_oid(files: dict[str, bytes], path: str) -> str | None:
    """What the client compares with, to leave out what is there already."""
    if path not in files:
        return None
    return _sha256(files[path]) if path.endswith(LARGE) else _git_oid(files[path])


class _Handler(BaseHTTPRequestHandler):
    """The requests of one self.server.hub."""

    server: _Server

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._serve("GET")

    def do_HEAD(self) -> None:
        self._serve("HEAD")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def _serve(self, method: str) -> None:
        self.body = self._read_body()
        path = unquote(urlsplit(self.path).path)
        for pattern, action in ROUTES:
            found = re.fullmatch(pattern, f"{method} {path}")
            if found:
                step = action.__name__.strip("_")
                self.server.hub.asked[step] += 1
                if self.server.hub.failing[step] > 0:
                    self.server.hub.failing[step] -= 1
                    self._reply({"error": "the hub is ill"}, status=self.server.hub.status)
                elif "revision" in found.re.groupindex:
                    self._with_files(action, **found.groupdict())
                else:
                    action(self, **found.groupdict())
                return
        self.server.hub.unknown.add(f"{method} {path}")
        self._reply({"error": "no such address"}, status=404)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _repo(self, kind: str, name: str) -> ServedRepo | None:
        repo = self.server.hub.repos.get(PREFIX[kind] + name)
        is_hidden = repo is not None and repo.private and not self._may_write()
        return None if is_hidden else repo

    def _may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _with_files(self, action: Any, kind: str | None, name: str, revision: str | None, **rest: str) -> None:
        kind = (kind or "models").rstrip("/")
        repo = self._repo(kind, name)
        found = None if repo is None else repo.at(revision or "main")
        if repo is None or found is None:
            code = "RepoNotFound" if repo is None else "RevisionNotFound"
            self._reply({"error": "not found"}, status=404, **{"X-Error-Code": code})
        else:
            action(self, kind, name, repo, found, **rest)

    def _reply(self, answer: Any, *, status: int = 200, **headers: str) -> None:
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _agents(self) -> None:
        self._reply({"harnesses": []})

    def _validate(self) -> None:
        header = json.loads(self.body)["content"].split("---")[1]
        base = (yaml.safe_load(header) or {}).get("base_model")
        wrong = base is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", base) is None
        errors = [{"message": f'"base_model" with value "{base}" is not valid'}] if wrong else []
        self._reply({"errors": errors, "warnings": []}, status=400 if wrong else 200)

    def _create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        address = PREFIX[f"{asked.get('type', 'model')}s"] + name
        is_private = asked.get("private", asked.get("visibility") == "private")
        if not self._may_write():
            self._reply({"error": "Invalid username or password."}, status=401)
            return
        is_new = address not in self.server.hub.repos
        if is_new:
            self.server.hub.repos[address] = ServedRepo(is_private)
            self.server.hub.repos[address].commit({".gitattributes": b""})
        found = {"url": f"{self.server.hub.url}/{address}", "id": name, "name": name}
        self._reply(found, status=200 if is_new else 409)

    def _info(self, kind: str, name: str, repo: ServedRepo, found: Any) -> None:
        oid, files = found
        self._reply({
            "id": name, "_id": "0", "sha": oid, "private": repo.private, "gated": False, "disabled": False,
            "downloads": 0, "likes": 0, "tags": [], "siblings": [{"rfilename": path} for path in files],
        })  # fmt: skip

    def _tree(self, kind: str, name: str, repo: ServedRepo, found: Any, under: str) -> None:
        del kind, name, repo
        inside = [path for path in found[1] if path.startswith(under.strip("/"))]
        self._reply([_entry(path, found[1][path]) for path in inside])

    def _paths_info(self, kind: str, name: str, repo: ServedRepo, found: Any) -> None:
        del kind, name, repo
        text = self.body.decode()
        wanted = json.loads(text)["paths"] if text.startswith("{") else re.findall(r"paths=([^&]+)", text)
        self._reply([_entry(path, found[1][path]) for path in map(unquote, wanted) if path in found[1]])

    def _preupload(self, kind: str, name: str, repo: ServedRepo, found: Any) -> None:
        del kind, name, repo
        files = [
            {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith(LARGE) else "regular",
             "shouldIgnore": False, "oid": _known_oid(found[1], one["path"])}
            for one in json.loads(self.body)["files"]
        ]  # fmt: skip
        self._reply({"files": files})

    def _batch(self, **_: str) -> None:
        objects = []
        for one in json.loads(self.body)["objects"]:
            known = {"oid": one["oid"], "size": one["size"]}
            action = {"upload": {"href": f"{self.server.hub.url}/blobs/{one['oid']}", "header": {}}}
            objects.append(known if one["oid"] in self.server.hub.blobs else known | {"actions": action})
        self._reply({"transfer": "basic", "objects": objects})

    def _blob(self, oid: str) -> None:
        self.server.hub.asked[f"PUT {oid}"] += 1
        self.server.hub.blobs[oid] = self.body
        self._reply({}, status=200 if _sha256(self.body) == oid else 400)

    def _commit(self, kind: str, name: str, repo: ServedRepo, found: Any) -> None:
        del found
        if not self._may_write():
            self._reply({"error": "Forbidden"}, status=403)
            return
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        files = {one["value"]["path"]: base64.b64decode(one["value"]["content"])
                 for one in lines if one["key"] == "file"}  # fmt: skip
        files |= {
            one["value"]["path"]: self.server.hub.blobs[one["value"]["oid"]] for one in lines if one["key"] == "lfsFile"
        }
        oid = repo.commit(files)
        url = f"{self.server.hub.url}/{PREFIX[kind]}{name}/commit/{oid}"
        self._reply({"commitUrl": url, "commitOid": oid, "success": True})

    def _resolve(self, kind: str, name: str, repo: ServedRepo, found: Any, path: str) -> None:
        del repo
        oid, files = found
        if path not in files:
            missing = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid}
            self._reply({"error": "not found"}, status=404, **missing)
            return
        data = files[path]
        if self.command == "GET":
            self.server.hub.asked[f"GET {PREFIX[kind]}{name}/{path}"] += 1
        etag = _sha256(data) if path.endswith(LARGE) else _git_oid(data)
        self._reply(data, **{"X-Repo-Commit": oid, "ETag": f'"{etag}"'})


_NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
_KINDS = r"(?P<kind>models|datasets)"
ROUTES = (
    (r"POST /api/repos/create", _Handler._create),
    (r"GET /api/agent-harnesses", _Handler._agents),
    (r"POST /api/validate-yaml", _Handler._validate),
    (rf"POST /api/{_KINDS}/{_NAME}/preupload/(?P<revision>.+)", _Handler._preupload),
    (rf"POST /api/{_KINDS}/{_NAME}/commit/(?P<revision>.+)", _Handler._commit),
    (rf"POST /api/{_KINDS}/{_NAME}/paths-info/(?P<revision>.+)", _Handler._paths_info),
    (rf"GET /api/{_KINDS}/{_NAME}(?:/revision/(?P<revision>.+))?", _Handler._info),
    (rf"GET /api/{_KINDS}/{_NAME}/tree/(?P<revision>[^/]+)(?P<under>.*)", _Handler._tree),
    (r"POST /(?:datasets/)?[\w.-]+/[\w.-]+\.git/info/lfs/objects/batch", _Handler._batch),
    (r"PUT /blobs/(?P<oid>\w+)", _Handler._blob),
    (rf"(?:GET|HEAD) /(?P<kind>datasets/)?{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler._resolve),
)
