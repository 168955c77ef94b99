"""Read back what W&B wrote offline: a `.wandb` file is LevelDB's log framing around protobuf records."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import ArtifactRecord, Record

BLOCK, HEADER = 32768, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass(frozen=True)
class OfflineArtifact:
    """An artifact that the run made or used."""

    name: str
    kind: str
    aliases: tuple[str, ...]
    metadata: dict[str, Any]
    files: tuple[str, ...]
    references: tuple[str, ...]
    is_input: bool


@dataclass
class OfflineRun:
    """What one offline run holds."""

    id: str = ""
    group: str = ""
    job_type: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    step_metrics: dict[str, str] = field(default_factory=dict)
    artifacts: list[OfflineArtifact] = field(default_factory=list)
    tags: list[str] = field(default_factory=list)
    exit_code: int | None = None


def read_offline_run(run_folder: Path) -> OfflineRun:
    """The only offline run under a run folder's `wandb/`."""
    (path,) = (run_folder / "wandb").glob("offline-run-*/*.wandb")
    run = OfflineRun()
    for record in _records(path.read_bytes()):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.id, run.group, run.job_type = record.run.run_id, record.run.run_group, record.run.job_type
            run.tags = list(record.run.tags)
            run.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            run.history.append(row)
        elif kind == "metric":
            run.step_metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "artifact":
            run.artifacts.append(_artifact(record.artifact))
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def _artifact(record: ArtifactRecord) -> OfflineArtifact:
    entries = record.manifest.contents
    return OfflineArtifact(
        name=record.name,
        kind=record.type,
        aliases=tuple(record.aliases),
        metadata=json.loads(record.metadata or "{}"),
        files=tuple(entry.path for entry in entries if not entry.ref),
        references=tuple(entry.path for entry in entries if entry.ref),
        is_input=record.use_after_commit,
    )


def _records(data: bytes) -> Iterator[Record]:
    position, whole = HEADER, b""
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        _, size, part = struct.unpack_from("<IHB", data, position) if left >= HEADER else (0, 0, 0)
        if part == 0:  # zeros fill the end of a block
            position += left
            continue
        body = data[position + HEADER : position + HEADER + size]
        if len(body) < size:
            return  # torn by a kill
        position += HEADER + size
        whole = body if part in (FULL, FIRST) else whole + body
        if part in (FULL, LAST):
            yield Record.FromString(whole)
