"""What the stages of a run folder made, as products with their lineage: every one says the hashes of its inputs."""

from __future__ import annotations

from pathlib import Path

from spd_dist.analysis.report import Report
from spd_dist.config import STAGES
from spd_dist.storage.manifests import hash_of, read_manifest
from spd_dist.storage.records import read_record
from spd_dist.storage.subspace_file import SubspaceSummary
from spd_dist.tracking.metrics import Product

REPORT_FILES = ("report.json", "report.html")
MECHANISM_FILES = ("mechanism.json", "details.json", "rows.parquet", "mechanism.html")


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
