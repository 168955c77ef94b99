"""Every artifact that a run reads back, spoiled in every way: refused by its name, and no code runs."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spd_dist.distributed.heartbeat import Heartbeat
from spd_dist.distributed.world import World
from spd_dist.errors import UserError
from spd_dist.storage.answers import read_answers
from spd_dist.storage.artifacts import read_json, read_jsonl, write_json
from spd_dist.storage.attempts import stage_cost
from spd_dist.storage.completions import read_completions
from spd_dist.storage.manifests import Manifest, OutputFile, described, why_not_complete
from spd_dist.storage.records import SCHEMA, write_record
from spd_dist.storage.run_folder import read_config
from spd_dist.storage.subspace_file import load_subspace, save_subspace
from spd_dist.types import Answer, Certificate, Completion, KVSite, SiteSubspace, Subspace

WIDTH, RANK = 8, 3


class Runs:
    """Unpickled, it makes a file."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("code-ran",)


def subspace(file: Path) -> None:
    site = KVSite(**{item.name: _any_of(item) for item in dataclasses.fields(KVSite)})
    basis_DR = torch.linalg.qr(torch.randn(WIDTH, RANK))[0].contiguous()
    part = SiteSubspace(basis_DR, torch.ones(WIDTH, dtype=torch.float64), 0.9, Certificate(), 0)
    save_subspace(file, Subspace({site: part}, {"model": "tiny"}))


def _any_of(item: dataclasses.Field) -> object:
    known = {"kind": "key", "width": WIDTH, "columns": ((0, WIDTH),)}
    kinds = {"int": 0, "str": "a", "bool": False}
    return known.get(item.name, kinds.get(str(item.type)))


def completions(file: Path) -> None:
    one = Completion("a", 0, 1, (1, 2), (3, 4), "x", "stop")
    file.write_text(json.dumps(dataclasses.asdict(one)) + "\n")


def manifest(file: Path) -> None:
    (file.parent / "out.txt").write_text("an output")
    outputs = described(file.parent, [file.parent / "out.txt"])
    write_record(file, Manifest("x", {"a": "b"}, outputs, 1.0, 1.0, 1, "2026-01-01", {}))


def complete(file: Path) -> object:
    reason = why_not_complete(file.parent, {"a": "b"})
    if reason is not None:
        raise UserError(f"{file}: {reason}")
    return reason


def beats(file: Path) -> object:
    lines = Heartbeat(file.parent, World(0, 1, torch.device("cpu"))).lines()
    if "cannot be read" in lines[0]:
        raise UserError(f"{file}: {lines[0]}")
    return lines


ATTEMPT = {"task": None, "seconds": 1.0, "world_size": 2}
BEAT = {"place": "x", "time": 1.0, "host": "h", "pid": 1}
ARTIFACTS: dict[str, tuple[str, Callable[[Path], None], Callable[[Path], object]]] = {
    "subspace": ("subspace.safetensors", subspace, load_subspace),
    "corpus": ("completions.jsonl", completions, read_completions),
    "metrics": ("rank_00000.jsonl", lambda file: file.write_text('{"step": 1}\n'), read_jsonl),
    "manifest": ("manifest.json", manifest, complete),
    "status": ("status.json", lambda file: write_json(file, {"state": "running"}), read_json),
    "config": ("config.yaml", lambda file: file.write_text("layers: [3]\n"), read_config),
    "attempt": ("attempts/1.json", lambda file: write_json(file, ATTEMPT), lambda file: stage_cost(file.parent.parent)),
    "heartbeat": ("rank_00000.json", lambda file: write_json(file, BEAT), beats),
}
"""By name: its file, what writes it well, and what a run reads it by."""

ATTACKS: dict[str, Callable[[Path], None]] = {
    "code": lambda file: file.write_bytes(pickle.dumps(Runs()) + b"\n"),
    "yaml that builds an object": lambda file: file.write_text("a: !!python/object/apply:os.mkdir [code-ran]\n"),
    "cut": lambda file: file.write_bytes(file.read_bytes().rstrip()[:-2] + b"\n"),
    "not text": lambda file: file.write_bytes(b"\xff\xfe\x00{" * 30 + b"\n"),
    "too deep": lambda file: file.write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}\n"),
    "a huge header": lambda file: file.write_bytes(struct.pack("<Q", 2**62) + file.read_bytes() + b"\n"),
}
OF_JSON_ALONE = {"yaml that builds an object", "cut", "too deep"}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("artifact", ARTIFACTS)
def test_a_spoiled_artifact_is_refused_by_its_name_and_runs_nothing(tmp_path, monkeypatch, artifact, attack):
    monkeypatch.chdir(tmp_path)
    name, write, read = ARTIFACTS[artifact]
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    write(file)
    read(file)  # the control: unspoiled, it is taken
    ATTACKS[attack](file)
    with pytest.raises(UserError, match=file.name):
        read(file)
    assert not (tmp_path / "code-ran").exists()


def changed(tensors: dict[str, torch.Tensor], suffix: str, value: Callable[[torch.Tensor], torch.Tensor]) -> dict:
    return {name: value(tensor).contiguous() if name.endswith(suffix) else tensor for name, tensor in tensors.items()}


TENSORS = {
    "a basis of one dimension": ("basis_DR", lambda basis: basis[:, 0], "shape \\[8\\]; it must be float32, of 8 rows"),
    "more columns than rows": ("basis_DR", lambda basis: torch.randn(8, 9), r"shape \[8, 9\]; it must be"),
    "another width": ("basis_DR", lambda basis: torch.randn(7, 3), r"shape \[7, 3\]; it must be float32, of 8 rows"),
    "integers": (
        "basis_DR",
        lambda basis: basis.long(),
        r"basis_DR is torch.int64 of shape \[8, 3\]; it must be float32",
    ),
    "not a number": ("basis_DR", lambda basis: basis * float("nan"), "numbers that are not finite"),
    "values of another length": ("singular_value_D", lambda value: value[:3], r"float64 of shape \[3\]; it must be"),
    "values without end": ("singular_value_D", lambda value: value * float("inf"), "numbers that are not finite"),
}


@pytest.mark.parametrize(("suffix", "value", "message"), TENSORS.values(), ids=TENSORS)
def test_a_subspace_of_wrong_tensors_is_refused(tmp_path, suffix, value, message):
    file = tmp_path / "subspace.safetensors"
    subspace(file)
    metadata = json.loads(file.read_bytes()[8 : 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]])["__metadata__"]
    save_file(changed(load_file(file), suffix, value), file, metadata)
    with pytest.raises(UserError, match=message):
        load_subspace(file)


@pytest.mark.parametrize("sites", ["{", "3", "[3]", "[{}]", '[{"site": 3}]', '[{"site": {"columns": 1}}]'])
def test_a_subspace_without_sites_is_refused(tmp_path, sites):
    save_file({"x": torch.ones(1)}, tmp_path / "a.safetensors", {"sites": sites})
    with pytest.raises(UserError, match=r"a\.safetensors is no subspace: its metadata describes no sites"):
        load_subspace(tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a/../../b"])
def test_a_manifest_that_names_files_elsewhere_is_none(tmp_path, name):
    manifest = Manifest("x", {}, {name: OutputFile(1, "")}, 1.0, 1.0, 1, "2026-01-01", {})
    write_record(tmp_path / "manifest.json", manifest)
    assert why_not_complete(tmp_path, {}) == "its manifest.json is none of this version"


@pytest.mark.parametrize(
    "value", [[], 3, None, {"inputs": {}}, {"inputs": 3, "outputs": {}}, {"inputs": {}, "outputs": {"a": 3}}]
)
def test_a_manifest_of_another_form_is_none(tmp_path, value):
    value = value | {"schema": SCHEMA} if isinstance(value, dict) else value
    write_json(tmp_path / "manifest.json", value)
    assert why_not_complete(tmp_path, {}) == "its manifest.json is none of this version"


def test_answers_are_read_as_completions_are(tmp_path):
    file = tmp_path / "a.jsonl"
    names = [item.name for item in dataclasses.fields(Answer)]
    file.write_text(json.dumps(dict.fromkeys(names[1:])) + "\n")
    with pytest.raises(UserError, match=rf"a.jsonl, line 1: not an answer \({names[0]} missing"):
        read_answers(file)
