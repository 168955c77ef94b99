import dataclasses
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from tiny import tiny_config

from spd_dist.config import Calibrate, Config, Data, Distributed, Evaluate, Finetune, Generate, Model
from spd_dist.errors import ConfigError
from spd_dist.inference.placement import HEADROOM
from spd_dist.launch.plan_run import main
from spd_dist.planner import Cluster, Workload, device_named, plan_run, profile_of, smallest_cluster
from spd_dist.planner.cluster import Zero
from spd_dist.planner.plan import placements
from spd_dist.planner.seconds import cost
from spd_dist.planner.stage_memory import STAGES, need

GIB = 2**30
OFFLOADED = {"zero_optimization": {"offload_param": {"device": "cpu"}, "stage3_prefetch_bucket_size": 5e6}}
CONFIG = Config(
    data=Data(max_prompt_tokens=64, num_train=256, num_test=64),
    calibrate=Calibrate(batch_size=2, max_tokens=64),
    generate=Generate(batch_size=4, max_new_tokens=16),
    finetune=Finetune(max_tokens=64, checkpointing=True, micro_batch_size=1, global_batch_size=64),
    evaluate=Evaluate(batch_size=4, max_new_tokens=16),
)
CLUSTER = Cluster(1, 8)
WORKLOAD = Workload.of(CONFIG)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A model of 0.7 B parameters, by its config.json alone."""
    path = tmp_path_factory.mktemp("model") / "config.json"
    settings = tiny_config(hidden_size=2048, intermediate_size=5632, num_hidden_layers=16, num_attention_heads=16)
    settings.head_dim, settings.num_key_value_heads = 128, 4
    path.write_text(settings.to_json_string())
    return dataclasses.replace(CONFIG, model=Model(name=str(path), dtype="bfloat16"))


@pytest.fixture(scope="module")
def profile(config):
    return profile_of(config)


def changed(config, section, **values):
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


@pytest.mark.seconds
def test_a_profile_holds_no_weights_and_knows_the_sites(profile):
    assert 0.7e9 < profile.policy.num_parameters < 0.75e9
    assert (profile.element_bytes, profile.weight_bytes) == (2, 2 * profile.policy.num_parameters)
    assert next(str(site) for site in profile.sites) == "layers.8.key"
    assert {site.width for site in profile.sites} == {512}
    assert sum(profile.student.trained) == 16 * 8 * (2 * (2048 + 2048) + 2 * (2048 + 512))
    assert profile.student.frozen == profile.policy.frozen


def test_more_ranks_need_less_each_and_never_more(profile, config):
    for stage in STAGES:
        for placement in ("layerwise", "offload"):
            needs = [need(stage, placement, profile, config, Cluster(1, gpus)).device_bytes for gpus in (1, 2, 4, 8)]
            assert needs == sorted(needs, reverse=True)


def test_shards_of_all_ranks_hold_the_model_once(profile, config):
    for stage in ("calibrate", "generate", "finetune"):
        shards = need(stage, "layerwise", profile, config, CLUSTER).device["shards"]
        assert 8 * shards == pytest.approx(profile.weight_bytes, rel=1e-3)
    needed = need("finetune", "offload", profile, config, CLUSTER)
    assert 8 * needed.host["shards"] == pytest.approx(profile.weight_bytes, rel=1e-3)
    assert "shards" not in needed.device


@pytest.mark.seconds
def test_full_fine_tuning_holds_sixteen_bytes_of_optimizer_for_each_parameter(config):
    full = changed(config, "finetune", mode="full")
    profile = profile_of(full)
    needed = need("finetune", "layerwise", profile, full, CLUSTER).device
    assert 8 * needed["optimizer"] == pytest.approx(16 * profile.policy.num_parameters, rel=1e-3)
    whole = need("finetune", "replica", profile, changed(full, "distributed", zero_stage=1), CLUSTER).device
    assert whole["optimizer"] == 2 * profile.policy.num_parameters


@pytest.mark.seconds
def test_a_model_is_loaded_and_read_back_in_shards(config):
    full = changed(config, "finetune", mode="full")
    profile, many = profile_of(full), Cluster(64, 8)
    loading = need("load", "layerwise", profile, full, many).device
    assert 512 * loading["shards"] == pytest.approx(profile.weight_bytes, rel=1e-3)
    largest = max(profile.policy.frozen)
    assert loading["gathered"] == 2 * (largest + largest // 512)  # and its new shard
    on_cpus = need("load", "layerwise", profile, full, dataclasses.replace(many, is_cpu=True)).device
    assert on_cpus["gathered"] == loading["gathered"] + 2 * largest
    for cluster in (CLUSTER, many):
        whole = sum(need("load", "layerwise", profile, full, cluster).device.values())
        assert all(whole <= need(stage, "layerwise", profile, full, cluster).device_bytes for stage in STAGES)
    assert "saved model" not in need("finetune", "layerwise", profile, full, many).device  # training needs more
    whole = changed(full, "distributed", zero_stage=1)
    assert need("load", "replica", profile, whole, many).device_bytes == profile.weight_bytes


@pytest.mark.seconds
def test_weights_of_4_bits_and_the_one_that_is_made_whole_are_counted(config):
    whole = changed(config, "distributed", zero_stage=2)
    four_bits = changed(whole, "model", quantization="nf4")
    profiles = [profile_of(one) for one in (whole, four_bits)]
    linear = 16 * (2 * 2048 * 2048 + 2 * 2048 * 512 + 3 * 2048 * 5632)
    assert sum(profiles[1].four_bits) == linear
    for stage in STAGES:
        needed, less = (
            need(stage, "replica", profile, one, CLUSTER).device
            for profile, one in zip(profiles, (whole, four_bits), strict=True)
        )
        assert needed["weights"] - less["weights"] == pytest.approx(linear * (2 - 0.516), rel=1e-3)
        assert less["one weight whole"] == 2 * 2048 * 5632
    assert profiles[0].weight_bytes - profiles[1].weight_bytes == pytest.approx(linear * (2 - 0.516), rel=1e-3)


@pytest.mark.seconds
def test_activations_that_wait_on_the_host_and_states_of_8_bits_are_counted(profile, config):
    waiting = changed(config, "finetune", offload_activations=True)
    for placement in ("replica", "layerwise", "offload"):
        here, there = (need("finetune", placement, profile, one, CLUSTER) for one in (config, waiting))
        moved = there.host["activations"]
        assert moved == 2 * 64 * 2048 * 15, "of all layers but the one at work"
        assert here.device["activations"] - there.device["activations"] == moved
    full = changed(config, "finetune", mode="full", optimizer="adamw_8bit")
    needed = need("finetune", "layerwise", profile_of(full), full, CLUSTER).device
    assert 8 * needed["optimizer"] == pytest.approx(10 * profile.policy.num_parameters, rel=1e-3)


def test_placements_follow_the_config(config):
    assert placements("generate", config) == ["replica", "layerwise", "offload"]
    assert placements("finetune", config) == ["layerwise", "offload"]
    assert placements("generate", changed(config, "generate", placement="replica")) == ["replica"]
    assert placements("evaluate", changed(config, "evaluate", placement="layerwise")) == ["layerwise", "offload"]
    assert placements("finetune", changed(config, "distributed", zero_stage=2)) == ["replica"]
    assert placements("generate", changed(config, "distributed", deepspeed=OFFLOADED)) == ["replica", "offload"]


def test_with_less_memory_a_replica_becomes_layers_and_layers_go_to_the_host(profile, config):
    few = {"zero_optimization": {"stage3_max_live_parameters": 1e8}}  # else all of so small a model is fetched ahead
    config = changed(config, "distributed", deepspeed=few)
    needs = {name: need("generate", name, profile, config, CLUSTER) for name in ("replica", "layerwise", "offload")}
    sizes = {name: one.device_bytes for name, one in needs.items()}
    assert sizes["replica"] > sizes["layerwise"] > sizes["offload"]
    for placement, size in sizes.items():
        cluster = dataclasses.replace(CLUSTER, gpu_memory_gib=1.001 * size / GIB / HEADROOM)
        plan = plan_run(profile, config, cluster, WORKLOAD)
        found = next(stage for stage in plan.stages if stage.stage == "generate")
        assert (found.placement, found.fits) == (placement, True)
        if placement == "offload":
            assert any("offload_param.device=cpu" in advice for advice in plan.advice)
    poor = dataclasses.replace(CLUSTER, gpu_memory_gib=1.001 * sizes["offload"] / GIB / HEADROOM, host_memory_gib=0.01)
    assert not plan_run(profile, config, poor, WORKLOAD).fits


def test_the_smallest_cluster_fits_and_one_rank_less_does_not(profile, config):
    cluster = Cluster(4, 4, gpu_memory_gib=3.2)
    found = smallest_cluster(profile, config, cluster)
    fits = {
        ranks: all(stage.fits and stage.placement != "offload" for stage in planned(profile, config, cluster, ranks))
        for ranks in (found.num_ranks - 1, found.num_ranks)
    }
    assert fits == {found.num_ranks - 1: False, found.num_ranks: True}
    with_hosts = smallest_cluster(profile, config, cluster, offload=True)
    assert with_hosts.num_ranks <= found.num_ranks
    assert smallest_cluster(profile, config, Cluster(1, 2, gpu_memory_gib=0.1)) is None


def planned(profile, config, cluster, num_ranks):
    nodes, gpus = (1, num_ranks) if num_ranks <= 4 else (num_ranks // 4, 4)
    return plan_run(profile, config, cluster.sized(nodes, gpus), WORKLOAD).stages


def test_what_does_not_fit_says_what_to_change(profile, config):
    plan = plan_run(profile, config, Cluster(1, 128, gpu_memory_gib=0.05), WORKLOAD)
    assert not plan.fits
    assert all(any(advice.startswith(f"{stage} does not fit") for advice in plan.advice) for stage in STAGES)
    idle = [advice for advice in plan.advice if "idle" in advice]
    assert idle == [
        "calibrate.num_shards=8 keeps 120 of 128 ranks idle; raise it",
        "finetune.global_batch_size=64 keeps 64 of 128 ranks idle; raise it",
    ]
    roomy = plan_run(profile, config, Cluster(1, 8), WORKLOAD)
    assert any("distributed.zero_stage=0 saves their gathers" in advice for advice in roomy.advice)


def test_one_rank_receives_nothing_and_layers_receive_the_model_at_each_step(profile, config):
    def received(stage, placement, cluster):
        return cost(stage, placement, profile, config, cluster=cluster, workload=WORKLOAD).network_bytes

    for stage in STAGES:
        assert received(stage, "layerwise", Cluster(1, 1)) == 0
    steps = 256 // 8 // 4 * 16 + 1  # eight batches of four rows a rank, and its prompts in one pass
    students = 2
    assert received("generate", "layerwise", CLUSTER) == pytest.approx(students * steps * profile.weight_bytes * 7 / 8)
    assert received("generate", "replica", CLUSTER) == pytest.approx(students * profile.weight_bytes * 7 / 8)
    assert received("evaluate", "replica", CLUSTER) == 0


def test_scoring_tokens_is_planned_where_a_run_does_it_and_reads_each_batch_twice(profile, config):
    def stages(**values):
        return [one.stage for one in plan_run(profile, changed(config, "evaluate", **values), CLUSTER, WORKLOAD).stages]

    assert stages() == ["calibrate", "generate", "finetune", "token_effects", "evaluate"]
    assert "token_effects" not in stages(num_coloured=0) + stages(arms=("base", "psr"))
    placed = [need("token_effects", name, profile, config, CLUSTER).device for name in ("layerwise", "replica")]
    assert placed[1]["weights"] == profile.weight_bytes
    batch = 2048 // (64 + 16)
    targets = batch * 16
    logits = targets * profile.policy.vocabulary_size * 2
    assert placed[0]["activations"] == placed[1]["activations"] > logits
    received = [
        cost("token_effects", name, profile, config, cluster=CLUSTER, workload=WORKLOAD).network_bytes
        for name in ("layerwise", "replica")
    ]
    passes = 2 * 2  # two batches a rank, of 2 x 64 completions of 128 + 16 tokens
    assert received == [pytest.approx(count * profile.weight_bytes * 7 / 8) for count in (passes, 1)]


def test_slower_networks_and_devices_take_longer_and_are_named(profile, config):
    def taken(stage, placement, **changes):
        cluster = Cluster(2, 4, device=dataclasses.replace(device_named("H100"), **changes))
        return cost(stage, placement, profile, config, cluster=cluster, workload=WORKLOAD)

    slow = taken("generate", "layerwise", network_bytes_per_second=1e8)
    assert slow.bottleneck == "network"
    assert slow.seconds > 10 * taken("generate", "layerwise").seconds
    weak = taken("finetune", "replica", flops=1e10)
    assert weak.bottleneck == "compute"
    sequences, tokens = 2 * 5 * 256, 64  # students, epochs, prompts
    passes = 3 * profile.student.forward_flops + 2 * sum(profile.student.trained)  # forward, again, and backward
    attention = 3 * 2 * 16 * 2048 * 64
    assert weak.seconds == pytest.approx(sequences * tokens / 8 * (passes + attention) / (0.4 * 1e10))
    assert taken("generate", "replica").bottleneck == "launches"


def test_a_teacher_of_all_weights_keeps_those_that_it_began_with(config):
    arms = changed(changed(config, "finetune", mode="full"), "evaluate", arms=("base", "spd_distil"))
    teaching = profile_of(arms)
    assert teaching.keeps_weights
    plain = dataclasses.replace(teaching, keeps_weights=False)
    for placement, parts in (("replica", 1), ("layerwise", CLUSTER.num_ranks)):
        less, more = (need("finetune", placement, one, arms, CLUSTER).device_bytes for one in (plain, teaching))
        assert more - less == pytest.approx(teaching.weight_bytes / parts, rel=0.01)
    assert not profile_of(changed(arms, "finetune", mode="lora")).keeps_weights


def test_a_teacher_a_second_policy_and_more_samples_cost_what_they_do_more(profile, config):
    cluster = Cluster(2, 4, device=dataclasses.replace(device_named("H100"), flops=1e10))

    def having(*arms):
        return changed(config, "evaluate", arms=("base", *arms))

    def taken(stage, *arms):
        return cost(stage, "replica", profile, having(*arms), cluster=cluster, workload=WORKLOAD).seconds

    attention, last = 2 * 16 * 2048 * 64, 2 * sum(profile.student.trained)
    three, four = (count * (profile.student.forward_flops + attention) + last for count in (3, 4))
    assert taken("finetune", "spd_distil") / taken("finetune", "spd") == pytest.approx(four / three)
    assert taken("finetune", "spd", "spd_distil") == taken("finetune", "spd") + taken("finetune", "spd_distil")
    assert taken("finetune", "filtered") == 4 * taken("finetune", "spd"), "if nothing is left out"
    assert taken("generate", "spd_contrast") == pytest.approx(2 * taken("generate", "spd"), rel=0.01)
    plain, twice = (
        need("generate", "replica", profile, having(arm), CLUSTER).device["cache"] for arm in ("spd", "spd_contrast")
    )
    assert twice == 2 * plain


def test_each_arm_costs_what_its_own_settings_ask_for_and_is_made_once(profile, config):
    cluster = Cluster(2, 4, device=dataclasses.replace(device_named("H100"), flops=1e10))

    def taken(stage, *arms):
        planned = changed(config, "evaluate", arms=("base", *arms))
        return cost(stage, "replica", profile, planned, cluster=cluster, workload=WORKLOAD).seconds

    swept = ("spd", "spd@evaluate.temperature=0.5", "spd@evaluate.temperature=0.8")
    for stage in ("generate", "finetune", "token_effects"):
        assert taken(stage, *swept) == taken(stage, "spd")
    assert taken("evaluate", *swept) == pytest.approx(2 * taken("evaluate", "spd"), rel=0.01), "four arms, not two"
    more = "spd@evaluate.num_samples=3@evaluate.temperature=1"
    assert taken("evaluate", more) == pytest.approx(2 * taken("evaluate", "spd"), rel=0.01)
    assert taken("finetune", "spd@finetune.num_epochs=10") == 2 * taken("finetune", "spd")
    assert taken("generate", "spd@generate.num_samples=3") == pytest.approx(3 * taken("generate", "spd"), rel=0.01)
    assert taken("generate", "spd", "supervised") == taken("generate", "spd"), "it learns from references"
    fifty = math.ceil(config.calibrate.num_examples / 64)
    assert taken("finetune", "supervised") == pytest.approx(fifty / (256 // 64) * taken("finetune", "spd"))


def test_deepspeeds_settings_are_heeded():
    zero = Zero.of(Distributed(deepspeed=OFFLOADED))
    assert (zero.prefetch_bucket_size, zero.offloads_parameters, zero.offloads_optimizer) == (5_000_000, True, False)
    assert Zero.of(Distributed(deepspeed={"zero_optimization": {"reduce_bucket_size": "auto"}})) == Zero.of(
        Distributed()
    )
    assert zero.persistent([10, 99_999, 100_000]) == 100_009
    assert zero.gathered_forward([10, 3_000_000, 4_000_000]) == 7_000_000 + 3_000_000, "what is ahead is there twice"
    assert zero.gathered_forward([10, 3_000_000, 4_000_000] * 9) == 63_000_000 + 5_000_000
    assert zero.gathered_forward([10, 30_000_000, 40_000_000]) == 70_000_000 + 40_000_000, "one is a bucket"
    ahead = Zero.of(Distributed(deepspeed={"zero_optimization": {"stage3_max_live_parameters": 2e7}}))
    assert ahead.gathered_forward([10, 30_000_000, 40_000_000]) == 20_000_000 + 40_000_000 + 30_000_000
    huge = [200_000_000] * 20
    assert zero.gathered_backward(huge, reused=sum(huge)) == 1_200_000_000
    few = [10_000_000] * 10
    assert zero.gathered_backward(few, reused=30_000_000) == 30_000_000, "the other layers are gone at the turn"
    assert zero.gathered_backward(few, reused=100_000_000, checkpointing=True) == 110_000_000, "and one is a bucket"
    assert zero.shards([10, 11], 4) == 6


def test_an_unknown_gpu_is_an_error():
    with pytest.raises(ConfigError, match="--gpu: B900 is not known; give the one that is most like it of H200, H100"):
        device_named("B900")
    assert main(["--gpu", "B900"]) == 2


@pytest.mark.seconds
def test_the_launcher_says_whether_it_fits(config, capsys):
    words = ["--model-config", config.model.name, "model.dtype=bfloat16", "finetune.checkpointing=true"]
    words += ["calibrate.batch_size=1", "--nodes", "1", "--gpus-per-node", "2"]
    assert main([*words, "--gpu-memory", "80"]) == 0
    shown = capsys.readouterr().out
    assert "0.722 B parameters on 1 node of 2 GPUs" in shown
    assert "Smallest cluster: 1 node of 1 GPU" in shown
    assert "Planned for H100 GPUs of 80 GiB, hosts of 1024 GiB; of this machine nothing is read: --nodes" in shown
    assert main([*words, "--gpu-memory", "1"]) == 1
    assert "too large" in capsys.readouterr().out
    assert main(["--model-config", "no/such.json"]) == 3
    assert "error: model.name: no/such.json can't be loaded" in capsys.readouterr().err


@pytest.mark.seconds
@pytest.mark.parametrize(
    "block", re.findall(r"<!-- plan: (.*?) -->\n(.*?)\n<!-- end -->", Path("docs/scaling.md").read_text(), re.S)
)
def test_the_numbers_of_the_documentation_are_the_planners(block, capsys):
    words, written = block
    assert main(shlex.split(words)) == 0
    assert capsys.readouterr().out.strip() == written.strip()


@pytest.mark.seconds
def test_bytes_of_a_weight_follow_the_device_and_the_config(config):
    automatic = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="auto"))
    assert profile_of(automatic, torch.device("cpu")).element_bytes == 4
    assert profile_of(automatic).element_bytes == 2
