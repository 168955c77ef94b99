"""The comparison of arms: `report.json` with every number, and a table for the terminal."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spd_dist.analysis.answer_summary import answers_summary, sample_measures
from spd_dist.analysis.comparison import comparisons, verdict
from spd_dist.analysis.notes import (
    blind_notes,
    judge_notes,
    judges_of,
    never_right_notes,
    notes,
    overlap_notes,
    shown_notes,
    size_notes,
)
from spd_dist.analysis.report import ArmResult, Curves, Report, StageTotal
from spd_dist.analysis.side_comparisons import decode_controls, forgetting_notes, other_tasks
from spd_dist.analysis.subspace_algebra import angles
from spd_dist.storage.answers import answers_path, read_answers, router_path
from spd_dist.storage.artifacts import content_hash
from spd_dist.storage.manifests import MANIFEST, finished_stages, read_manifest
from spd_dist.storage.records import read_fields, write_record
from spd_dist.tracking.metrics import MetricLogger, training_losses
from spd_dist.types import Answer, LeakReport, record_of

NUM_SAMPLES = 32
"""Answers of each arm in the table that W&B shows."""
LEFT_OUT = ("interval", "sentence", "metric", "pass_at_k", "reasons", "samples")
"""What that of the arms, a column a number, does not show."""


@dataclass(frozen=True)
class Asked:
    """What the arms of a run were asked."""

    task: str
    metric: str
    """The task's."""
    seed: int
    """The run's, for the bootstrap."""
    temperature: float = 0.0
    """That arms answered at."""
    also: tuple[tuple[str, str], ...] = ()
    """Tasks of other domains that they answered, too, each with its metric."""
    test_size: int | None = None
    """Rows of the task's published test split, if there is one."""
    made: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By arm, under which names its stages stand in the run folder: its iterations, the last its own.

    What has another name is of arms that the run had before. If nothing is said, all counts.
    """

    def counts(self, stage: str) -> bool:
        """Whether a stage's folder is of one of the arms."""
        top, _, rest = stage.partition("/")
        names = {one for each in self.made.values() for one in each}
        if top == "evaluate" and rest:
            return rest in self.made or not names
        name = rest.partition("/")[0] if top == "arms" else "spd" if stage in ("generate", "finetune") else None
        return not names or name is None or name in names


def write_report(
    run_folder: Path,
    arms: Mapping[str, str],
    asked: Asked,
    overlaps: Sequence[LeakReport] = (),
) -> Report:
    """Compare the arms of a finished evaluation, write `report.json`, and give what it holds. On one rank only.

    `arms` has the sentence of each, in their order: differences are taken from the first.

    Raises:
        DataError: answers are missing, arms answered different examples, or a subspace is corrupt.
    """
    task, metric, seed = asked.task, asked.metric, asked.seed
    answers = {arm: read_answers(answers_path(run_folder / "evaluate", arm, task)) for arm in arms}
    results = {arm: _result(answers[arm], metric, sentence) for arm, sentence in arms.items()}
    first = next(iter(results.values()))
    found = comparisons(answers, metric, seed)
    stages = {stage: one for stage, one in _summaries(run_folder).items() if asked.counts(stage)}
    routed = _routers(run_folder, arms, task)
    controls = decode_controls(answers, metric, seed)
    others = other_tasks(_of_others(run_folder, arms, asked), dict(asked.also), seed)
    report = Report(
        task=task,
        metric=metric,
        judged_by=", ".join(sorted(judges_of(answers))),
        seed=seed,
        temperature=asked.temperature,
        num_samples=first.num_samples,
        examples=content_hash(sorted({(answer.id, answer.gold) for answer in next(iter(answers.values()))})),
        verdict=" ".join([*(one.sentence for one in controls), verdict(found, metric)]),
        decode_controls=controls,
        test_size=asked.test_size,
        notes=[
            *never_right_notes(results, metric),
            *shown_notes(found, metric),
            *notes(results),
            *forgetting_notes(others),
            *blind_notes(found),
            *size_notes(first.num_examples, asked.test_size),
            *judge_notes(answers),
            *overlap_notes(overlaps),
            *_router_notes(routed),
            *_match_notes(stages),
        ],
        overlaps=list(overlaps),
        arms=results,
        comparisons=found,
        other_tasks=others,
        cost={stage: one for stage, one in cost(run_folder, _tokens(stages, results)).items() if asked.counts(stage)},
        stages=stages | {f"evaluate/{arm}": {"routers": one} for arm, one in routed.items()},
        losses=_losses(run_folder, asked, stages),
        iterations={arm: list(names) for arm, names in asked.made.items() if len(names) > 1},
        angles=angles(run_folder, arms),
        artifacts=_artifacts(run_folder),
    )
    write_record(run_folder / "report.json", report)
    return report


def _result(answers: Sequence[Answer], metric: str, sentence: str) -> ArmResult:
    samples = {} if metric == "nll" else sample_measures(answers)
    return record_of(ArmResult, {**vars(answers_summary(answers, metric)), "sentence": sentence, "samples": samples})


def _of_others(run_folder: Path, arms: Iterable[str], asked: Asked) -> dict[str, dict[str, list[Answer]]]:
    folder = run_folder / "evaluate"
    return {task: {arm: read_answers(answers_path(folder, arm, task)) for arm in arms} for task, _ in asked.also}


def cost(run_folder: Path, tokens: Mapping[str, int]) -> dict[str, StageTotal]:
    """Tokens, seconds, ranks, device hours and peak memory of every finished stage, by its folder.

    Of all its attempts; world size and peak memory are of the last. What was taken over from another arm or run took
    none. Later rounds are added with their reports (`add_rounds`).
    """
    found = {}
    folders = finished_stages(run_folder, rounds=[""])
    for folder in sorted(folders, key=lambda folder: (folder / MANIFEST).stat().st_mtime_ns):
        manifest, stage = read_manifest(folder), folder.relative_to(run_folder).as_posix()
        if stage.endswith("evaluate"):
            continue  # the sum of what its arms did
        found[stage] = StageTotal(
            tokens=tokens.get(stage) if manifest.taken_from is None else 0,
            seconds=manifest.seconds,
            world_size=manifest.world_size,
            device_hours=manifest.device_seconds / 3600,
            peak_memory_gib=manifest.extra.get("peak_memory_gib"),
            finished_at=manifest.finished_at,
        )
    return found


def _losses(run_folder: Path, asked: Asked, stages: Mapping[str, Mapping[str, Any]]) -> Curves:
    """Of the arms that count, up to the last step of each: those of an earlier, longer training stand behind it."""
    found: dict[str, dict[str, list[Any]]] = {}
    for arm, one in training_losses(run_folder).items():
        stage = "finetune" if arm == "spd" else f"arms/{arm}/finetune"
        if asked.counts(stage):
            last = stages.get(stage, {}).get("num_steps", math.inf)
            num = sum(step <= last for step in one["steps"])
            found[arm] = {"steps": one["steps"][:num], "losses": one["losses"][:num]}
    return found


def _tokens(stages: Mapping[str, Mapping[str, Any]], arms: Mapping[str, ArmResult]) -> dict[str, int]:
    """What each stage read, wrote or was trained on, as far as summaries say."""
    found = {f"evaluate/{arm}": result.num_tokens for arm, result in arms.items()}
    for stage, summary in stages.items():
        if stage.endswith("project") and "masks" in summary:
            found[stage] = summary["masks"]["num_tokens"]
        elif stage.endswith("generate"):
            found[stage] = summary["num_tokens"]
        elif stage.endswith("finetune"):
            found[stage] = summary["num_targets"] * len(summary["epochs"])
    return found


def log_report(metrics: MetricLogger, run_folder: Path, report: Report) -> None:
    """The arms as metrics, and as tables of the mirror: numbers, and answers side by side."""
    values = {f"{arm}_{report.metric}": result.value for arm, result in report.arms.items()}
    values |= {f"{one.before}_to_{one.after}_difference": one.difference for one in report.comparisons}
    metrics.log("evaluate", values, next(iter(report.arms.values())).num_examples)
    columns = [item.name for item in dataclasses.fields(ArmResult) if item.name not in LEFT_OUT]
    rows = [[arm, *(vars(result)[name] for name in columns)] for arm, result in report.arms.items()]
    metrics.table("evaluate", "arms", ["arm", *columns], rows)
    answers = [read_answers(answers_path(run_folder / "evaluate", arm, report.task)) for arm in report.arms]
    for arm, given in zip(report.arms, answers, strict=True):
        metrics.histogram("evaluate", f"{arm}_length_tokens", [one.num_tokens for one in given])
    samples = [[row[0].id, row[0].gold, *(one.output for one in row)] for row in zip(*answers, strict=True)]
    metrics.table("evaluate", "answers", ["id", "gold", *report.arms], samples[:NUM_SAMPLES])


def _summaries(run_folder: Path) -> dict[str, Mapping[str, Any]]:
    """What the stages before summed up, by their folder: the report holds every number."""
    names = [f"{place}/summary.json" for place in ("*", "arms/*/*")] + ["arms/*/match/match.json"]
    return {
        file.parent.relative_to(run_folder).as_posix(): read_fields(file)
        for file in sorted(file for name in names for file in run_folder.glob(name))
        if file.parent.name in ("project", "generate", "finetune", "match")
    }


def _routers(run_folder: Path, arms: Iterable[str], task: str) -> dict[str, dict[str, Any]]:
    """What the routers of each arm chose on the same prompts, if the model has any.

    `moved` is the share of choices that the first arm makes otherwise: half the distance of the shares, the mean over
    layers.
    """
    files = {arm: router_path(answers_path(run_folder / "evaluate", arm, task)) for arm in arms}
    found: dict[str, dict[str, Any]] = {arm: read_fields(file) for arm, file in files.items() if file.exists()}
    first = next(iter(found.values()), {})
    for one in found.values():
        pairs = [zip(own, base, strict=True) for own, base in zip(one["shares"], first["shares"], strict=True)]
        one["moved"] = sum(abs(a - b) for layer in pairs for a, b in layer) / 2 / max(1, len(first["shares"]))
    return found


def _router_notes(routed: Mapping[str, Mapping[str, Any]]) -> list[str]:
    parts = [
        f"{arm} {one['entropy']:.3f} of an even spread, the busiest expert {one['largest_load']:.2f} times its part, "
        f"{one['num_unused']} of {one['num_layers'] * one['num_experts']} unused, {one['moved']:.1%} moved"
        for arm, one in routed.items()
    ]
    return [f"Routers on the prompts: {'; '.join(parts)}."] if parts else []


def _match_notes(stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How random controls were made to move the policy as far as the method does, and which could not be."""
    found = {stage.split("/")[1]: one for stage, one in stages.items() if stage.endswith("/match")}
    parts = [
        f"{arm.upper()} {'keeps' if one['is_matched'] else 'is NOT at equal KL: it keeps'} {one['share']:.2f} of its "
        f"projection, KL {one['random_kl']:.4f} against {one['kl']:.4f} nats a token on {one['num_rows']} rows"
        for arm, one in found.items()
    ]
    return [f"Random subspaces at equal KL: {'; '.join(parts)}."] if parts else []


def _artifacts(run_folder: Path) -> dict[str, str]:
    """What there is to open, by what it is."""
    known = {
        "the capability subspace": "project/subspace.safetensors",
        "what the projected policy wrote": "generate/completions/completions.jsonl",
        "the adapter": "finetune/adapter",
        "the fine-tuned model": "finetune/model",
        "every answer of every arm": "evaluate",
        "this comparison, every number": "report.json",
        "the same to read in a browser": "report.html",
        "all metrics": "metrics",
    }
    written_after = ("report.json", "report.html")
    return {what: path for what, path in known.items() if path in written_after or (run_folder / path).exists()}
