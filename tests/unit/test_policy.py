"""Names of models, and a fingerprint that sees every bit."""

import pytest
import torch
from tiny import tiny_model

from spd_dist.config import Distributed
from spd_dist.distributed.zero import merge_settings, sharding_settings, weights_fingerprint
from spd_dist.errors import ConfigError, DataError
from spd_dist.models.gguf import find_gguf
from spd_dist.models.policy import resolve_dtype


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
