"""Mixtures of experts through the whole method, sharded over two ranks, with adapters in their experts."""

import importlib.util

import pytest
from families import save_family
from launching import SMALL, launch
from tiny import save_tiny_model

from spd_dist.storage.artifacts import read_json, read_jsonl
from spd_dist.storage.subspace_file import load_subspace

EXPERTS = [
    "finetune.lora_targets=[q_proj,v_proj]", "finetune.lora_parameters=[experts.gate_up_proj,experts.down_proj]",
    "finetune.lora_dropout=0", "finetune.num_epochs=1", "evaluate.arms=[base,spd]",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_a_mixture_is_calibrated_completed_trained_and_evaluated(tmp_path, name):
    model, run = save_family(name, tmp_path / "model"), tmp_path / "run"
    words = [*SMALL, *EXPERTS, f"model.name={model}", f"run_dir={run}", "data.task=arithmetic"]
    words += ["model.attention=eager"] if name == "gpt_oss" else []
    output = launch(2, words, tmp_path / "log")
    assert load_subspace(run / "project" / "subspace.safetensors").sites
    settings = read_json(run / "finetune" / "adapter" / "adapter_config.json")
    assert sorted(settings["target_parameters"]) == ["experts.down_proj", "experts.gate_up_proj"]
    assert len(read_jsonl(run / "evaluate" / "spd" / "arithmetic.jsonl")) == 6
    routed = {arm: read_json(run / "report.json")["stages"][f"evaluate/{arm}"]["routers"] for arm in ("base", "spd")}
    assert routed["base"]["num_routed"] == routed["spd"]["num_routed"] > 0, "of the same texts"
    assert (routed["base"]["moved"], routed["base"]["num_layers"]) == (0, 4)
    assert routed["spd"]["shares"] != routed["base"]["shares"], "the student routes otherwise"
    assert "Routers on the prompts: base" in " ".join(output.split())
    assert "<h2>Routers</h2>" in (run / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="the extra quantized is not installed")
def test_a_policy_of_4_bits_goes_through_the_whole_method(tmp_path):
    run, widths = tmp_path / "run", {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    model = save_tiny_model(tmp_path / "model", **widths)
    words = [*SMALL, f"model.name={model}", f"run_dir={run}", "data.task=arithmetic", "evaluate.arms=[base,spd]"]
    words += ["model.quantization=nf4", "finetune.lora_init=pissa"]
    output = launch(2, words, tmp_path / "refused", code=2)
    assert "model.quantization: nf4 is not valid with distributed.zero_stage=3" in output
    launch(2, [*words, "distributed.zero_stage=2"], tmp_path / "log")
    assert load_subspace(run / "project" / "subspace.safetensors").sites
    assert len(read_jsonl(run / "evaluate" / "spd" / "arithmetic.jsonl")) == 6


def test_experts_that_no_adapter_reaches_end_the_run_before_a_model_is_loaded(tmp_path):
    model = save_family("qwen3_moe", tmp_path / "model")
    for file in model.glob("*.safetensors"):
        file.unlink()  # weights are not even looked for
    words = [*SMALL, f"model.name={model}", f"run_dir={tmp_path / 'run'}", "data.task=arithmetic"]
    output = launch(1, [*words, "finetune.lora_targets=[all-linear]"], tmp_path / "log", code=2)
    assert "error: finetune.lora_targets: ['all-linear'] would get no adapter in the experts of this model" in output
    assert "set finetune.lora_parameters=[experts.down_proj,experts.gate_up_proj]" in output
