"""The card of what is pushed: base model, method, and the comparison with the base model as the hub's `model-index`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import DatasetCardData, EvalResult, ModelCard, ModelCardData

from spd_dist.analysis.corpus import corpus_stats, load_corpus
from spd_dist.analysis.report import Report
from spd_dist.arms import Arm
from spd_dist.config import Config
from spd_dist.data.sources import is_file_name, parse_source, sources_of
from spd_dist.data.tasks import find_task
from spd_dist.models.model_card import IN_REPORT, THIS_FOLDER
from spd_dist.storage.records import read_fields
from spd_dist.storage.subspace_file import load_subspace

PAPER = "arXiv 2605.22675"
TAGS = ["self-policy-distillation", "spd_dist"]
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
"""The hub's words for a number of rows: fewer than, and what to call it."""


@dataclass(frozen=True)
class Published:
    """What a card says of the thing itself."""

    address: str
    """Its repository."""
    config: Config
    """Of its run, with the settings that its arm has for its own."""
    arm: Arm
    base_model: str
    """By the name that others load it by."""
    is_base_on_hub: bool

    @property
    def hub_base(self) -> str | None:
        """The base model, where the hub can link to it: a path of this machine is no one else's."""
        return self.base_model if self.is_base_on_hub else None


def student_card(published: Published, own_card: Path, report: Report | None, relation: str) -> str:
    """The card that finetune wrote, with an address, the comparison, and metadata that the hub reads.

    Args:
        published: What it is of.
        own_card: `README.md` beside the student.
        report: The run's `report.json`, if it has been written.
        relation: As the hub calls it: adapter, or finetune.
    """
    card: Any = ModelCard(own_card.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    text = card.text.replace(f'"{THIS_FOLDER}"', f'"{published.address}"')
    text = text.replace(published.config.model.name, published.base_model)
    if report is not None and published.arm.name in report.arms:
        text = text.replace(IN_REPORT, results_text(report))
    results = [] if report is None else eval_results(published, report)
    data = ModelCardData(
        base_model=published.hub_base,
        pipeline_tag="text-generation",
        base_model_relation=relation if published.is_base_on_hub else None,
        license=card.data.license,
        library_name=card.data.library_name,
        tags=card.data.tags,
        model_name=published.address.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n{text}"


def eval_results(published: Published, report: Report) -> list[EvalResult]:
    """What the arm reached on the held-out examples, for the hub's `model-index`; nothing if it was not evaluated."""
    summary = report.arms.get(published.arm.name)
    if summary is None:
        return []
    task, data = find_task(published.config.data.task), published.config.data
    source = parse_source((sources_of(task, "test", data) or task.name).split(",")[0].strip(), "test")
    is_shared = source.name != "builtin" and not is_file_name(source.name)
    metric = "nll" if report.metric == "nll" else "accuracy"
    low, high = summary.interval
    manner = "greedy" if report.temperature == 0 else f"{report.num_samples} samples at {report.temperature:g}"
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=source.name if is_shared else task.name,
            dataset_name=task.name,
            dataset_config=(source.subset or None) if is_shared else None,
            dataset_split=source.split or "test",
            dataset_revision=source.revision,
            metric_type=metric,
            metric_value=summary.value,
            metric_name=f"{metric}, {manner}, n {summary.num_examples}, 95 % interval {low:.4f} to {high:.4f}",
        )
    ]


def results_text(report: Report) -> str:
    """The comparison of the run's arms, in Markdown."""
    rows = [
        f"| {name} | {arm.sentence} | {arm.value:.4f} | {arm.interval[0]:.4f} to {arm.interval[1]:.4f} "
        f"| {arm.num_examples} |"
        for name, arm in report.arms.items()
    ]
    head = f"| arm | what it is | {report.metric} | 95 % interval | n |\n|---|---|--:|--:|--:|"
    notes = "".join(f"\n- {note}" for note in report.notes)
    title = f"## {report.task}, held-out examples, seed {report.seed}"
    return "\n".join([title, "", head, *rows, "", report.verdict, notes])


def subspace_card(published: Published, file: Path) -> str:
    """The card of a subspace: where it is, how much of the gradients' energy it holds, how to load it."""
    subspace = load_subspace(file)
    data = ModelCardData(base_model=published.hub_base, library_name="spd_dist", tags=[*TAGS, "capability-subspace"])
    shown = {"published": published, "sites": subspace.sites, "metadata": subspace.metadata}
    return _rendered("subspace_card.md.j2", data.to_yaml(), shown)


def corpus_card(published: Published, folder: Path) -> str:
    """The card of a corpus: who wrote it, how it was sampled, its numbers, what a row holds."""
    stats = corpus_stats(load_corpus(folder))
    num = stats.num_completions
    data: Any = DatasetCardData(
        task_categories=["text-generation"],
        size_categories=[next((word for bound, word in SIZES if num < bound), "n>1M")],
        tags=[*TAGS, "synthetic"],
        configs=[{"config_name": "default", "data_files": "completions.jsonl"}],
    )
    if published.is_base_on_hub:
        data.base_model = published.base_model  # a field of the hub's, of which its class knows nothing
    summary = read_fields(folder.parent / "summary.json")
    shown = {"published": published, "stats": stats, "engine": summary["engine"]}
    return _rendered("corpus_card.md.j2", data.to_yaml(), shown)


def _rendered(name: str, header: str, shown: Mapping[str, object]) -> str:
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return f"---\n{header}\n---\n\n" + environment.from_string(text).render({**shown, "paper": PAPER})
