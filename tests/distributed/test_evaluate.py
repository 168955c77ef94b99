"""Ranks that answer together: the answers of one rank, whatever was there before, and no rank left waiting."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from generating import PROGRAM
from peft import LoraConfig, get_peft_model
from ranks import run_on_ranks
from tiny import save_tiny_model, tiny_model

from spd_dist.config import Calibrate, Data, Distributed, Evaluate, Generate, Model
from spd_dist.data.prompts import TestSet, make_examples, make_prompts
from spd_dist.data.tasks import find_task
from spd_dist.data.tasks.protocol import Row, Score
from spd_dist.distributed.world import World
from spd_dist.errors import ConfigError, DataError
from spd_dist.models.policy import Policy, load_adapted, load_policy, load_replica
from spd_dist.stages.context import StageContext
from spd_dist.stages.evaluate import evaluate_arm
from spd_dist.stages.score_tokens import score_tokens
from spd_dist.storage.answers import answers_path, effects_path, read_answers
from spd_dist.storage.keyed_parts import part_path, parts
from spd_dist.types import Completion, KVSite, Projection, SiteOperator

SMALL_SHARDS = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
CONFIG = Evaluate(max_new_tokens=12, batch_size=3)
SAMPLED = dataclasses.replace(CONFIG, temperature=1.0, num_samples=3)
TASK = find_task("arithmetic")
ARMS = ("base", "projected", "sampled")


def rows(count: int = 11) -> list[Row]:
    """Of unequal lengths."""
    return [
        {"id": f"r{index}", "question": "How many? " * (1 + index % 4), "solution": "4", "answer": str(index)}
        for index in range(count)
    ]


def set_up(model: Path, zero_stage: int = 0) -> tuple[Policy, TestSet]:
    """The tiny policy, with more tokens that end a sequence: a random model seldom says one."""
    policy = load_policy(Model(str(model)), Distributed(zero_stage=zero_stage), world_of_this_process())
    policy.eos_token_ids = tuple(range(2, 259, 17))
    return policy, TestSet(TASK, rows(), make_prompts(rows(), TASK, policy.tokenizer, Data()), seed=5)


def world_of_this_process() -> World:
    if not dist.is_initialized():
        return World(0, 1, torch.device("cpu"))
    return World(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))


def projection() -> Projection:
    """A quarter of layer 2's values, at random."""
    basis_DR = torch.linalg.qr(torch.randn(16, 4, generator=torch.Generator().manual_seed(3)))[0]
    site = KVSite(2, "value", "model.layers.2.self_attn.v_proj", ((0, 16),), 2)
    return Projection({site: SiteOperator(0.0, basis_DR, torch.ones(4))})


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The tiny model, with an adapter beside its folder."""
    folder = save_tiny_model(tmp_path_factory.mktemp("policy") / "model")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        get_peft_model(tiny_model(), lora).save_pretrained(folder.parent / "adapter")
    return folder


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory) -> dict[str, bytes]:
    """The files of one process with the whole model."""
    folder = tmp_path_factory.mktemp("one")
    policy, test_set = set_up(model)
    for arm, held_to in (("base", None), ("projected", projection())):
        evaluate_arm(policy, test_set, CONFIG, context_in(folder), arm=arm, projection=held_to)
    evaluate_arm(policy, test_set, SAMPLED, context_in(folder), arm="sampled")
    student_answers(model, folder, Distributed(zero_stage=0), "student")
    effects_of(policy, folder)
    found = {arm: answers_path(folder, arm, TASK.name).read_bytes() for arm in (*ARMS, "student")}
    return found | {"token effects": effects_path(folder, "spd").read_bytes()}


def effects_of(policy: Policy, folder: Path, placement: str = "auto") -> None:
    """Completions of unequal lengths, in three batches."""
    rng = random.Random(3)
    completions = [
        Completion(f"r{index}", sample, 0, some_tokens(rng, 40 * index + 9), some_tokens(rng, 150 + sample), "", "stop")
        for index in range(6)
        for sample in range(2)
    ]
    score_tokens(
        policy, completions, projection(), dataclasses.replace(CONFIG, placement=placement), context_in(folder)
    )


def some_tokens(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(3, 259) for _ in range(count))


def effects_are_those_of_one_rank(policy: Policy, folder: Path, expected: bytes) -> None:
    """Also where another attempt left two lines, in both placements."""
    lines = expected.splitlines(keepends=True)
    for placement in ("replica", "layerwise"):
        merged = effects_path(folder / placement, "spd")
        if world_of_this_process().is_main and placement == "layerwise":
            merged.parent.mkdir(parents=True)
            part_path(merged, 0, 3).write_bytes(lines[5] + lines[1] + lines[2][:30])
        dist.barrier()
        effects_of(policy, folder / placement, placement)
        assert merged.read_bytes() == expected, placement
        assert parts(merged) == []


def student_answers(model: Path, folder: Path, distributed: Distributed, arm: str, **changes: object) -> bytes:
    """What a student in bfloat16 answers in passes of a fixed shape: with a kill, if an earlier part is there."""
    load = load_replica if distributed.zero_stage == 0 else load_adapted
    student = load(
        Model(str(model), dtype="bfloat16"), distributed, world_of_this_process(), adapter=model.parent / "adapter"
    )
    base, test_set = set_up(model)
    student.eos_token_ids = base.eos_token_ids
    config = dataclasses.replace(CONFIG, **{"batch_invariant": True, "max_new_tokens": 24} | changes)
    evaluate_arm(student, test_set, config, context_in(folder), arm=arm)
    return answers_path(folder, arm, TASK.name).read_bytes()


def context_in(folder: Path, progress: object = None) -> StageContext:
    return StageContext(folder, 42, world_of_this_process(), progress=progress)


class Counter:
    """What a progress line would have shown."""

    total = skipped = done = tokens = 0

    def begin(self, total: int, skipped: int) -> None:
        self.total, self.skipped = total, skipped

    def advance(self, units: int, tokens: int = 0) -> None:
        self.done += units
        self.tokens += tokens


@dataclasses.dataclass(frozen=True)
class FailingTask:
    """Cannot judge one row, which one rank alone has."""

    name: str = "failing"
    metric: str = "accuracy"

    def score(self, row: Row, output: str) -> Score:
        if row["id"] == "r3":
            raise DataError("r3 cannot be judged")
        return TASK.score(row, output)


@dataclasses.dataclass(frozen=True)
class LikelihoodTask:
    """Measured by the likelihood of its references."""

    name: str = "likely"
    metric: str = "nll"

    def score(self, row: Row, output: str) -> Score:
        return TASK.score(row, output)


def answers_are_those_of_one_rank(model: Path, folder: Path, expected: dict[str, bytes]) -> None:
    policy, test_set = set_up(model, zero_stage=3)
    for placement in ("replica", "layerwise"):
        config = dataclasses.replace(CONFIG, placement=placement)
        context = context_in(folder / placement)
        summary = evaluate_arm(policy, test_set, config, context, arm="base")
        assert summary.num_examples == 11
        evaluate_arm(policy, test_set, config, context, arm="projected", projection=projection())
        for arm in ("base", "projected"):
            assert answers_path(folder / placement, arm, TASK.name).read_bytes() == expected[arm], (placement, arm)

    resume_from_what_another_world_left(policy, test_set, folder / "resumed", expected["base"])
    samples_are_those_of_one_rank(policy, test_set, folder / "sampled", expected["sampled"])
    likelihoods_are_those_of_one_rank(policy, test_set, folder / "likely")
    effects_are_those_of_one_rank(policy, folder / "effects", expected["token effects"])
    bfloat16_students_answer_as_on_one_rank(model, folder / "bfloat16", expected["student"])
    failing = TestSet(FailingTask(), test_set.rows, test_set.prompts)
    with pytest.raises(DataError, match="r3 cannot be judged"):  # judged by one rank, raised by all
        evaluate_arm(policy, failing, CONFIG, context_in(folder / "failing"), arm="base")
    assert 0 < sum(len(read_answers(part)) for part in parts(folder / "failing" / "base" / "failing.jsonl")) < 11


def samples_are_those_of_one_rank(policy: Policy, test_set: TestSet, folder: Path, expected: bytes) -> None:
    world = world_of_this_process()
    merged = answers_path(folder, "sampled", TASK.name)
    if world.is_main:
        merged.parent.mkdir(parents=True)
        part_path(merged, 0, 3).write_bytes(b"".join(expected.splitlines(keepends=True)[4:6]))
    dist.barrier()
    progress = Counter()
    summary = evaluate_arm(policy, test_set, SAMPLED, context_in(folder, progress), arm="sampled")
    assert merged.read_bytes() == expected
    assert progress.done < 33, "two answers were there"
    assert (summary.num_examples, summary.num_samples, list(summary.pass_at_k)) == (11, 3, ["1", "2", "3"])


def bfloat16_students_answer_as_on_one_rank(model: Path, folder: Path, expected: bytes) -> None:
    """To the byte, also where another attempt had begun: passes of one shape round alike."""
    whole, shards = Distributed(zero_stage=0), Distributed(deepspeed=SMALL_SHARDS)
    for arm, distributed, placement in (
        ("whole", whole, "auto"), ("replica", shards, "replica"), ("layerwise", shards, "layerwise")
    ):  # fmt: skip
        merged = answers_path(folder, arm, TASK.name)
        if world_of_this_process().is_main and arm != "whole":
            merged.parent.mkdir(parents=True)
            part_path(merged, 0, 3).write_bytes(b"".join(expected.splitlines(keepends=True)[4:6]))
        dist.barrier()
        assert student_answers(model, folder, distributed, arm, placement=placement) == expected, arm


def likelihoods_are_those_of_one_rank(policy: Policy, test_set: TestSet, folder: Path) -> None:
    task = LikelihoodTask()
    examples, _ = make_examples(test_set.rows, TASK, policy.tokenizer, Data(), Calibrate(num_examples=11))
    measured = TestSet(task, test_set.rows, test_set.prompts, examples)
    summary = evaluate_arm(policy, measured, CONFIG, context_in(folder), arm="base")
    reference = tiny_model().double()
    for answer, example in zip(read_answers(answers_path(folder, "base", task.name)), examples, strict=True):
        logits_TV = reference(torch.tensor([example.tokens])).logits[0].detach()
        scores = [logits_TV[at - 1].log_softmax(0)[example.tokens[at]].item() for at in example.targets]
        assert answer.nll == pytest.approx(-sum(scores) / len(scores), abs=1e-5)
    assert summary.metric == "nll"
    assert summary.interval[0] < summary.value < summary.interval[1]


def resume_from_what_another_world_left(policy: Policy, test_set: TestSet, folder: Path, expected: bytes) -> None:
    world = world_of_this_process()
    merged = answers_path(folder, "base", TASK.name)
    lines = expected.splitlines(keepends=True)
    if world.is_main:
        merged.parent.mkdir(parents=True)
        part_path(merged, 0, 3).write_bytes(lines[4] + lines[2])
        part_path(merged, 2, 3).write_bytes(lines[7] + lines[9][:40])  # torn by a kill
    dist.barrier()
    progress = Counter()
    evaluate_arm(policy, test_set, CONFIG, context_in(folder, progress), arm="base")
    assert merged.read_bytes() == expected
    assert parts(merged) == []
    assert progress.done == progress.total - progress.skipped
    again = Counter()
    evaluate_arm(policy, test_set, CONFIG, context_in(folder, again), arm="base")
    assert again.done == 0


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_answers_do_not_depend_on_ranks_placement_or_kills(tmp_path, model, expected, world_size):
    run_on_ranks(world_size, tmp_path / "store", answers_are_those_of_one_rank, model, tmp_path, expected)


def test_a_file_holds_one_line_an_example_in_the_order_of_the_test_set(expected):
    lines = [json.loads(line) for line in expected["base"].splitlines()]
    assert [line["id"] for line in lines] == [f"r{index}" for index in range(11)]
    assert {line["finish_reason"] for line in lines} == {"stop", "length"}
    assert all(line["num_tokens"] <= 12 for line in lines)
    assert expected["base"] != expected["projected"]


def test_sampled_answers_are_a_line_a_sample_and_differ(expected):
    lines = [json.loads(line) for line in expected["sampled"].splitlines()]
    assert [(line["id"], line["sample"]) for line in lines] == [(f"r{i}", j) for i in range(11) for j in range(3)]
    assert len({line["output"] for line in lines if line["id"] == "r0"}) == 3
    assert len({line["output"] for line in lines if line["sample"] == 0}) == 11, "an example has draws of its own"


def test_an_empty_test_set_and_answers_to_other_examples_are_refused(tmp_path, model):
    policy, test_set = set_up(model)
    layerwise = dataclasses.replace(CONFIG, placement="layerwise")
    with pytest.raises(ConfigError, match=r"evaluate.placement=layerwise needs .*, or evaluate.placement=auto"):
        evaluate_arm(policy, test_set, layerwise, context_in(tmp_path / "layerwise"), arm="base")
    with pytest.raises(DataError, match="arithmetic: the test set is empty"):
        evaluate_arm(policy, TestSet(TASK, [], []), CONFIG, context_in(tmp_path), arm="base")
    evaluate_arm(policy, test_set, CONFIG, context_in(tmp_path), arm="base")
    fewer = TestSet(TASK, test_set.rows[:4], test_set.prompts[:4])
    with pytest.raises(DataError, match="has 11 lines, and there must be 1 answers to each of 4 examples"):
        evaluate_arm(policy, fewer, CONFIG, context_in(tmp_path), arm="base")


def judged(lines: bytes) -> list[dict]:
    return [json.loads(line) for line in lines.splitlines()]


@pytest.mark.parametrize("engine", ["hf_cb", pytest.param("command", marks=pytest.mark.slow)])
def test_another_engine_gives_the_same_answers(model, expected, tmp_path, engine):
    """Of the policy as it is, and projected."""
    (tmp_path / "program.py").write_text(PROGRAM)
    command = f"{sys.executable} {tmp_path / 'program.py'} {{model}} {{prompts}} {{output}} {{adapter}}"
    policy, test_set = set_up(model)
    context = dataclasses.replace(context_in(tmp_path / "run"), generate=Generate(command=command))
    config = dataclasses.replace(CONFIG, engine=engine)
    for arm, held_to in (("base", None), ("projected", projection())):
        evaluate_arm(policy, test_set, config, context, arm=arm, projection=held_to)
        found, ours = judged(answers_path(tmp_path / "run", arm, TASK.name).read_bytes()), judged(expected[arm])
        assert [one.pop("entropy") for one in found] == [None] * len(found)
        assert all(one.pop("entropy") > 0 for one in ours), "our own loop measures it"
        assert found == ours
        assert [path.name for path in (tmp_path / "run" / arm).iterdir()] == [f"{TASK.name}.jsonl"]


@pytest.mark.slow
def test_a_program_is_given_the_students_adapter(model, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    command = f"{sys.executable} {tmp_path / 'program.py'} {{model}} {{prompts}} {{output}}"
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with torch.random.fork_rng():
        get_peft_model(tiny_model(), lora).save_pretrained(tmp_path / "adapter")
    base, test_set = set_up(model)
    student = load_replica(Model(str(model)), Distributed(), world_of_this_process(), adapter=tmp_path / "adapter")
    student.eos_token_ids = base.eos_token_ids
    found = []
    for engine, words in (("hf", command), ("command", f"{command} {{adapter}}")):
        context = dataclasses.replace(context_in(tmp_path / engine), generate=Generate(command=words))
        evaluate_arm(student, test_set, dataclasses.replace(CONFIG, engine=engine), context, arm="spd")
        found.append(judged(answers_path(tmp_path / engine, "spd", TASK.name).read_bytes()))
    ours, theirs = [[one | {"entropy": None} for one in each] for each in found]
    assert ours == theirs
    context = dataclasses.replace(context_in(tmp_path / "lacks"), generate=Generate(command=command))
    with pytest.raises(ConfigError, match=r"generate.command: .* lacks \{adapter\}; engine=command needs a template"):
        evaluate_arm(student, test_set, dataclasses.replace(CONFIG, engine="command"), context, arm="spd")
