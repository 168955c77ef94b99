"""What the page shows, and where it comes from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from omegaconf import OmegaConf

from spd_dist.config import Config
from spd_dist.runtime.answers import answers_path, read_answers
from spd_dist.runtime.artifacts import read_json, write_text
from spd_dist.runtime.metrics import read_metrics
from spd_dist.runtime.page import figures
from spd_dist.runtime.run_folder import settings_by_key
from spd_dist.runtime.subspace_file import load_subspace
from spd_dist.types import Answer

NUM_SHOWN = 200
"""Examples on the page; those on which arms differ come first."""


def write_page(run_folder: Path, report: Mapping[str, Any], questions: Mapping[str, str]) -> None:
    """Write `report.html` beside `report.json`: figures, tables and answers inside, nothing loaded from elsewhere.

    Args:
        run_folder: The run's.
        report: As `report.json` holds it.
        questions: What the arms were asked, by example id.

    Raises:
        DataError: an artifact that the page shows is corrupt.
    """
    answers = {arm: read_answers(answers_path(run_folder / "evaluate", arm, report["task"])) for arm in report["arms"]}
    loader = PackageLoader("spd_dist.runtime.page", ".")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, loader=loader, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template("page.html.j2").render(
        report=report,
        figures=_figures(run_folder, report, answers),
        examples=side_by_side(answers, questions)[:NUM_SHOWN],
        num_examples=len(next(iter(answers.values()))),
        differing=_config_diff(run_folder),
        environment=_environment(run_folder),
        percent=lambda value: f"{100 * value:.1f}",
        signed=lambda value: f"{100 * value:+.1f}" if report["metric"] != "nll" else f"{value:+.3f}",
        value=lambda value: f"{100 * value:.1f}" if report["metric"] != "nll" else f"{value:.3f}",
    )
    write_text(run_folder / "report.html", text)


def side_by_side(answers: Mapping[str, Sequence[Answer]], questions: Mapping[str, str]) -> list[dict[str, Any]]:
    """Every example with all arms' answers: first where arms differ in being right, then in what they say."""
    examples = []
    for rows in zip(*answers.values(), strict=True):
        differs = 2 * (len({row.correct for row in rows}) > 1) + (len({row.output for row in rows}) > 1)
        examples.append(
            {
                "id": rows[0].id,
                "question": questions.get(rows[0].id, ""),
                "gold": rows[0].gold,
                "kind": ("same", "other words", "right and wrong", "right and wrong")[differs],
                "differs": differs,
                "answers": dict(zip(answers, rows, strict=True)),
            }
        )
    return sorted(examples, key=lambda example: -example["differs"])


def _figures(
    run_folder: Path, report: Mapping[str, Any], answers: Mapping[str, Sequence[Answer]]
) -> list[dict[str, Any]]:
    """Title, sentence and SVG of what there is to draw."""
    found: list[tuple[str, str, str | None]] = []
    if report["comparisons"]:
        sentence = "Same examples, 95 % bootstrap intervals; a hollow dot is a difference that is not shown."
        found.append(("Paired differences", sentence, figures.forest(report["comparisons"], report["metric"])))
    found.append(("Lengths and endings", "A model that only learned to stop shows it here.", figures.lengths(answers)))
    losses = training_losses(run_folder)
    if losses:
        found.append(("Training", "Loss of each student on its own corpus.", figures.curves(losses)))
    if "project" in report["stages"]:
        sentence = "Spectrum of the gradients at each site, and how much of it the subspace keeps."
        found.append(("Capability subspace", sentence, figures.spectra(report["stages"]["project"])))
    file = run_folder / "project" / "subspace.safetensors"
    if file.exists():
        sentence = "90 degrees: nothing in common; 0: a shared direction."
        found.append(("Principal angles between sites", sentence, figures.principal_angles(load_subspace(file))))
    return [{"title": title, "sentence": text, "svg": Markup(drawn)} for title, text, drawn in found if drawn]


def training_losses(run_folder: Path) -> dict[str, dict[int, float]]:
    """Loss by step of every arm that was fine-tuned; of a step that was done again after a kill, the last."""
    losses: dict[str, dict[int, float]] = {}
    for row in read_metrics(run_folder / "metrics"):
        for key, value in row.items():
            name = key.removeprefix("finetune/")
            is_loss = name == "loss" or (
                name.endswith("_loss") and not name.endswith(("epoch_loss", "validation_loss"))
            )
            if key != name and is_loss and isinstance(value, float):
                losses.setdefault(name.removesuffix("loss").rstrip("_") or "spd", {})[row["step"]] = value
    return {arm: dict(sorted(by_step.items())) for arm, by_step in sorted(losses.items())}


def _config_diff(run_folder: Path) -> list[tuple[str, Any, Any]]:
    """Key, default and value of every setting that is not the default."""
    file = run_folder / "config.yaml"
    if not file.exists():
        return []
    ours = settings_by_key(OmegaConf.to_container(OmegaConf.load(file)))
    default = settings_by_key(dataclasses.asdict(Config()))
    keys = sorted(ours.keys() | default.keys())
    return [(key, default.get(key), ours.get(key)) for key in keys if ours.get(key) != default.get(key)]


def _environment(run_folder: Path) -> Mapping[str, Any]:
    file = run_folder / "environment.json"
    return read_json(file) if file.exists() else {}
