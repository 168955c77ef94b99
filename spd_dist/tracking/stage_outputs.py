"""What a finished stage gives to the metrics: curves, tables and histograms of its artifacts, and these as products
with their lineage, each of which says the hashes of its inputs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path

from spd_dist.analysis.corpus import corpus_stats
from spd_dist.analysis.report import Report, StageTotal
from spd_dist.config import STAGES
from spd_dist.storage.completions import open_corpus
from spd_dist.storage.manifests import hash_of, read_manifest
from spd_dist.storage.records import read_record
from spd_dist.storage.subspace_file import SiteSummary, SubspaceSummary
from spd_dist.storage.tables import num_tokens_of
from spd_dist.tracking.metrics import MetricLogger, Product

NUM_SAMPLES = 32
"""Completions in a table."""
NUM_POINTS = 256
"""Directions of a spectrum that are shown: the first ones all, then fewer and fewer."""
COST = ("seconds", "device_hours", "peak_memory_gib")
REPORT_FILES = ("report.json", "report.html")
MECHANISM_FILES = ("mechanism.json", "details.json", "rows.parquet", "mechanism.html")


def show_stage(metrics: MetricLogger, run_folder: Path, stage: str) -> None:
    """Show what `stage` made; `metrics` carry its arm's label."""
    verb, folder = stage.rpartition("/")[2], run_folder / stage
    if verb == "project":
        show_subspace(metrics, read_record(folder / "summary.json", SubspaceSummary).sites)
    if verb == "generate":
        show_corpus(metrics, folder)


def show_subspace(metrics: MetricLogger, sites: Mapping[str, SiteSummary]) -> None:
    """Spectra and energy curves over the directions, strongest first; and what is certified, as a table."""
    curves = {_plain(name): _curves(site.spectrum) for name, site in sites.items()}
    widest = max(len(singular) for singular, _ in curves.values())
    for direction in _thinned(widest):
        values: dict[str, float] = {}
        for name, (singular, energy) in curves.items():
            if direction <= len(singular):
                values[f"{name}_singular_value"] = singular[direction - 1]
                values[f"{name}_energy_fraction"] = energy[direction - 1]
        metrics.log("project", values, direction)
    described = ("width", "rank", "energy_fraction", "num_rows", "sketch_size", "certified_energy_fraction")
    proven = (*described, "certified_energy_share", "angle_bound", "num_null_directions")
    certificate = tuple(vars(next(iter(sites.values())).certificate))
    rows = [
        [name, *(vars(site)[key] for key in proven[:-2]), str(site.angle_bound), site.num_null_directions,
         *vars(site.certificate).values()]
        for name, site in sites.items()
    ]  # fmt: skip
    # A site's own count of rows is that of its certificate.
    metrics.table("project", "certificates", ["site", *proven, *(f"sketch_{key}" for key in certificate)], rows)


def show_corpus(metrics: MetricLogger, folder: Path) -> None:
    """Rates, lengths, and the first completions."""
    completions = open_corpus(folder / "completions")
    stats = corpus_stats(completions)
    rates = {name: value for name, value in vars(stats).items() if name.endswith("_rate")}
    rates |= {"mean_tokens": stats.mean_tokens, "median_tokens": stats.median_tokens, "max_tokens": stats.max_tokens}
    metrics.log("generate", rates, stats.num_completions)
    metrics.histogram("generate", "length_tokens", num_tokens_of(completions, "tokens").tolist())
    samples = [[one.id, one.sample, one.text, one.finish_reason, len(one.tokens)] for one in completions[:NUM_SAMPLES]]
    metrics.table("generate", "samples", ["id", "sample", "text", "finish_reason", "num_tokens"], samples)


def show_cost(metrics: MetricLogger, cost: Mapping[str, StageTotal]) -> None:
    """What each stage took of the machines: as metrics, and as a table."""
    for number, (stage, entry) in enumerate(cost.items(), 1):
        label = stage.removeprefix("arms/").replace("/", "_")
        values = {f"{label}_{name}": vars(entry)[name] for name in COST if vars(entry)[name] is not None}
        metrics.log("cost", values, number)
    columns = ["stage", "world_size", *COST]
    rows = [[stage, entry.world_size, *(vars(entry)[name] for name in COST)] for stage, entry in cost.items()]
    metrics.table("cost", "stages", columns, rows)


def _plain(site: str) -> str:
    """`layers.15.key` as `layer15_key`: in a metric's name, a dot would mean a level."""
    _, layer, kind = site.split(".")
    return f"layer{layer}_{kind}"


def _curves(spectrum: list[float]) -> tuple[list[float], list[float]]:
    """Singular values of the gradient rows, and the share of the energy in the directions so far."""
    total = sum(spectrum)
    return [math.sqrt(value) for value in spectrum], [part / total for part in itertools.accumulate(spectrum)]


def _thinned(count: int) -> list[int]:
    """1 to `count`, in at most about `NUM_POINTS` steps that grow."""
    directions, direction = [], 1
    while direction < count:
        directions.append(direction)
        direction = max(direction + 1, math.ceil(direction * (1 + 4 / NUM_POINTS)))
    return [*directions, count]


def product_of(run_folder: Path, stage: str) -> Product | None:
    """What a finished stage made; None if that is nothing to hand on.

    Adapters and subspaces are small, and copied. Models and corpora stay where they are, and are known by their hashes.
    """
    folder = run_folder / stage
    verb = stage.rpartition("/")[2]
    label = f"{stage.split('/')[1]}-" if "/" in stage else ""
    manifest = read_manifest(folder)
    metadata = {
        "stage": stage,
        "run_dir": str(run_folder.resolve()),
        "inputs": dict(manifest.inputs),
        "output_hash": hash_of(manifest),
        "world_size": manifest.world_size,
    }
    if verb == "project":
        paths = (folder / "subspace.safetensors", folder / "summary.json")
        found = read_record(folder / "summary.json", SubspaceSummary)
        sites = {name: {"rank": one.rank, "energy_fraction": one.energy_fraction} for name, one in found.sites.items()}
        return Product("subspace", "subspace", paths, {**metadata, **found.metadata, "sites": sites})
    if verb == "mechanism":
        return Product("mechanism", "report", tuple(folder / name for name in MECHANISM_FILES), metadata)
    if verb == "generate":
        return Product(f"{label}corpus", "corpus", (folder / "completions",), metadata, is_copied=False)
    if verb == "finetune":
        kind = "adapter" if (folder / "adapter").is_dir() else "model"
        return Product(f"{label}{kind}", kind, (folder / kind,), metadata, is_copied=kind == "adapter")
    return None


def report_product(run_folder: Path, report: Report) -> Product:
    """The comparison of the arms, made from everything else."""
    paths = tuple(run_folder / name for name in REPORT_FILES if (run_folder / name).exists())
    values = {arm: result.value for arm, result in report.arms.items()}
    manifest = read_manifest(run_folder / "evaluate")
    metadata = {"inputs": dict(manifest.inputs), "task": report.task, "metric": report.metric, "values": values}
    return Product("report", "report", paths, metadata | {"run_dir": str(run_folder.resolve())})


def job_type(first: str, last: str) -> str:
    """What W&B calls a job from one stage to another: the folder that it fills, or `pipeline` if there are several."""
    jobs = {"project" if stage in STAGES[:4] else stage for stage in (first, last)}
    return jobs.pop() if len(jobs) == 1 else "pipeline"
