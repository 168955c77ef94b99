"""Each way to begin an adapter leaves the model as it is, is peft's own, and is saved as an adapter of that model."""

import dataclasses
import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig, EvaConfig
from peft.tuners.lora.eva import initialize_lora_eva_weights
from tiny import tiny_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from spd_dist.config import Finetune
from spd_dist.distributed.world import World
from spd_dist.distributed.zero import weights_fingerprint
from spd_dist.errors import ConfigError, DataError
from spd_dist.models.kv_sites import discover_sites
from spd_dist.models.lora import (
    adapted_modules,
    adapter_parameters,
    add_adapters,
    base_model,
    check_subspace,
    key_dropout,
    merged_tensors,
    reads_inputs,
    remove_adapters,
    save_adapter,
    saved_parameters,
    summing_inputs,
)
from spd_dist.models.lora.adapters import ADAPTER, TAKEN_OFF, lora_layers
from spd_dist.models.lora.initial_values import begin_in_subspace_
from spd_dist.models.save_weights import save_model, whole_tensors
from spd_dist.types import Certificate, KVSite, SiteSubspace, Subspace

ALONE = World(0, 1, torch.device("cpu"))
TOKENS = torch.arange(3, 30)[None]
READ = [torch.arange(3 + 5 * start, 40 + 7 * start)[None] for start in range(6)]
"""What `eva` and `corda` look at."""
ALL = ["gaussian", "orthogonal", "eva", "olora", "pissa", "corda"]


def adapted_model(
    init: str, read: Sequence[torch.Tensor] = READ, **changes: object
) -> tuple[torch.nn.Module, PeftModel]:
    model, config = tiny_model(), dataclasses.replace(Finetune(lora_init=init, lora_rank=4), **changes)
    inputs = None
    if reads_inputs(config):
        with summing_inputs(adapted_modules(model, config), scaled=init == "corda") as inputs, torch.no_grad():
            for tokens in read:
                model(tokens, use_cache=False)
    return model, add_adapters(model, config, generator=torch.Generator().manual_seed(0), inputs=inputs)


def peft_model(init: str, **settings: object) -> PeftModel:
    """The same by peft alone."""
    model = tiny_model()
    config = LoraConfig(
        r=4, lora_alpha=8.0, target_modules=list(Finetune().lora_targets), task_type="CAUSAL_LM",
        init_lora_weights=init, **settings,
    )  # fmt: skip

    def run() -> None:
        with torch.no_grad():
            for tokens in READ:
                model(tokens, use_cache=False)

    if init == "corda":
        # Of attrs, which nothing here needs, peft takes the decorator that it has of the standard library's.
        sys.modules.setdefault("attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))
        from peft.tuners.lora.corda import preprocess_corda

        preprocess_corda(model, config, run_model=run)
    adapted = get_peft_model(model, config)
    if init == "eva":
        batches = [{"input_ids": READ[-1], "attention_mask": torch.ones_like(READ[-1])}]
        initialize_lora_eva_weights(adapted, batches, gather_distributed_inputs=False, show_progress_bar=False)
    return adapted


def train_a_little(adapted: PeftModel) -> None:
    """The same step for ours and for peft's own, whose parameters have the same names."""
    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(adapter_parameters(adapted).items())):
            draw = torch.Generator().manual_seed(number)
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))


@pytest.mark.parametrize("variant", ["lora", "rslora"])
@pytest.mark.parametrize("init", [*ALL, "pissa by iterations"])
def test_the_untouched_base_and_the_saved_adapter_are_the_student(tmp_path, init, variant):
    iterations = {"lora_init_iterations": 8} if " " in init else {}
    model, adapted = adapted_model(init.split()[0], lora_variant=variant, **iterations)
    key_dropout(adapted)
    base = tiny_model()
    torch.testing.assert_close(model.eval()(TOKENS).logits, base(TOKENS).logits, atol=1e-4, rtol=1e-4)
    assert len(adapter_parameters(adapted)) == 4 * 4 * 2, "what is taken off is not trained"
    train_a_little(adapted)
    expected = model(TOKENS).logits
    assert (expected - base(TOKENS).logits).abs().max() > 0.1
    save_adapter(adapted, dict(whole_tensors(saved_parameters(adapted))), tmp_path / "adapter")
    save_model(model, merged_tensors(adapted), tmp_path / "model", world=ALONE)
    plain = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter").eval()
    torch.testing.assert_close(plain(TOKENS).logits, expected, atol=1e-4, rtol=1e-4)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(merged(TOKENS).logits, expected, atol=1e-4, rtol=1e-4)
    remove_adapters(adapted)
    assert weights_fingerprint(model) == weights_fingerprint(base)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["r"] == Finetune(lora_init=init.split()[0], lora_rank=4).adapter_rank
    assert settings["init_lora_weights"] is True, "whoever loads it computes nothing"


@pytest.mark.parametrize("init", ["olora", "pissa", "corda"])
def test_the_part_taken_off_is_the_one_that_peft_takes_off(init):
    """Factors have signs of their own; their product has none."""
    more = {"corda_config": CordaConfig()} if init == "corda" else {}
    theirs, (_, ours) = dict(lora_layers(peft_model(init, **more))), adapted_model(init)
    for name, layer in lora_layers(ours):
        own, other = (
            layer.scaling[ADAPTER] * one.lora_B[ADAPTER].weight @ one.lora_A[ADAPTER].weight
            for one in (layer, theirs[name])
        )
        torch.testing.assert_close(own, other, atol=1e-4 * own.abs().max().item(), rtol=1e-3)
        norms = [one.lora_A[ADAPTER].weight.norm().item() for one in (layer, theirs[name])]
        assert norms[0] == pytest.approx(norms[1], rel=1e-3), "and is split into factors alike"


@pytest.mark.filterwarnings("ignore:.*changes the base weights")  # peft, of its own initial adapter
@pytest.mark.parametrize("init", ["olora", "pissa"])
def test_what_is_saved_is_what_peft_converts_to(tmp_path, init):
    """`path_initial_model_for_weight_conversion` gives the same adapter of the same logits."""
    theirs = peft_model(init)
    theirs.save_pretrained(tmp_path / "initial")
    train_a_little(theirs)
    theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    _, ours = adapted_model(init)
    with torch.no_grad():  # begin with peft's factors: those of a singular vector may have the other sign
        for name, layer in lora_layers(ours):
            initial = dict(lora_layers(peft_model(init)))[name]
            for kind in ("lora_A", "lora_B"):
                value = getattr(initial, kind)[ADAPTER].weight
                getattr(layer, kind)[ADAPTER].weight.copy_(value)
                getattr(layer, kind)[TAKEN_OFF].weight.copy_(-value if kind == "lora_B" else value)
    train_a_little(ours)
    save_adapter(ours, dict(whole_tensors(saved_parameters(ours))), tmp_path / "ours")
    found = [
        PeftModel.from_pretrained(tiny_model(), tmp_path / one).eval()(TOKENS).logits for one in ("ours", "theirs")
    ]
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage=False")
def test_eva_begins_in_the_directions_of_largest_variance_as_peft_does():
    theirs = dict(lora_layers(peft_model("eva", eva_config=EvaConfig(rho=1.0))))
    _, ours = adapted_model("eva", READ[-1:])  # of several batches, peft keeps four directions each
    for name, layer in lora_layers(ours):
        own, other = (torch.linalg.qr(one.lora_A[ADAPTER].weight.T).Q for one in (layer, theirs[name]))
        cosines = torch.linalg.svdvals(own.T @ other)
        assert cosines.min() > 0.95, (name, cosines)  # theirs is of low rank
        assert not layer.lora_B[ADAPTER].weight.any()


def test_modules_with_one_input_share_its_sums():
    model = tiny_model()
    modules = adapted_modules(model, Finetune())
    with summing_inputs(modules, scaled=False) as sums, torch.no_grad():
        model(READ[0], use_cache=False)
        model(READ[1], use_cache=False)
    of_layer = {name.rpartition(".")[2]: one for name, one in sums.items() if ".layers.1." in name}
    assert of_layer["q_proj"] is of_layer["k_proj"] is of_layer["v_proj"] is not of_layer["o_proj"]
    assert of_layer["q_proj"].num_rows == READ[0].numel() + READ[1].numel()
    assert of_layer["q_proj"].num_calls == 2


def test_inputs_that_are_not_finite_are_an_error():
    model, config = tiny_model(), Finetune(lora_init="eva", lora_rank=4)
    with summing_inputs(adapted_modules(model, config), scaled=False) as sums, torch.no_grad():
        model(READ[0], use_cache=False)
    next(iter(sums.values())).moment_II[0, 0] = torch.nan
    with pytest.raises(DataError, match=r"finetune\.lora_init: a module's inputs are not finite; set .*=default"):
        add_adapters(model, config, generator=torch.Generator(), inputs=sums)


def test_a_rank_that_a_weight_has_not_is_an_error():
    with pytest.raises(ConfigError, match=r"finetune\.lora_rank: 17 .*lora_init=pissa, since .*k_proj has no more than "
                       r"16 directions; set finetune\.lora_rank=16 or"):  # fmt: skip
        add_adapters(tiny_model(), Finetune(lora_init="pissa", lora_rank=17), generator=torch.Generator())


@pytest.mark.parametrize(("targets", "expected"), [
    (("q_proj",), 4),
    (("all-linear",), 4 * 7),
    ((r"regex:.*layers\.[01]\.self_attn\.[qv]_proj",), 4),
    ((r"regex:.*layers\.0\..*", "o_proj"), 7 + 3),
    (("layers.1.mlp.down_proj",), 1),
])  # fmt: skip
def test_targets_are_names_patterns_or_all_linear_modules(tmp_path, targets, expected):
    model = tiny_model()
    adapted = add_adapters(model, Finetune(lora_targets=targets), generator=torch.Generator().manual_seed(0))
    assert len(lora_layers(adapted)) == expected
    assert not any("lm_head" in name for name in adapter_parameters(adapted))
    train_a_little(adapted)
    save_adapter(adapted, dict(whole_tensors(saved_parameters(adapted))), tmp_path)
    plain = PeftModel.from_pretrained(tiny_model(), Path(tmp_path)).eval()
    torch.testing.assert_close(plain(TOKENS).logits, model.eval()(TOKENS).logits)


@pytest.mark.parametrize(("target", "message"), [
    ("regex:layers[", r"'regex:layers\[' is not valid, .*; write a regular expression of whole names"),
    ("regex:nothing", r"\['regex:nothing'\] are no linear modules of this model, which has \['down_proj'"),
])  # fmt: skip
def test_a_pattern_that_means_nothing_is_an_error(target, message):
    with pytest.raises(ConfigError, match=rf"finetune\.lora_targets: {message}"):
        add_adapters(tiny_model(), Finetune(lora_targets=(target,)), generator=torch.Generator())


@pytest.mark.parametrize("target", ["all-linear", r"regex:.*self_attn\.[qv]_proj"])
def test_a_part_is_taken_off_modules_that_a_pattern_chose(tmp_path, target):
    """Adapters are linear modules, too, and must not get adapters of their own."""
    model, adapted = adapted_model("pissa", lora_targets=(target,))
    torch.testing.assert_close(model.eval()(TOKENS).logits, tiny_model()(TOKENS).logits, atol=1e-4, rtol=1e-4)
    train_a_little(adapted)
    expected = model(TOKENS).logits
    save_adapter(adapted, dict(whole_tensors(saved_parameters(adapted))), tmp_path / "adapter")
    plain = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter").eval()
    torch.testing.assert_close(plain(TOKENS).logits, expected, atol=1e-4, rtol=1e-4)


def _subspace(model, rank=8):
    sites = [site for site in discover_sites(model) if site.layer == 2]
    generator = torch.Generator().manual_seed(3)
    parts = {}
    for site in sites:
        basis_DR, _ = torch.linalg.qr(torch.randn(site.width, rank, generator=generator))
        parts[site] = SiteSubspace(basis_DR, torch.ones(site.width).double(), 0.5, Certificate())
    return Subspace(parts)


def test_adapters_begin_in_the_subspace_where_it_is_of_their_module():
    model, config = tiny_model(), Finetune(lora_init="spd", lora_rank=4)
    subspace = _subspace(model)
    adapted = add_adapters(model, config, generator=torch.Generator().manual_seed(0), start=subspace)
    of_module = {site.module: part.basis_DR for site, part in subspace.sites.items()}
    seen = set()
    for name, layer in lora_layers(base_model(adapted)):
        down_RI, up_OR = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if name in of_module:
            assert_close(up_OR.detach(), of_module[name][:, :4])
            assert not down_RI.any()
            seen.add(name)
        else:
            assert down_RI.any()
            assert not up_OR.any()
    assert seen == of_module.keys()


def test_keys_and_values_of_one_module_take_turns():
    site = KVSite(0, "key", "qkv", ((4, 8),))
    other = dataclasses.replace(site, kind="value", columns=((8, 12),))
    basis_DR = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0))).Q
    part = SiteSubspace(basis_DR, torch.ones(4).double(), 1.0, Certificate())
    up_OR = torch.ones(12, 3)
    begin_in_subspace_(up_OR, {other: part, site: part})
    assert_close(up_OR[4:8, 0::2], basis_DR[:, :2])
    assert_close(up_OR[8:12, 1:2], basis_DR[:, :1])
    assert up_OR.count_nonzero() == 4 * 3


def test_a_subspace_that_no_adapter_could_begin_in_is_refused():
    model = tiny_model()
    subspace, names = _subspace(model), ["model.layers.2.self_attn.k_proj", "model.layers.2.self_attn.v_proj"]
    check_subspace(subspace, names, Finetune(lora_init="spd", lora_rank=8))
    with pytest.raises(ConfigError, match=r"finetune\.lora_init: spd is not valid .* add k_proj or v_proj, or set"):
        check_subspace(subspace, ["model.layers.2.self_attn.q_proj"], Finetune(lora_init="spd"))
    with pytest.raises(ConfigError, match=r"finetune\.lora_rank: 9 .* 8 directions .* set finetune\.lora_rank=8"):
        check_subspace(subspace, names, Finetune(lora_init="spd", lora_rank=9))
