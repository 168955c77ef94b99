"""`mechanism/mechanism.html`: effects against distortion, and every subspace in a table; it needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from spd_dist.analysis.mechanism_verdict import MatchedPair, MechanismDetails, MechanismResult, VariantSummary
from spd_dist.analysis.notebook import visible
from spd_dist.reports import figures
from spd_dist.storage.artifacts import write_text


def template_of(name: str) -> Template:
    """A template of this room; what models and data say is escaped."""
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        loader=PackageLoader("spd_dist.reports", "."),
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    return environment.get_template(name)


def write_mechanism_page(path: Path, result: MechanismResult, details: MechanismDetails) -> None:
    """Write the page of one test."""
    text = template_of("mechanism.html.j2").render(
        result=result,
        details=details,
        drawings=[(title, words, Markup(drawing)) for title, words, drawing in drawings(details)],
        number=lambda value, digits=3: "" if value is None else f"{value:.{digits}f}",
        signed=lambda value: "" if value is None else f"{value:+.3f}",
    )
    write_text(path, text)


def drawings(details: MechanismDetails) -> list[tuple[str, str, str]]:
    """The curves, each with its title and what to see in it: of the primary comparison."""
    whole = [one for one in details.variants if one.comparison == "primary"]
    return [
        ("Effect against distortion", "Each dot is a subspace, whole; lines are blends of it.", doses(whole)),
        ("At equal distortion", "Differences of the method's subspace from each other, pair by pair.",
         differences(details.matches)),
    ]  # fmt: skip


COLOURS = {"spd": "#a33", "random": "#999", "equal_energy": "#7a9", "control": "#345", "candidate": "#b70"}


def doses(variants: Sequence[VariantSummary]) -> str:
    """Effect over KL: a dot a whole subspace, a line through the blends of one."""
    figure, axes = figures.blank(3.4)
    for kind, colour in COLOURS.items():
        dots = [one for one in variants if one.kind == kind and one.share == 1]
        axes.plot([one.kl for one in dots], [one.effect for one in dots], "o", color=colour, markersize=4,
                  label=kind.replace("_", " "))  # fmt: skip
        if kind in ("control", "candidate"):
            for one in dots:
                place = one.kl, one.effect
                axes.annotate(one.name, place, (4, 2), textcoords="offset points", fontsize=6)
    for name in dict.fromkeys(one.name for one in variants):
        line = sorted((one.kl, one.effect, one.kind) for one in variants if one.name == name)
        if len(line) > 1:
            places = [(0.0, 0.0), *((kl, effect) for kl, effect, _ in line)]
            axes.plot(*zip(*places, strict=True), color=COLOURS[line[0][2]], linewidth=0.8, alpha=0.7)
    axes.axhline(0, color="#bbb", linewidth=1)
    axes.set_xlabel("KL to the base (nats a token)")
    axes.set_ylabel("change of the answer's NLL (nats)")
    axes.legend(fontsize=8, frameon=False)
    return figures.svg("doses", figure)


def differences(matches: Sequence[MatchedPair]) -> str:
    """The method's subspace less each other at equal distortion, with its interval over rows; left is better."""
    figure, axes = figures.blank(0.8 + 0.2 * len(matches))
    for row, one in enumerate(reversed(matches)):
        axes.plot(one.interval, [row, row], color="#345", linewidth=1)
        axes.plot(one.difference, row, "o", color="#345", markersize=4)
    axes.axvline(0, color="#a33", linewidth=1)
    axes.set_yticks(range(len(matches)), [one.name for one in reversed(matches)], fontsize=7)
    axes.set_xlabel("nats (left: the capability subspace is better)")
    return figures.svg("differences", figure)
