"""Names of models, and a fingerprint that sees every bit."""

import json
import os
from pathlib import Path

import pytest
import torch
from tiny import save_tiny_model, tiny_model

from spd_dist.config import Distributed, Model
from spd_dist.distributed.world import World
from spd_dist.distributed.zero import merge_settings, sharding_settings, weights_fingerprint
from spd_dist.errors import ConfigError, DataError
from spd_dist.models.gguf import find_gguf
from spd_dist.models.policy import load_policy, resolve_dtype


def test_the_fingerprint_sees_one_changed_bit_a_swap_and_a_dtype():
    model = tiny_model()
    before = weights_fingerprint(model)
    assert weights_fingerprint(tiny_model()) == before
    assert weights_fingerprint(tiny_model(seed=1)) != before
    weight = model.model.layers[1].self_attn.k_proj.weight.data
    weight.view(torch.int32)[3, 4] ^= 1
    assert weights_fingerprint(model) != before
    weight.view(torch.int32)[3, 4] ^= 1
    weight[0, [0, 1]] = weight[0, [1, 0]]
    assert weights_fingerprint(model) != before
    weight[0, [0, 1]] = weight[0, [1, 0]]
    assert weights_fingerprint(model) == before
    assert weights_fingerprint(model.bfloat16()) != before


class Runs:
    """Unpickled, it makes a folder."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("code-ran",)


def weights_as_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Runs()}, folder / "pytorch_model.bin")


def code_beside_it(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"auto_map": {"AutoConfig": "evil.A", "AutoModelForCausalLM": "evil.B"}, "model_type": "evil"}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "evil.py").write_text("import os\nos.mkdir('code-ran')\n")


HOSTILE = {
    "a tokenizer of nothing": lambda folder: (folder / "tokenizer.json").write_text("{}"),
    "a tokenizer that is no text": lambda folder: (folder / "tokenizer.json").write_bytes(b"\xff\xfe"),
    "settings that are a list": lambda folder: (folder / "config.json").write_text("[]"),
    "settings that are deep": lambda folder: (folder / "config.json").write_text('{"a":' * 5000),
    "weights that are cut": lambda folder: os.truncate(folder / "model.safetensors", 1000),
    "weights with a huge header": lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 100),
    "an end that is no number": lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": "x"}'),
    "weights as a pickle": weights_as_a_pickle,
    "code beside it": code_beside_it,
}


@pytest.mark.parametrize("spoil", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_model_folder_is_named_in_a_line_and_runs_nothing(tmp_path, monkeypatch, spoil):
    monkeypatch.chdir(tmp_path)
    folder = save_tiny_model(tmp_path / "model")
    spoil(folder)
    with pytest.raises(DataError, match=r"^model\.name: [^\n]*$"):
        load_policy(Model(str(folder)), Distributed(zero_stage=0), World(0, 1, torch.device("cpu")))
    assert not (tmp_path / "code-ran").exists()


def test_only_gguf_names_are_taken_for_gguf(tmp_path):
    assert find_gguf("HuggingFaceTB/SmolLM2-135M-Instruct") is None
    assert find_gguf(str(tmp_path)) is None
    (tmp_path / "model.gguf").touch()
    assert find_gguf(str(tmp_path / "model.gguf")) == tmp_path / "model.gguf"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere/model.gguf", r"model\.name: nowhere/model\.gguf is no file; give the path"),
        ("package:no_such_package", r"package:no_such_package is not installed; pip install"),
        ("package:pytest", r"package:pytest holds no \.gguf file"),
    ],
)
def test_a_missing_gguf_is_named_with_its_remedy(name, message):
    with pytest.raises(DataError, match=message):
        find_gguf(name)


def test_auto_dtype_is_half_only_on_an_accelerator():
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda", 0)) == torch.bfloat16
    assert resolve_dtype("float16", torch.device("cpu")) == torch.float16


def test_users_deepspeed_settings_join_ours_and_conflicts_are_named():
    users = {"zero_optimization": {"sub_group_size": 5}}
    assert sharding_settings(Distributed(deepspeed=users), torch.float32)["zero_optimization"] == {
        "stage": 3,
        "sub_group_size": 5,
    }
    with pytest.raises(
        ConfigError, match=r"distributed\.deepspeed\.zero_optimization\.stage: 2 conflicts with 3, which spd_dist sets"
    ):
        merge_settings({"zero_optimization": {"stage": 3}}, {"zero_optimization": {"stage": 2}})
