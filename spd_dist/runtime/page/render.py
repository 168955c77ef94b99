"""Templates to text: what every page shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from omegaconf import OmegaConf

from spd_dist.config import Config
from spd_dist.runtime.answers import manner
from spd_dist.runtime.artifacts import read_json
from spd_dist.runtime.settings import settings_by_key


def render(template: str, report: Mapping[str, Any], run_folder: Path, **context: Any) -> str:
    """A page of `report`, with settings and machine of the run in the folder; what models and data say is escaped."""
    loader = PackageLoader("spd_dist.runtime.page", ".")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, loader=loader, trim_blocks=True, lstrip_blocks=True
    )
    is_nll = report["metric"] == "nll"
    return environment.get_template(template).render(
        **context,
        report=report,
        manner=manner(report["temperature"], report["num_samples"]),
        differing=config_diff(run_folder),
        environment=_environment(run_folder),
        percent=lambda value: f"{100 * value:.1f}",
        signed=lambda value: f"{value:+.3f}" if is_nll else f"{100 * value:+.1f}",
        value=lambda value: f"{value:.3f}" if is_nll else f"{100 * value:.1f}",
    )


def drawn(title: str, sentence: str, drawing: str | None) -> dict[str, Any]:
    """A figure with its title and what to see in it."""
    return {"title": title, "sentence": sentence, "svg": Markup(drawing) if drawing else None}


def config_diff(run_folder: Path) -> list[tuple[str, Any, Any]]:
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
