"""An exported policy loads without us and gives the hooked logits; what cannot be exported exactly is refused."""

import json
import runpy
import sys

import pytest
import torch
from families import FAMILIES, family_model
from peft import PeftModel
from projections import WIDTH, four_sites, operator, per_head, site
from safetensors.torch import load_file, save_file
from tiny import save_tiny_model, tiny_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

from spd_dist.distributed.zero import weights_fingerprint
from spd_dist.errors import ConfigError, DataError
from spd_dist.projection import export, parity
from spd_dist.projection.export import export_adapter, export_folded
from spd_dist.projection.hooks import projected
from spd_dist.projection.operators import SiteMap, as_update, projection_hash
from spd_dist.storage.subspace_file import save_subspace
from spd_dist.types import Certificate, Projection, SiteSubspace, Subspace

TOKENS_BT = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(7))


@pytest.fixture
def base(tmp_path):
    return save_tiny_model(tmp_path / "base")


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS_BT).logits


def load(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def hooked_logits(folder, projection):
    model = load(folder)
    with projected(model, projection):
        return logits(model)


def family_projection(name):
    family = FAMILIES[name]
    sites = [family.site(layer, kind) for layer in family.layers[-2:] for kind in ("key", "value")]
    return Projection({s: operator(s.width // 2, seed=i, width=s.width) for i, s in enumerate(sites)})


def test_a_folded_folder_loads_with_plain_transformers_and_gives_the_hooked_logits(base, tmp_path):
    exported = export_folded(base, four_sites(), tmp_path / "out")
    assert_close(logits(load(tmp_path / "out")), hooked_logits(base, four_sites()), atol=3e-6, rtol=0)
    assert exported.parity.error < 1e-5 < exported.parity.effect
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a").input_ids
    record = json.loads((tmp_path / "out" / "spd_fold.json").read_text())
    assert record["projection_sha256"] == projection_hash(four_sites())
    assert record["definition"] == "linear_output"
    assert [slot["module"] for slot in record["slots"]] == [s.module for s in sorted(four_sites().operators)]


def test_only_the_touched_tensors_of_the_touched_shards_are_rewritten(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base", max_shard_size="20KB")
    files = sorted(path.name for path in (tmp_path / "base").glob("*.safetensors"))
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"weights that are not folded")
    exported = export_folded(tmp_path / "base", four_sites(), tmp_path / "out")
    changed, linked = set(), 0
    for file in files:
        before, after = load_file(tmp_path / "base" / file), load_file(tmp_path / "out" / file)
        changed |= {name for name in before if not torch.equal(before[name], after[name])}
        linked += (tmp_path / "base" / file).stat().st_ino == (tmp_path / "out" / file).stat().st_ino
    assert changed == set(exported.tensors) == {f"{s.module}.weight" for s in four_sites().operators}
    assert 0 < linked < len(files)
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


@pytest.mark.parametrize("name", ["qwen2", "phi3", "gpt2", "gpt_neox", "deepseek_v3", "falcon"])
def test_every_storage_of_keys_and_values_is_folded(name, tmp_path):
    family_model(name).save_pretrained(tmp_path / "base")
    exported = export_folded(tmp_path / "base", family_projection(name), tmp_path / "out")
    assert exported.parity.error < 5e-6
    assert exported.parity.effect > 0.1


def test_bf16_weights_are_rounded_once(tmp_path):
    tiny_model().bfloat16().save_pretrained(tmp_path / "base")
    exported = export_folded(tmp_path / "base", four_sites(), tmp_path / "out")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("base", "out"))
    place, op = next(iter(four_sites().operators.items()))
    exact = SiteMap(op)(before[f"{place.module}.weight"].double().T).T
    assert torch.equal(after[f"{place.module}.weight"], exact.bfloat16())
    assert 0 < exported.parity.error < 0.1 * exported.parity.effect


def test_a_checkpoint_without_the_model_prefix_is_folded(tmp_path):
    family_model("gpt2").save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    save_file(
        {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"}
    )
    exported = export_folded(tmp_path / "base", family_projection("gpt2"), tmp_path / "out")
    assert exported.tensors[0] == "h.2.attn.c_attn.weight"


@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rank", [0, 5, WIDTH])
def test_an_update_is_the_same_operator(rank, keep):
    op = operator(rank, keep, weight=1.0 - keep if keep != 1 else -1.0)
    update = as_update(op)
    z = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert update.keep == 1
    assert update.weight_R.numel() == (rank if keep == 1 else WIDTH - rank)
    assert_close(SiteMap(update)(z), SiteMap(op)(z), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_an_adapter_loads_with_peft_and_gives_the_hooked_logits(name, tmp_path):
    family_model(name).save_pretrained(tmp_path / "base")
    projection = family_projection(name)
    exported = export_adapter(tmp_path / "base", projection, tmp_path / "out")
    adapted = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "out")
    assert_close(logits(adapted), hooked_logits(tmp_path / "base", projection), atol=5e-6, rtol=0)
    assert exported.parity.error < 1e-5


def test_adapters_of_blended_and_per_head_operators(base, tmp_path):
    blend = Projection({site(): operator(keep=0.25, weight=0.75), site(3): operator(2, seed=1)})
    heads = Projection({site(): per_head()}, insertion="head")
    for name, projection in {"blend": blend, "heads": heads}.items():
        assert export_adapter(base, projection, tmp_path / name).parity.error < 1e-5


def test_adapters_that_would_not_be_exact_are_refused(tmp_path, base):
    for name, message in {"qwen2": "has a bias", "deepseek_v3": "engines absorb"}.items():
        family_model(name).save_pretrained(tmp_path / name)
        with pytest.raises(ConfigError, match=message):
            export_adapter(tmp_path / name, family_projection(name), tmp_path / "out")
    identity = Projection({site(): operator(0, keep=1.0)})
    with pytest.raises(ConfigError, match="changes 0 directions"):
        export_adapter(base, identity, tmp_path / "out")
    wide = save_tiny_model(tmp_path / "wide", num_key_value_heads=4, head_dim=144, num_hidden_layers=3)
    place = site()
    place = type(place)(2, "key", place.module, ((0, 576),), 4)
    with pytest.raises(ConfigError, match=r"changes 574 directions.*1 to 512"):
        export_adapter(wide, Projection({place: operator(2, width=576)}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_fold_that_would_not_be_exact_is_refused(base, tmp_path):
    with pytest.raises(ConfigError, match="turn with the position"):
        export_folded(base, four_sites(insertion="rope"), tmp_path / "out")


def test_a_folded_folder_is_not_folded_again(base, tmp_path):
    export_folded(base, four_sites(), tmp_path / "out", check=False)
    with pytest.raises(DataError, match="is folded already"):
        export_folded(tmp_path / "out", four_sites(), tmp_path / "again")


def test_quantised_or_renamed_weights_are_refused(base, tmp_path):
    file, name = base / "model.safetensors", f"{site().module}.weight"
    tensors = load_file(file)
    save_file(tensors | {name: torch.zeros(WIDTH, 16, dtype=torch.uint8)}, file, {"format": "pt"})
    with pytest.raises(DataError, match=r"is U8: quantised weights"):
        export_folded(base, four_sites(), tmp_path / "out")
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file, {"format": "pt"})
    with pytest.raises(DataError, match=r"k_proj\.weight must be \(16, 32\) and is missing"):
        export_folded(base, four_sites(), tmp_path / "out")
    save_file(tensors | {f"draft.{name}": tensors[name] * 1}, file, {"format": "pt"})
    export_folded(base, four_sites(), tmp_path / "exact name", check=False)
    tensors[f"extra.{name}"] = tensors.pop(name) * 1
    save_file(tensors | {f"draft.{name}": tensors[f"extra.{name}"] * 1}, file, {"format": "pt"})
    with pytest.raises(DataError, match="could be draft"):
        export_folded(base, four_sites(), tmp_path / "out")


def test_folders_that_are_no_checkpoint_are_refused(base, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds neither"):
        export_folded(tmp_path / "empty", four_sites(), tmp_path / "out")
    whole = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(whole[:40])
    with pytest.raises(DataError, match="header is longer than the file"):
        export_folded(base, four_sites(), tmp_path / "out")
    for header in (b"[]", b'{"a": 3}', b'{"a": {"dtype": "F32", "shape": 3, "data_offsets": [0, 4]}}', b'{"a":' * 3000):
        (base / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(DataError, match=r"model\.safetensors cannot be read"):
            export_folded(base, four_sites(), tmp_path / "out")
    (base / "model.safetensors").write_bytes(whole)
    for index, says in {
        "{": "is no index of weights: JSONDecodeError",
        '{"weight_map": 3}': "is no index of weights: AttributeError",
        '{"weight_map": {"a": "../model.safetensors"}}': "names '../model.safetensors', and weights lie beside",
    }.items():
        (base / "model.safetensors.index.json").write_text(index)
        with pytest.raises(DataError, match=says):
            export_folded(base, four_sites(), tmp_path / "out")
    (base / "model.safetensors.index.json").unlink()
    (base / "config.json").write_text("{}")
    with pytest.raises(DataError, match="does not describe a causal LM"):
        export_folded(base, four_sites(), tmp_path / "out")


def test_a_folder_is_never_written_over_and_a_failed_export_leaves_none(base, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    with pytest.raises(ConfigError, match=r"--out .* exists"):
        export_folded(base, four_sites(), tmp_path / "out")
    monkeypatch.setattr(export, "fold_", lambda *_: None)  # a fold that does nothing must be found out
    with pytest.raises(DataError, match="differs from the hooked one"):
        export_folded(base, four_sites(), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / ".new.partial").exists()
    assert parity.PROMPTS > 1


@pytest.mark.parametrize("form", ["folded", "adapter"])
def test_the_launcher_exports_a_run(form, base, tmp_path, monkeypatch, capsys):
    main = runpy.run_path("spd_dist/launch/export_policy.py")["main"]
    sites = {
        place: SiteSubspace(op.factor_DR, torch.arange(WIDTH, 0, -1).double(), 0.9, Certificate())
        for place, op in four_sites().operators.items()
    }
    run = tmp_path / "run"
    fingerprint = weights_fingerprint(tiny_model().bfloat16())  # the run was on a GPU
    save_subspace(run / "project" / "subspace.safetensors", Subspace(sites, {"base_fingerprint": fingerprint}))
    words = ["export.py", run, "--base", base, "--out", tmp_path / "out", "--form", form, "project.kinds=value"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    assert main() == 0
    assert "logits differ from the hooked policy's by" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "spd_fold.json").read_text())
    assert {slot["kind"] for slot in record["slots"]} == {"value"}
    assert main() == 2
    assert "exists" in capsys.readouterr().err
    save_tiny_model(base, seed=1)
    assert main() == 3
    assert "does not hold the weights that the subspace was computed on" in capsys.readouterr().err
