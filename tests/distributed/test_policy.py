"""A policy loads the same whole and sharded, at every world size, and a replica comes and goes without a trace."""

import dataclasses
import gc
import threading
import weakref
from pathlib import Path

import pytest
import torch
from generating import ALONE
from peft import LoraConfig, PeftModel, get_peft_model
from ranks import run_on_ranks
from tiny import save_tiny_model, tiny_model
from transformers import AutoModelForCausalLM

from spd_dist.config import Config, Distributed, Evaluate, Model
from spd_dist.distributed.collectives import any_rank, gather_objects
from spd_dist.distributed.world import join_world
from spd_dist.distributed.zero import full_replica, gathered, is_sharded, weights_fingerprint
from spd_dist.errors import DataError
from spd_dist.inference.decode import decode
from spd_dist.inference.hf_engines import ContinuousBatchingEngine
from spd_dist.inference.placement import load_to_answer, placed, will_be_whole
from spd_dist.inference.requests import Decoded, DecodeSettings, Request
from spd_dist.inference.sampling import Sampling
from spd_dist.models.lora import check_kept, load_adapter, merged_tensors
from spd_dist.models.policy import Policy, load_adapted, load_model, load_policy, load_replica

TOKENS = torch.arange(3, 40)[None]
SMALL_SHARDS = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


@torch.no_grad()
def check_sharded_equals_whole(folder: Path) -> None:
    world = join_world(Distributed())
    expected = tiny_model()(TOKENS).logits
    whole = load_policy(Model(name=str(folder)), Distributed(zero_stage=0), world)
    sharded = load_policy(Model(name=str(folder)), Distributed(deepspeed=SMALL_SHARDS), world)
    assert is_sharded(sharded.model)
    assert not is_sharded(whole.model)
    assert sharded.fingerprint == whole.fingerprint == weights_fingerprint(tiny_model())
    assert len(set(gather_objects(sharded.fingerprint))) == 1
    torch.testing.assert_close(whole.model(TOKENS).logits, expected)
    torch.testing.assert_close(sharded.model(TOKENS).logits, expected)
    with gathered(sharded.model.lm_head.parameters()):
        assert torch.equal(sharded.model.lm_head.weight, whole.model.lm_head.weight)
    check_replica(sharded, expected, world.rank)
    assert weights_fingerprint(sharded.model) == whole.fingerprint
    sharded.release()
    assert sharded.engine is None
    model = weakref.ref(sharded.model)
    del sharded
    gc.collect()
    assert model() is None, "DeepSpeed holds nothing of a model whose engine has ended"


def check_replica(sharded, expected, rank) -> None:
    for _ in range(2):
        with full_replica(sharded.engine, sharded.model) as replica:
            for _ in range(1 + 2 * rank):  # ranks may call it a different number of times
                torch.testing.assert_close(replica(TOKENS).logits, expected)
        torch.testing.assert_close(sharded.model(TOKENS).logits, expected)
    with pytest.raises(KeyError), full_replica(sharded.engine, sharded.model):
        raise KeyError
    torch.testing.assert_close(sharded.model(TOKENS).logits, expected)
    assert all(parameter.numel() == 0 for parameter in sharded.model.parameters()), "nothing stays gathered"


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind."""
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) * 1024


def most_on_the_host(folder: Path, device: str, dtype: torch.dtype) -> int:
    """While a model is loaded for a device, and once it is there."""
    before, found, has_ended = anonymous_bytes(), [], threading.Event()

    def watch() -> None:
        while not has_ended.wait(0.002):
            found.append(anonymous_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_model(Model(name=str(folder)), str(folder), {"dtype": dtype}, torch.device(device))
    found.append(anonymous_bytes() - before)
    has_ended.set()
    watcher.join()
    assert {parameter.device.type for parameter in model.parameters()} == {device}
    return max(found)


def check_memory_of_the_host(folder: Path, num_bytes: int) -> None:
    few = num_bytes // 8
    assert most_on_the_host(folder, "cpu", torch.float32) < few, "what the file holds as it is wanted is mapped"
    assert most_on_the_host(folder, "cpu", torch.bfloat16) > 3 * few, "half of it, in another form"
    for dtype in (torch.float32, torch.bfloat16):
        assert most_on_the_host(folder, "meta", dtype) < few, "each tensor goes to the device as it is read"


def test_a_host_never_holds_a_model_that_is_loaded_for_an_accelerator(tmp_path):
    model = tiny_model(hidden_size=1024, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8)
    model.save_pretrained(tmp_path / "model", max_shard_size="50MB")
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    del model
    run_on_ranks(1, tmp_path / "store", check_memory_of_the_host, tmp_path / "model", num_bytes)


def check_a_missing_model_fails_on_every_rank(folder: Path) -> None:
    world = join_world(Distributed())
    with pytest.raises(DataError, match=r"model\.name: .*nowhere is no folder here, not whole"):
        load_policy(Model(name=str(folder / "nowhere")), Distributed(), world)
    assert not any_rank(False)


@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow), 4])
def test_a_sharded_policy_equals_a_whole_one(world_size, tmp_path):
    save_tiny_model(tmp_path / "model")
    run_on_ranks(world_size, tmp_path / "store", check_sharded_equals_whole, tmp_path / "model")


def test_a_missing_model_fails_on_every_rank(tmp_path):
    run_on_ranks(2, tmp_path / "store", check_a_missing_model_fails_on_every_rank, tmp_path)


@torch.no_grad()
def check_adapter_is_beside(folder: Path) -> None:
    world = join_world(Distributed())
    torch.manual_seed(0)  # peft draws the adapter's weights from the global generator
    adapted = get_peft_model(
        tiny_model(), LoraConfig(target_modules=["k_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    adapted.save_pretrained(folder / "adapter")
    policy = load_replica(Model(name=str(folder / "model")), Distributed(), world, adapter=folder / "adapter")
    torch.testing.assert_close(policy.model(TOKENS).logits, adapted(TOKENS).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(DataError, match=r"holds no adapter_config\.json; run the finetune stage again"):
        load_replica(Model(name=str(folder / "model")), Distributed(), world, adapter=folder)


@torch.no_grad()
def check_bfloat16_students(folder: Path, adapter: Path) -> None:
    """An update that bfloat16 weights would round away is there, in every placement and engine, as plain peft has it.

    How far a logit may be from plain peft's where the order of sums differs: as far as plain peft is from float32.
    """
    world, model = join_world(Distributed()), Model(name=str(folder), dtype="bfloat16")
    shards = Distributed(deepspeed=SMALL_SHARDS)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).float()
    without, wanted = exact(TOKENS).logits, PeftModel.from_pretrained(exact, adapter).eval()(TOKENS).logits
    rounding = (base(TOKENS).logits.float() - without).norm()
    plain = PeftModel.from_pretrained(base, adapter, autocast_adapter_dtype=False).eval()(TOKENS).logits
    assert (wanted - without).norm() > 0
    for load, distributed in ((load_replica, Distributed()), (load_adapted, shards)):
        found = load(model, distributed, world, adapter=adapter).model(TOKENS).logits
        assert torch.equal(found, plain), load
    assert (plain.float() - wanted).norm() < 2 * rounding, "no farther from float32 than the base model is"
    whole = load_replica(model, Distributed(), world, adapter=adapter)
    paged = logits_of_continuous_batching(whole)
    assert (paged.float() - wanted[0, -1]).norm() < 2 * (plain.float() - wanted)[0, -1].norm()
    assert (paged - plain[0, -1]).norm() < (wanted - without)[0, -1].norm(), "a base without the update is farther off"
    both_engines_choose_what_float32_would_up_to_rounding(whole, exact)


def both_engines_choose_what_float32_would_up_to_rounding(policy: Policy, exact: torch.nn.Module) -> None:
    """Each greedy token's logit in float32 is the largest, up to twice what bfloat16 rounds of a logit there."""
    requests = [Request(f"p{start}", 0, tuple(range(start, start + 9)), 0) for start in range(3, 30, 5)]
    greedy = Sampling(temperature=0.0, max_new_tokens=12)
    settings = DecodeSettings(greedy, frozenset(policy.eos_token_ids), policy.pad_token_id)
    engines = {
        "hf": decode(policy.model, requests, settings, batch_size=4),
        "hf_cb": ContinuousBatchingEngine(policy, batch_size=4, monitor=None).complete(requests, greedy),
    }
    for name, found in engines.items():
        for one in list(found):
            tokens = torch.tensor([[*one.request.tokens, *one.tokens]])
            behind = slice(len(one.request.tokens) - 1, -1)
            rounded_TV, exact_TV = (model(tokens).logits[0, behind].float() for model in (policy.model, exact))
            gap_T = exact_TV.amax(-1) - exact_TV.gather(1, torch.tensor(one.tokens)[:, None])[:, 0]
            assert gap_T.max() <= 2 * (rounded_TV - exact_TV).abs().max(), name


def logits_of_continuous_batching(policy: Policy) -> torch.Tensor:
    """Of the token after `TOKENS`, as `hf_cb` computes it."""
    seen: list[torch.Tensor] = []
    hook = policy.model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output[0, -1]))
    request = Request("p", 0, tuple(TOKENS[0].tolist()), 0)
    engine = ContinuousBatchingEngine(policy, batch_size=1, monitor=None)
    list(engine.complete([request], Sampling(temperature=0.0, max_new_tokens=1)))
    hook.remove()
    return seen[0]


def test_a_bfloat16_student_is_the_same_in_every_placement_and_keeps_its_update(tmp_path):
    folder, adapter = save_tiny_model(tmp_path / "model"), tmp_path / "adapter"
    torch.manual_seed(0)
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules=["k_proj", "v_proj"], init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1e-3)  # as small beside the weights as what a short training leaves
    adapted.save_pretrained(adapter)
    run_on_ranks(2, tmp_path / "store", check_bfloat16_students, folder, adapter)
    policy = load_policy(Model(name=str(folder), dtype="bfloat16"), Distributed(zero_stage=0), ALONE)
    kept: dict[str, float] = {}
    list(merged_tensors(load_adapter(policy.model, adapter), kept))
    with pytest.raises(DataError, match=r"finetune.merge: rounded to bfloat16, model.layers.* keeps .*merge=false"):
        check_kept(kept, torch.bfloat16)


def test_a_replica_carries_its_adapter(tmp_path):
    save_tiny_model(tmp_path / "model")
    run_on_ranks(1, tmp_path / "store", check_adapter_is_beside, tmp_path)


@torch.no_grad()
def check_adapter_beside_shards(folder: Path, adapter: Path) -> None:
    world, shards = join_world(Distributed()), Distributed(deepspeed=SMALL_SHARDS)
    merged = load_replica(Model(name=str(folder)), shards, world, adapter=adapter)
    beside = load_adapted(Model(name=str(folder)), shards, world, adapter=adapter)
    assert is_sharded(beside.model)
    torch.testing.assert_close(beside.model(TOKENS).logits, merged.model(TOKENS).logits)
    decoding = Evaluate(max_new_tokens=4, batch_size=2).decoding()
    with placed(beside, "layerwise", world, "decoding"):
        assert answers(beside) == answers(merged)
    for placement, is_whole in (("auto", True), ("replica", True), ("layerwise", False)):
        wanted = dataclasses.replace(decoding, placement=placement)
        assert will_be_whole(Model(name=str(folder)), shards, wanted, world, 40) == is_whole
    wanted = dataclasses.replace(decoding, batch_size=1 << 40)
    assert not will_be_whole(Model(name=str(folder)), shards, wanted, world, 40)
    assert will_be_whole(Model(name=str(folder)), Distributed(zero_stage=0), wanted, world, 40)
    for placement, is_whole in (("auto", True), ("layerwise", False)):
        evaluate = Evaluate(max_new_tokens=4, batch_size=2, placement=placement)
        config = Config(model=Model(name=str(folder)), distributed=shards, evaluate=evaluate)
        loaded = load_to_answer(config, world, adapter=adapter, longest=36)
        assert is_sharded(loaded.model) != is_whole
        torch.testing.assert_close(loaded.model(TOKENS).logits, merged.model(TOKENS).logits)
    with pytest.raises(DataError, match=r"holds no adapter_config.json; run the finetune stage again"):
        load_adapted(Model(name=str(folder)), shards, world, adapter=folder)


def answers(policy: Policy) -> list[Decoded]:
    greedy = Sampling(temperature=0.0, max_new_tokens=4)
    settings = DecodeSettings(greedy, frozenset(policy.eos_token_ids), policy.pad_token_id)
    return list(decode(policy.model, [Request("p", 0, (3, 4, 5), 0)], settings))


def test_an_adapter_beside_shards_answers_as_the_merged_model(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    adapted = get_peft_model(
        tiny_model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    run_on_ranks(2, tmp_path / "store", check_adapter_beside_shards, folder, tmp_path / "adapter")
