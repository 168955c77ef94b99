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
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from spd_dist.config import Finetune
from spd_dist.distributed.heartbeat import Heartbeat
from spd_dist.distributed.world import World
from spd_dist.errors import UserError
from spd_dist.models.lora import adapter_parameters, add_adapters, load_adapter, save_adapter
from spd_dist.models.save_weights import whole_tensors
from spd_dist.stages.finetune.checkpoints import MARKER, Checkpoints, Marker, State
from spd_dist.storage.answers import read_answers
from spd_dist.storage.artifacts import sha256_of, write_json
from spd_dist.storage.attempts import stage_cost
from spd_dist.storage.completions import read_completions
from spd_dist.storage.manifests import Manifest, OutputFile, described, read_manifest, why_not_complete
from spd_dist.storage.records import SCHEMA, read_record, write_record
from spd_dist.storage.restart import Status, read_status
from spd_dist.storage.run_folder import read_config
from spd_dist.storage.subspace_file import load_subspace, save_subspace
from spd_dist.tracking.metrics import read_metrics
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


def answers(file: Path) -> None:
    one = Answer("a", "x", "x", "x", True, "stop", 3, "x", "x", True, True, False)
    file.write_text(json.dumps(dataclasses.asdict(one)) + "\n")


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


def status(file: Path) -> None:
    write_record(file, Status("running", "", 1.0, "evaluate", 2, "host", 1, None))


def checkpoint(file: Path) -> None:
    """One of one rank, without ZeRO, as far as it is looked at before an engine reads it."""
    torch.save({"module": {"weight": torch.ones(3)}}, file)
    marker = Marker(4, "identity", 1, 0, State(), {file.name: sha256_of(file)})
    write_record(file.with_name(MARKER), marker)


def resumed(file: Path) -> object:
    found = checkpoints(file.parent.parent)
    newest = found.newest()
    if newest is None:
        raise UserError(f"{file}: passed over")
    return found.loadable(newest)


def checkpoints(folder: Path, identity: str = "identity") -> Checkpoints:
    return Checkpoints(folder, identity, World(0, 1, torch.device("cpu")), zero_stage=0, keep=1)


def adapter(file: Path) -> None:
    config = dataclasses.replace(Finetune(), lora_rank=2, lora_targets=("q_proj",))
    adapted = add_adapters(tiny_model(), config, generator=torch.Generator().manual_seed(0))
    file.parent.mkdir(exist_ok=True)
    save_adapter(adapted, dict(whole_tensors(adapter_parameters(adapted))), file.parent)


ATTEMPT = {"task": None, "seconds": 1.0, "world_size": 2}
BEAT = {"place": "x", "time": 1.0, "host": "h", "pid": 1}
ARTIFACTS: dict[str, tuple[str, Callable[[Path], None], Callable[[Path], object]]] = {
    "subspace": ("subspace.safetensors", subspace, load_subspace),
    "adapter": ("adapter_model.safetensors", adapter, lambda file: load_adapter(tiny_model(), file.parent)),
    "adapter's settings": ("adapter_config.json", adapter, lambda file: load_adapter(tiny_model(), file.parent)),
    "checkpoint": ("step_00000004/mp_rank_00_model_states.pt", checkpoint, resumed),
    "corpus": ("completions.jsonl", completions, read_completions),
    "answers": ("answers.jsonl", answers, read_answers),
    "metrics": (
        "rank_00000.jsonl",
        lambda file: file.write_text('{"time": 1.0, "stage": "finetune", "step": 1}\n'),
        lambda file: read_metrics(file.parent),
    ),
    "manifest": ("manifest.json", manifest, complete),
    "status": ("status.json", status, lambda file: read_status(file.parent)),
    "config": ("config.yaml", lambda file: file.write_text("layers: [3]\n"), read_config),
    "attempt": ("attempts/1.json", lambda file: write_json(file, ATTEMPT), lambda file: stage_cost(file.parent.parent)),
    "heartbeat": ("rank_00000.json", lambda file: write_json(file, BEAT), beats),
}
"""By name: its file, what writes it well, and what a run reads it by."""

NUMBERS = {"corpus": "seed", "answers": "num_tokens", "metrics": "time", "manifest": "seconds", "status": "time",
           "attempt": "seconds", "heartbeat": "time"}  # fmt: skip
"""What is a number in those that are JSON."""


def with_value(file: Path, artifact: str, value: str) -> None:
    """Its number, or the first of its tensors, becomes something else."""
    line = json.loads(file.read_text()) | {NUMBERS[artifact]: 4711}
    file.write_text(json.dumps(line).replace("4711", value) + "\n")


def with_tensor(file: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    if file.suffix == ".pt":
        torch.save({"module": {"weight": change(torch.ones(3))}}, file)
        return
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    save_file(tensors | {name: change(tensors[name]).contiguous() for name in sorted(tensors)[:1]}, file, metadata)


def spoil(text: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path, str], None]:
    def act(file: Path, artifact: str) -> None:
        if artifact in NUMBERS:
            with_value(file, artifact, text)
        else:
            with_tensor(file, change)

    return act


def swapped(file: Path, artifact: str) -> None:
    """By what another run has there: valid, and of the same form."""
    if artifact == "manifest":
        write_record(file, dataclasses.replace(read_manifest(file.parent), inputs={"a": "of another run"}))
    elif artifact == "checkpoint":
        marker = file.with_name(MARKER)
        write_record(marker, dataclasses.replace(read_record(marker, Marker), identity="another run"))
    elif artifact == "adapter's settings":
        file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 4711}))
    elif artifact in NUMBERS:
        with_value(file, artifact, "4712")
    else:
        with_tensor(file, lambda tensor: tensor + 1)


def symlink(file: Path, artifact: str) -> None:
    """To what another run has there; of a checkpoint, to the same."""
    if artifact != "checkpoint":
        swapped(file, artifact)
    other = file.with_name(f"of-another-run-{file.name}")
    file.rename(other)
    file.symlink_to(other)


ATTACKS: dict[str, Callable[[Path, str], object]] = {
    "code": lambda file, _: file.write_bytes(pickle.dumps(Runs()) + b"\n"),
    "yaml that builds an object": lambda file, _: file.write_text("a: !!python/object/apply:os.mkdir [code-ran]\n"),
    "cut": lambda file, _: file.write_bytes(file.read_bytes().rstrip()[:-2] + b"\n"),
    "not text": lambda file, _: file.write_bytes(b"\xff\xfe\x00{" * 30 + b"\n"),
    "too deep": lambda file, _: file.write_text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}\n"),
    "a huge header": lambda file, _: file.write_bytes(struct.pack("<Q", 2**62) + file.read_bytes() + b"\n"),
    "NaN": spoil("NaN", lambda tensor: tensor * float("nan")),
    "a number without end": spoil("1e999", lambda tensor: tensor * float("inf")),
    "wrong type": spoil('"many"', lambda tensor: tensor.long()),
    "wrong shape": spoil("[1, [2]]", lambda tensor: tensor.reshape(-1)[:-1]),
    "a list in its place": lambda file, _: file.write_text("[3]\n"),
    "another run's": swapped,
    "a symlink to another run's": symlink,
}
OTHER_RUN = ("another run's", "a symlink to another run's")
BY_MANIFEST = ("subspace", "adapter", "adapter's settings", "corpus", "answers")
"""What another run has there is read; the manifest of the stage, which has the hashes, tells it apart."""
_VALUES = ("NaN", "a number without end", "wrong type", "wrong shape")
_SHOWN = "it is shown to people, and no result depends on it"
NOT_TRIED = {
    **{("config", attack): "any other value is another config, which test_run_folder refuses" for attack in _VALUES},
    **{("config", attack): "another run's config is refused by its keys, in test_run_folder" for attack in OTHER_RUN},
    **{(one, attack): _SHOWN for one in ("metrics", "status", "attempt", "heartbeat") for attack in OTHER_RUN},
    **{("adapter's settings", attack): "it has no number that peft reads as one" for attack in _VALUES},
}
"""Cells without a test, and why."""
CELLS = [(one, attack) for one in ARTIFACTS for attack in ATTACKS if (one, attack) not in NOT_TRIED]


@pytest.mark.parametrize(("artifact", "attack"), CELLS, ids=[f"{one}, {attack}" for one, attack in CELLS])
def test_a_spoiled_artifact_is_refused_by_its_name_and_runs_nothing(tmp_path, monkeypatch, caplog, artifact, attack):
    monkeypatch.chdir(tmp_path)
    name, write, read = ARTIFACTS[artifact]
    file = tmp_path / "stage" / name
    file.parent.mkdir(parents=True)
    write(file)
    read(file)  # the control: unspoiled, it is taken
    if artifact in BY_MANIFEST and attack in OTHER_RUN:
        outputs = described(file.parent, [file])
        write_record(file.parent / "manifest.json", Manifest("x", {"a": "b"}, outputs, 1.0, 1.0, 1, "2026-01-01", {}))
        complete(file)
        read = complete
    ATTACKS[attack](file, artifact)
    with pytest.raises(UserError) as refused:
        read(file)
    folder = {"adapter": "stage", "adapter's settings": "stage", "checkpoint": "step_00000004"}.get(artifact, file.name)
    assert folder in str(refused.value)
    assert not (tmp_path / "code-ran").exists()


def test_an_adapter_of_another_depth_is_refused(tmp_path):
    adapter(tmp_path / "adapter_model.safetensors")
    for depth, says in ((2, "0 tensors are missing and 4 have no place"), (6, "4 tensors are missing and 0 have no")):
        with pytest.raises(UserError, match=rf"{tmp_path} is an adapter of another model: {says}"):
            load_adapter(tiny_model(num_hidden_layers=depth), tmp_path)


def test_an_adapter_that_is_a_pickle_is_read_as_data_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter(tmp_path / "adapter_model.safetensors")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    load_adapter(tiny_model(), tmp_path)
    torch.save(tensors | {"more": Runs()}, tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match=rf"{tmp_path} is no adapter that this model can take \(UnpicklingError"):
        load_adapter(tiny_model(), tmp_path)
    assert not (tmp_path / "code-ran").exists()
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match=r"holds no adapter_model.safetensors; run the finetune stage again"):
        load_adapter(tiny_model(), tmp_path)


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
