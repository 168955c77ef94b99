"""Fine-tuning gives the same losses and the same student on any number of ranks, sharded or whole, packed or not."""

import gc
import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from families import COMMON, FAMILIES
from finetuning import TINY, completions, train
from peft import PeftModel
from ranks import run_on_ranks
from safetensors.torch import load_file
from tiny import save_tiny_model, tiny_model, tiny_tokenizer
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from spd_dist.config import Distributed, Model
from spd_dist.distributed.training_engine import (
    accumulate,
    close_engine,
    optimizer_step,
    training_engine,
    training_settings,
)
from spd_dist.distributed.world import join_world
from spd_dist.distributed.zero import gathered, is_sharded, weights_fingerprint
from spd_dist.errors import ConfigError, DataError
from spd_dist.models.policy import load_replica
from spd_dist.stages.context import StageContext
from spd_dist.stages.finetune import finetune

TOKENS = torch.arange(3, 40)[None]


def train_and_keep(model: Path, folder: Path, zero_stage: int, changes: dict) -> None:
    """Train on these ranks; rank 0 writes the losses down."""
    trained = train(model, folder, distributed={"zero_stage": zero_stage}, **changes)
    policy = trained.policy
    assert weights_fingerprint(policy.model) == policy.fingerprint, "LoRA leaves the policy as it was"
    assert is_sharded(policy.model) == (zero_stage == 3)
    with torch.no_grad():
        torch.testing.assert_close(policy.model(TOKENS).logits, tiny_model()(TOKENS).logits)
    if dist.get_rank() == 0:
        torch.save(trained.losses, folder / "losses.pt")
    policy.release()
    held = weakref.ref(policy.model)
    del trained, policy
    gc.collect()
    assert held() is None, "no engine that has ended holds the model, which this process would keep for its life"


def plain_logits(base: Path, run: Path) -> torch.Tensor:
    """What a user of plain transformers and peft gets."""
    student = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "adapter").eval()
    with torch.no_grad():
        return student(TOKENS).logits


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def reference(model, tmp_path_factory) -> Path:
    """What one rank without ZeRO makes of it, all sequences of a step at once."""
    folder = tmp_path_factory.mktemp("reference")
    run_on_ranks(1, folder / "store", train_and_keep, model, folder / "run", 0, {"micro_batch_size": 8})
    return folder / "run"


@pytest.mark.parametrize(("world_size", "zero_stage", "changes"), [
    (1, 3, {"micro_batch_size": 3}),
    (2, 3, {"micro_batch_size": 2}),  # 2 ranks x 2 sequences x 2 accumulated
    pytest.param(4, 3, {"micro_batch_size": 2, "checkpointing": True}, marks=pytest.mark.slow),
    (2, 2, {"micro_batch_size": 4, "packing": True}),
    (4, 3, {"micro_batch_size": 1, "packing": True, "checkpointing": True}),
])  # fmt: skip
def test_losses_and_adapter_are_those_of_one_unsharded_rank(
    model, reference, tmp_path, world_size, zero_stage, changes
):
    run_on_ranks(world_size, tmp_path / "store", train_and_keep, model, tmp_path / "run", zero_stage, changes)
    expected, found = torch.load(reference / "losses.pt"), torch.load(tmp_path / "run/losses.pt")
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert found[-1] < found[0] - 0.3, "it learns"
    torch.testing.assert_close(plain_logits(model, tmp_path / "run"), plain_logits(model, reference), atol=1e-4, rtol=0)


def train_in_bfloat16(model: Path, folder: Path, micro_batch_sizes: Sequence[int]) -> None:
    """Train on these ranks in several orders of summation; rank 0 writes the losses down."""
    for size in micro_batch_sizes:
        trained = train(model, folder / str(size), dtype="bfloat16", micro_batch_size=size)
        if dist.get_rank() == 0:
            torch.save(trained.losses, folder / f"losses-{size}.pt")
    if dist.get_world_size() == 1:
        steps_are_kept_that_bfloat16_weights_would_round_away()


def steps_are_kept_that_bfloat16_weights_would_round_away() -> None:
    """Below 1/128 bfloat16 has steps of 3.1e-5: without float32 masters no number of steps of 1e-5 would move it."""
    for zero_stage in range(4):
        layer = torch.nn.Linear(8, 8, bias=False, dtype=torch.bfloat16)
        torch.nn.init.constant_(layer.weight, 1 / 128)
        settings = training_settings(Distributed(zero_stage=zero_stage), torch.bfloat16, max_grad_norm=1.0)
        engine = training_engine(layer, settings, learning_rate=1e-5, weight_decay=0.0)
        for _ in range(8):
            accumulate(engine, engine(torch.ones(1, 8, dtype=torch.bfloat16)).sum().float(), is_last=True)
            optimizer_step(engine)
        with gathered(layer.parameters()):
            assert (layer.weight < 1 / 128).all(), zero_stage
        close_engine(engine)


def test_in_bfloat16_two_ranks_are_no_farther_from_float32_than_one_rank_is(model, reference, tmp_path):
    """How far one rank is, in two orders of its sums, is what rounding makes of this training."""
    for world_size, sizes in ((1, (8, 3)), (2, (2,))):
        folder = tmp_path / str(world_size)
        run_on_ranks(world_size, tmp_path / f"store-{world_size}", train_in_bfloat16, model, folder, sizes)
    exact = torch.load(reference / "losses.pt")
    away = {
        (world_size, size): (torch.load(tmp_path / str(world_size) / f"losses-{size}.pt") - exact).abs().max().item()
        for world_size, size in ((1, 8), (1, 3), (2, 2))
    }
    assert 0 < away[2, 2] <= 2 * max(away[1, 8], away[1, 3]), away


def losses_of_a_plain_loop(model: Path) -> torch.Tensor:
    """Full fine-tuning written down with nothing but torch: one sequence at a time, no padding, no engine."""
    config = {"num_epochs": 2, "global_batch_size": 8, "learning_rate": 1e-3}
    student = AutoModelForCausalLM.from_pretrained(model)
    decayed = [parameter for parameter in student.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in student.parameters() if parameter.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config["learning_rate"])
    sequences = [torch.tensor(one.prompt_tokens + one.tokens) for one in completions()]
    losses, step = [], 0
    for epoch in range(config["num_epochs"]):
        for batch in order_of_epoch(epoch, [len(sequence) for sequence in sequences]):
            for group in optimizer.param_groups:
                group["lr"] = config["learning_rate"] * fraction(step, 6, 1)
            num_targets = sum(len(sequences[index]) - 1 for index in batch)
            loss = (
                sum(
                    cross_entropy(student(sequences[index][None]).logits[0, :-1], sequences[index][1:], reduction="sum")
                    for index in batch
                )
                / num_targets
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            step += 1
    return torch.tensor(losses, dtype=torch.float64)


def order_of_epoch(epoch: int, lengths: list[int]) -> list[list[int]]:
    from spd_dist.seeding import generator
    from spd_dist.stages.finetune.batching import global_batches

    return global_batches(lengths, TINY, generator(3, "finetune", "order", epoch))


def fraction(step: int, num_steps: int, num_warmup_steps: int) -> float:
    from spd_dist.stages.finetune.training import learning_rate_fraction

    return learning_rate_fraction(step, num_steps=num_steps, num_warmup_steps=num_warmup_steps)


def compare_full_with_the_plain_loop(model: Path, folder: Path, world_size: int) -> None:
    for zero_stage in (3, 1):
        trained = train(
            model, folder / str(zero_stage), distributed={"zero_stage": zero_stage}, mode="full", learning_rate=1e-3
        )
        torch.testing.assert_close(trained.losses, losses_of_a_plain_loop(model), atol=2e-5, rtol=0)
        loaded = AutoModelForCausalLM.from_pretrained(folder / str(zero_stage) / "model")
        assert weights_fingerprint(loaded) == weights_fingerprint(trained.policy.model) != trained.policy.fingerprint
        assert trained.summary.model is not None


@pytest.mark.parametrize("world_size", [2])
def test_full_fine_tuning_is_that_of_a_plain_loop_and_saves_what_it_trained(model, tmp_path, world_size):
    run_on_ranks(world_size, tmp_path / "store", compare_full_with_the_plain_loop, model, tmp_path / "run", world_size)


def train_in_every_mode(model: Path, folder: Path, names: Sequence[str] = ()) -> None:
    """Those named, or all but Muon, whose kernels torch compiles."""
    world = join_world(Distributed())
    expected = tiny_model()(TOKENS).logits
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    offload_all = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}}
    muon = {"optimizer": {"type": "Muon", "params": {"lr": 1e-3}}}
    modes = {
        "rslora": {"lora_variant": "rslora", "merge": True},
        "dora": {"lora_variant": "dora", "merge": True},
        "offload": {"distributed": {"deepspeed": offload}},
        "offload-all": {"distributed": {"deepspeed": offload_all}},
        "bf16": {"dtype": "bfloat16"},
        "muon": {"mode": "full", "distributed": {"zero_stage": 2, "deepspeed": muon}},
        "bf16-full": {"dtype": "bfloat16", "mode": "full", "learning_rate": 1e-3, "distributed": {"zero_stage": 2}},
        "prototype": {"pads_in_loss": True, "loss_on": "completion", "stop_on_train_loss": True},
    }
    for name in names or [name for name in modes if name != "muon"]:
        changes = modes[name]
        trained = train(model, folder / name, **changes)
        assert trained.losses[-1] < trained.losses[0] - 0.1, name
        product = "model" if changes.get("mode") == "full" else "adapter"
        optimizer = "DeepSpeed's Muon" if name == "muon" else "AdamW, learning rate"
        assert optimizer in (folder / name / product / "README.md").read_text()
        if changes.get("merge"):
            merged = AutoModelForCausalLM.from_pretrained(folder / name / "model")
            replica = load_replica(Model(name=str(model)), Distributed(), world, adapter=folder / name / "adapter")
            torch.testing.assert_close(merged(TOKENS).logits, replica.model(TOKENS).logits, atol=1e-4, rtol=1e-4)
            assert not torch.allclose(merged(TOKENS).logits, expected)
            kept = f"left by rounding | {trained.summary.model.delta_kept_fraction:.4f} or more, least in "
            assert kept in (folder / name / "model/README.md").read_text()


def test_a_merge_that_bfloat16_rounds_away_is_refused_and_the_adapter_is_saved_without_it(tmp_path):
    model, student = save_tiny_model(tmp_path / "model"), tmp_path / "student"
    short = {"distributed": {"zero_stage": 0}, "dtype": "bfloat16", "num_epochs": 1, "learning_rate": 1e-5}
    with pytest.raises(DataError, match=r"finetune.merge: rounded to bfloat16, model.layers.* finetune.merge=false"):
        train(model, student, **short, merge=True)
    assert not (student / "model").exists()
    again = train(model, student, **short)
    assert again.rows == [], "no step was done again"
    assert again.summary.adapter is not None
    assert again.summary.model is None
    assert (student / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_every_mode_learns_and_saves_what_it_learned(model, tmp_path):
    run_on_ranks(2, tmp_path / "store", train_in_every_mode, model, tmp_path / "run")


def save_tied_experts(folder: Path) -> None:
    """A mixture of experts whose head is its embedding, with the vocabulary of the completions."""
    config = AutoConfig.for_model("qwen3_moe", **COMMON | FAMILIES["qwen3_moe"].settings | {"vocab_size": 259})
    config.tie_word_embeddings = True
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def train_experts(model: Path, folder: Path) -> None:
    """LoRA that is merged, and full: both on shards."""
    sharded = {"zero_stage": 3, "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
    targets = ("q_proj", "k_proj", "v_proj")
    train(model, folder / "lora", distributed=sharded, num_epochs=1, merge=True, lora_targets=targets)
    train(model, folder / "full", distributed=sharded, num_epochs=1, mode="full", learning_rate=1e-3)


def test_experts_that_were_trained_on_shards_are_whole_tied_and_merged_as_the_adapter(tmp_path):
    model, run = tmp_path / "model", tmp_path / "run"
    save_tied_experts(model)
    run_on_ranks(2, tmp_path / "store", train_experts, model, run)
    base = AutoModelForCausalLM.from_pretrained(model).state_dict()
    for name in ("lora", "full"):
        tensors = load_file(run / name / "model" / "model.safetensors")
        assert all(tensor.numel() for tensor in tensors.values())
        assert "lm_head.weight" not in tensors, "it is the embedding"
        loaded, info = AutoModelForCausalLM.from_pretrained(run / name / "model", output_loading_info=True)
        assert not info["missing_keys"]
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        found = loaded.state_dict()
        assert {key: tensor.shape for key, tensor in found.items()} == {key: base[key].shape for key in base}
        assert any(not torch.equal(found[key], base[key]) for key in base)
    adapter = load_file(run / "lora" / "adapter" / "adapter_model.safetensors")
    assert all(tensor.any() for key, tensor in adapter.items() if "lora_B" in key)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(run / "lora" / "model").eval()(TOKENS).logits
    torch.testing.assert_close(merged, plain_logits(model, run / "lora"), atol=3e-5, rtol=0)


@pytest.mark.slow
def test_muon_learns(model, tmp_path):
    run_on_ranks(2, tmp_path / "store", train_in_every_mode, model, tmp_path / "run", ["muon"])


def keep_the_best_epoch(model: Path, folder: Path) -> None:
    """A learning rate that ruins the model: the first epoch is the best."""
    shared = {"learning_rate": 0.1, "num_epochs": 6, "warmup_epochs": 1.0, "validation_fraction": 0.2}
    best = train(model, folder / "best", keep_best=True, patience=1, keep_checkpoints=1, **shared)
    epochs = best.summary.epochs
    validation = [epoch["validation_loss"] for epoch in epochs]
    assert best.summary.num_validation_sequences == 4
    assert best.summary.stopped_early, validation
    steps_per_epoch = 3
    assert best.summary.saved_step == (1 + validation.index(min(validation))) * steps_per_epoch < best.summary.num_steps
    last = train(model, folder / "last", **shared)
    assert last.summary.saved_step == 18
    for name in ("best", "last"):
        loss = validation_loss(model, folder / name)
        assert loss == pytest.approx(
            min(validation) if name == "best" else last.summary.epochs[-1]["validation_loss"], abs=1e-4
        )


def validation_loss(model: Path, run: Path) -> float:
    from spd_dist.seeding import generator
    from spd_dist.stages.finetune.sequences import held_out, training_sequences

    sequences = training_sequences(completions(), TINY, pad_token_id=0)
    _, validation = held_out(sequences, 0.2, generator(3, "finetune", "held out"))
    student = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), run / "adapter").eval()
    total, count = 0.0, 0
    for sequence in validation:
        tokens = torch.tensor(sequence.tokens)
        with torch.no_grad():
            total += cross_entropy(student(tokens[None]).logits[0, :-1], tokens[1:], reduction="sum").item()
        count += len(tokens) - 1
    return total / count


@pytest.mark.slow
def test_the_best_epoch_is_kept_and_training_stops_after_patience(model, tmp_path):
    run_on_ranks(2, tmp_path / "store", keep_the_best_epoch, model, tmp_path / "run")


def refuse_what_is_wrong(model: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"finetune\.lora_targets: \['c_attn'\] are no linear modules"):
        train(model, folder, lora_targets=("c_attn",))
    with pytest.raises(ConfigError, match=r"finetune\.liger: True is not valid on the CPU; set finetune\.liger=false"):
        train(model, folder, liger=True)
    muon = {"optimizer": {"type": "Muon", "params": {"lr": 1e-3}}}
    with pytest.raises(ConfigError, match=r"DeepSpeed does not take these settings: Muon and reduce scatter cannot"):
        train(model, folder, mode="full", distributed={"deepspeed": muon})
    world = join_world(Distributed())
    policy = load_replica(Model(name=str(model)), Distributed(), world)
    with torch.no_grad():
        policy.model.lm_head.weight[0, 0] += 1
    with pytest.raises(DataError, match=r"the weights of .* changed since they were loaded, .* load the policy again"):
        finetune(policy, completions(), TINY, StageContext(folder=folder, seed=0, world=world))


def test_changed_weights_and_unknown_targets_are_refused_on_all_ranks(model, tmp_path):
    run_on_ranks(2, tmp_path / "store", refuse_what_is_wrong, model, tmp_path / "run")
