"""Ranks that generate together: the corpus of one rank, and no rank waits for one that fails."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import generating
import pytest
import torch
import torch.distributed as dist
from generating import CONFIG, SEED, StoppingAfter, merged, policy_of, prompts, some_projection
from ranks import ends_of_ranks, run_on_ranks
from safetensors.torch import load_file
from tiny import save_tiny_model

from spd_dist.config import Distributed, Generate
from spd_dist.distributed.collectives import gather_objects
from spd_dist.distributed.world import World
from spd_dist.distributed.zero import weights_fingerprint
from spd_dist.errors import ConfigError, DataError
from spd_dist.inference import placement as placing
from spd_dist.models.policy import Policy
from spd_dist.stages.context import StageContext
from spd_dist.stages.generate import CorpusSummary, corpus_requests, generate
from spd_dist.storage.records import read_record
from spd_dist.types import Projection, Prompt

PLACEMENTS = ("replica", "layerwise")
INVARIANT = dataclasses.replace(CONFIG, batch_invariant=True)


def this_world() -> World:
    """As `join_world` would give it."""
    return World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


def run(policy: Policy, folder: Path, config: Generate = CONFIG, **changes: object) -> dict:
    """Generate on all ranks of this process group."""
    settings = {"projection": some_projection(), "prompts": prompts(), "progress": None} | changes
    shown, projection, progress = settings["prompts"], settings["projection"], settings["progress"]
    context = StageContext(folder, SEED, this_world(), progress=progress)
    return generate(policy, shown, projection, config, context)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def expected(model: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The corpus of one process with the whole model."""
    return generating.corpus(model, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def expected_bfloat16(model: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The same in bfloat16, in passes of a fixed shape."""
    return generating.corpus(model, tmp_path_factory.mktemp("bfloat16"), INVARIANT, "bfloat16")


def on_two_ranks(model: Path, folder: Path, expected: bytes, expected_bfloat16: bytes) -> None:
    in_bfloat16_two_ranks_make_the_corpus_of_one_in_passes_of_a_fixed_shape(model, folder, expected_bfloat16)
    policy = policy_of(model, this_world(), zero_stage=3)
    untouched = hooks_of(policy)
    both_placements_and_forms_give_the_corpus_of_one_rank(policy, folder, expected)
    a_rank_without_prompts_keeps_the_others_company(policy, folder)
    each_prompt_is_rendered_by_one_rank(folder)
    the_projection_of_rank_0_is_used(policy, folder, expected)
    a_layers_shards_are_gathered_while_the_one_before_computes(model, folder, expected)
    weights_are_given_back_though_a_backward_pass_came_before(sharded(model), folder, expected)
    an_error_of_one_rank_is_raised_on_all_and_leaves_nothing_behind(policy, folder, expected, untouched)
    an_error_while_merging_is_raised_on_all(policy, folder)
    a_program_gets_the_whole_folded_policy(policy, model, folder)
    assert weights_fingerprint(policy.model) == policy.fingerprint
    assert hooks_of(policy) == untouched


def on_four_ranks(model: Path, folder: Path, expected: bytes) -> None:
    policy = policy_of(model, this_world(), zero_stage=3)
    untouched = hooks_of(policy)
    both_placements_and_forms_give_the_corpus_of_one_rank(policy, folder, expected)
    a_rank_without_prompts_keeps_the_others_company(policy, folder)
    whole = policy_of(model, this_world(), zero_stage=0)
    assert merged(folder / "whole", run(whole, folder / "whole")) == expected
    what_other_ranks_left_is_kept(policy, folder, expected)
    an_error_of_one_rank_is_raised_on_all_and_leaves_nothing_behind(policy, folder, expected, untouched)
    with pytest.raises(ConfigError, match=r"generate.placement=layerwise needs .*, or generate.placement=auto"):
        run(whole, folder / "refused", dataclasses.replace(CONFIG, placement="layerwise"))


def both_placements_and_forms_give_the_corpus_of_one_rank(policy: Policy, folder: Path, expected: bytes) -> None:
    for placement in PLACEMENTS:
        for apply_as in ("hook", "fold"):
            config = dataclasses.replace(CONFIG, placement=placement, apply_as=apply_as)
            target = folder / f"{placement}-{apply_as}"
            summary = run(policy, target, config)
            assert merged(target, summary) == expected
            assert summary.placement == placement
            assert min(summary.hook_calls.values()) >= 1
            assert summary.leakage < 1e-5
            assert read_record(target / "summary.json", CorpusSummary) == summary
    assert run(policy, folder / "auto").placement == "replica"


def each_prompt_is_rendered_by_one_rank(folder: Path) -> None:
    """In memory, and with more of them in a file a rank that all map."""
    rendered = []

    def render(rows: list[dict]) -> list[Prompt]:
        rendered.extend(rows)
        return [prompts()[row["number"]] for row in rows]

    rows = [{"number": number} for number in range(9)]
    for most in (100_000, 5):
        corpus_requests.MOST_AS_TEXT = most
        with corpus_requests.rendered_together(rows, render, folder / "prompts", this_world()) as together:
            assert list(together) == prompts()
            assert (folder / "prompts").exists() == (most == 5)
            assert sorted(row["number"] for part in gather_objects(rendered) for row in part) == list(range(9))
        rendered.clear()
    assert not (folder / "prompts").exists()
    corpus_requests.MOST_AS_TEXT = 100_000


def in_bfloat16_two_ranks_make_the_corpus_of_one_in_passes_of_a_fixed_shape(
    model: Path, folder: Path, expected: bytes
) -> None:
    """To the byte, also after a kill: no order of summation differs."""
    policy = policy_of(model, this_world(), zero_stage=3, dtype="bfloat16")
    for placement in PLACEMENTS:
        target, config = folder / f"bfloat16-{placement}", dataclasses.replace(INVARIANT, placement=placement)
        with pytest.raises(DataError, match="the disk is full"):
            run(policy, target, config, progress=StoppingAfter(3) if this_world().rank == 1 else None)
        assert merged(target, run(policy, target, config)) == expected, placement
    policy.release()


def a_rank_without_prompts_keeps_the_others_company(policy: Policy, folder: Path) -> None:
    for placement in PLACEMENTS:
        config = dataclasses.replace(CONFIG, placement=placement, num_samples=1)
        summary = run(policy, folder / f"few-{placement}", config, prompts=prompts()[:1])
        assert summary.num_completions == 1


def the_projection_of_rank_0_is_used(policy: Policy, folder: Path, expected: bytes) -> None:
    other = some_projection() if this_world().is_main else Projection({})
    assert merged(folder / "other", run(policy, folder / "other", projection=other)) == expected


def a_layers_shards_are_gathered_while_the_one_before_computes(model: Path, folder: Path, expected: bytes) -> None:
    """Once a pass has shown the order of modules; and not where DeepSpeed is told to gather nothing ahead."""
    for ahead in (2000, 0):  # elements; a layer has 7744
        settings = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": ahead}
        shards = Distributed(zero_stage=3, deepspeed={"zero_optimization": settings})
        policy = policy_of(model, this_world(), distributed=shards)
        seen = watched(policy)
        config = dataclasses.replace(CONFIG, placement="layerwise")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(placing, "forget_order", noting(placing.forget_order, seen))
            assert merged(folder / f"ahead-{ahead}", run(policy, folder / f"ahead-{ahead}", config)) == expected
        begins = [index for index, one in enumerate(seen) if one == {"FORGOTTEN"}]
        parts = [seen[start + 1 : end] for start, end in itertools.pairwise([*begins, len(seen)])]
        later = [one for part in parts for one in part[4 * 3 :]]  # after the first passes, which are recorded
        assert len(later) > 30
        assert all("INFLIGHT" in one for one in later) if ahead else not any("INFLIGHT" in one for one in later)
        policy.release()


def weights_are_given_back_though_a_backward_pass_came_before(policy: Policy, folder: Path, expected: bytes) -> None:
    """That pass uses them again: whoever follows its order keeps them."""
    left, layers = [], policy.model.model.layers
    hook = layers[-1].register_forward_hook(
        lambda *_: left.append({parameter.ds_status.name for parameter in layers[0].mlp.parameters()})
    )
    config = dataclasses.replace(CONFIG, placement="layerwise")
    for number in range(2):
        for _ in range(3):  # the first is recorded
            embedding = policy.model.get_input_embeddings()
            begins = embedding.register_forward_hook(lambda *args: args[-1].requires_grad_(True))
            policy.model(torch.arange(3, 9)[None]).logits.sum().backward()
            begins.remove()
        assert "AVAILABLE" in left[-1]
        left.clear()
        assert merged(folder / f"after-{number}", run(policy, folder / f"after-{number}", config)) == expected
        assert set().union(*left) == {"NOT_AVAILABLE"}
    hook.remove()


def sharded(model: Path) -> Policy:
    """No parameter is so small that it stays whole."""
    zero = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    return policy_of(model, this_world(), distributed=Distributed(zero_stage=3, deepspeed=zero))


def noting(forget: Callable[[object], None], seen: list[set[str]]) -> Callable[[object], None]:
    """The same, with a mark among what is seen."""

    def forget_and_note(engine: object) -> None:
        forget(engine)
        seen.append({"FORGOTTEN"})

    return forget_and_note


def watched(policy: Policy) -> list[set[str]]:
    """At each computation of a layer's last product, how far the next layer's shards are gathered."""
    seen, layers = [], policy.model.model.layers
    for layer, following in itertools.pairwise(layers):

        def look(*_: object, following: torch.nn.Module = following) -> None:
            seen.append({parameter.ds_status.name for parameter in following.parameters()})

        layer.mlp.down_proj.register_forward_pre_hook(look)  # after ZeRO's own, which waits for this product's weights
    return seen


def an_error_of_one_rank_is_raised_on_all_and_leaves_nothing_behind(
    policy: Policy, folder: Path, expected: bytes, untouched: list
) -> None:
    for placement in PLACEMENTS:
        config = dataclasses.replace(CONFIG, placement=placement)
        target = folder / f"broken-{placement}"
        progress = StoppingAfter(2) if this_world().rank == 1 else None
        with pytest.raises(DataError, match="the disk is full"):
            run(policy, target, config, progress=progress)
        assert hooks_of(policy) == untouched
        left = sum(len(part.read_text().splitlines()) for part in (target / "completions").glob("part-*.jsonl"))
        assert left >= 2
        summary = run(policy, target, config)
        assert merged(target, summary) == expected
        assert summary.num_new_tokens < sum(len(json.loads(line)["tokens"]) for line in expected.splitlines())


def an_error_while_merging_is_raised_on_all(policy: Policy, folder: Path) -> None:
    with pytest.raises(DataError, match="the empty rate of the completions is"):
        run(policy, folder / "empty", dataclasses.replace(CONFIG, max_empty_rate=0.0, max_new_tokens=1))


def a_program_gets_the_whole_folded_policy(policy: Policy, model: Path, folder: Path) -> None:
    """From shards what it gets from a whole one; each rank starts it on its own requests, one that fails stops all."""
    whole, given = policy_of(model, this_world(), zero_stage=0), {}
    for name, one in {"sharded": policy, "whole": whole}.items():
        kept = folder / f"{name}.safetensors"
        copy = f"cp {{model}}/model.safetensors {kept}.$$ && mv {kept}.$$ {kept}"  # whole, though one ends the other
        command = f"sh -c '{copy}; echo at work >&2; exit 9' {{prompts}} {{output}}"
        config = dataclasses.replace(CONFIG, engine="command", command=command)
        with pytest.raises(DataError, match=r"generate.engine=command ended with exit code 9; .*\nat work"):
            run(one, folder / f"program-{name}", config)
        given[name] = load_file(kept)
    untouched = load_file(model / "model.safetensors")
    assert given["sharded"].keys() == given["whole"].keys() == untouched.keys()
    assert all(weight.equal(given["whole"][name]) for name, weight in given["sharded"].items())
    folded = [name for name, weight in untouched.items() if not weight.equal(given["whole"][name])]
    assert folded == [f"model.layers.2.self_attn.{kind}_proj.weight" for kind in "kv"]
    with pytest.raises(ConfigError, match=r"generate.engine=hf_cb needs whole weights on each rank"):
        run(policy, folder / "cb", dataclasses.replace(CONFIG, engine="hf_cb", placement="layerwise"))


def what_other_ranks_left_is_kept(policy: Policy, folder: Path, expected: bytes) -> None:
    """Lines of one rank of seven, one torn; the rest is made by these four."""
    target = folder / "resumed"
    if this_world().is_main:
        (target / "completions").mkdir(parents=True)
        lines = expected.splitlines(keepends=True)
        (target / "completions" / "part-00003-of-00007.jsonl").write_bytes(b"".join(lines[5:9]) + lines[0][:-9])
    dist.barrier()
    summary = run(policy, target)
    assert merged(target, summary) == expected
    kept = sum(len(json.loads(line)["tokens"]) for line in expected.splitlines()[5:9])
    assert summary.num_new_tokens + kept == summary.num_tokens


def hooks_of(policy: Policy) -> list:
    """The number of hooks on every module, and whether ranks agree on it."""
    counts = [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in policy.model.named_modules()
    ]
    assert len({str(one) for one in gather_objects(counts)}) == 1
    return counts


def test_two_ranks_make_the_corpus_of_one(model: Path, expected: bytes, expected_bfloat16: bytes, tmp_path: Path):
    run_on_ranks(2, tmp_path / "store", on_two_ranks, model, tmp_path, expected, expected_bfloat16)


CONTRASTED = dataclasses.replace(CONFIG, contrast=2.0)


def contrast(model: Path, folder: Path, expected: bytes) -> None:
    policy = policy_of(model, this_world(), zero_stage=3)
    for placement in PLACEMENTS:
        config = dataclasses.replace(CONTRASTED, placement=placement, batch_size=3)
        summary = run(policy, folder / placement, config)
        assert merged(folder / placement, summary) == expected
        assert summary.leakage < 1e-5
        assert min(summary.hook_calls.values()) >= 1


def test_a_contrast_of_two_policies_makes_the_corpus_of_one_rank_on_two(model: Path, expected: bytes, tmp_path: Path):
    alone = generating.corpus(model, tmp_path / "alone", CONTRASTED)
    assert alone != expected
    run_on_ranks(2, tmp_path / "store", contrast, model, tmp_path, alone)


@pytest.mark.slow
def test_four_ranks_make_the_corpus_of_one(model: Path, expected: bytes, tmp_path: Path):
    run_on_ranks(4, tmp_path / "store", on_four_ranks, model, tmp_path, expected)


def one_rank_fails_inside_a_pass(model: Path, folder: Path) -> None:
    policy = policy_of(model, this_world(), zero_stage=3)

    def full(_: object, inputs: tuple[torch.Tensor]) -> None:
        if this_world().rank == 1 and len(inputs[0]) > 2:  # more rows than there are probes
            raise torch.OutOfMemoryError("CUDA out of memory")

    policy.model.model.layers[1].register_forward_pre_hook(full)
    run(policy, folder, dataclasses.replace(CONFIG, placement="layerwise"))


def test_a_rank_that_fails_inside_a_layerwise_pass_ends_and_so_do_the_others(model: Path, tmp_path: Path):
    """It can tell nobody, since the others are in another collective; they fail when its connection closes."""
    first, second, third = ends_of_ranks(3, tmp_path / "store", one_rank_fails_inside_a_pass, model, tmp_path / "run")
    assert second.startswith("DataError: out of memory with generate.batch_size=4; ranks in step (layerwise) cannot")
    assert "on rank" not in second
    for other in (first, third):
        assert other.startswith(("RuntimeError", "DistBackendError"))
        assert "onnection" in other
    assert not (tmp_path / "run" / "summary.json").exists()


def one_task(model: Path, folder: Path, config: Generate) -> None:
    policy = policy_of(model, this_world(), zero_stage=0)
    run(policy, folder, config)


def test_an_array_of_tasks_with_different_numbers_of_ranks_makes_the_same_corpus(
    model: Path, expected: bytes, tmp_path: Path
):
    for task, num_ranks in ((2, 1), (0, 2), (1, 1)):
        config = dataclasses.replace(CONFIG, num_tasks=3, task_index=task)
        if num_ranks == 1:
            generating.corpus(model, tmp_path, config)
        else:
            run_on_ranks(num_ranks, tmp_path / f"store-{task}", one_task, model, tmp_path, config)
    assert (tmp_path / "completions" / "completions.jsonl").read_bytes() == expected
    assert [path.name for path in (tmp_path / "completions").iterdir()] == ["completions.jsonl"]
