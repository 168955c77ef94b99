"""Figures as SVG text to stand inside a page: drawn off screen, the same bytes for the same numbers.

Shapes: D width of a site, R rank of its subspace.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spd_dist.runtime.comparison import amount
from spd_dist.types import Answer, Subspace

STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}
NUM_PAIRS = 8
WIDTH_INCHES = 6.4


def svg(name: str, figure: Figure) -> str:
    """`figure` as an `<svg>` element, its inner ids made of `name`: those of one page must differ."""
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    return text.getvalue()[text.getvalue().index("<svg") :]


def _blank(height_inches: float, num_columns: int = 1) -> tuple[Figure, Any]:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
        return figure, figure.subplots(1, num_columns)


def forest(comparisons: Sequence[Mapping[str, Any]], metric: str) -> str:
    """Every paired difference with its 95 % interval; filled where the interval leaves out zero."""
    figure, axes = _blank(0.8 + 0.35 * len(comparisons))
    scale = 1 if metric == "nll" else 100
    for row, one in enumerate(reversed(comparisons)):
        low, high = (scale * bound for bound in one["interval"])
        shown = low > 0 or high < 0
        axes.plot([low, high], [row, row], color="#345", linewidth=1.5)
        axes.plot(scale * one["difference"], row, "o", color="#345", markerfacecolor="#345" if shown else "white")
        axes.annotate(amount(one["difference"], metric), (high, row), (4, 4), textcoords="offset points", fontsize=8)
    axes.axvline(0, color="#a33", linewidth=1)
    axes.set_yticks(range(len(comparisons)), [f"{one['after']} - {one['before']}" for one in reversed(comparisons)])
    axes.set_ylim(-0.6, len(comparisons) - 0.4)
    axes.set_xlabel("nats a token (left is better)" if metric == "nll" else "percentage points (right is better)")
    return svg("forest", figure)


def spectra(project: Mapping[str, Any]) -> str:
    """Each site's spectrum, as shares of its energy, and the energy that the strongest directions hold."""
    figure, (left, right) = _blank(2.8, 2)
    for name, site in project["sites"].items():
        spectrum_D = torch.tensor(site["spectrum"], dtype=torch.float64).clamp(min=0)
        share_D = spectrum_D / spectrum_D.sum().clamp(min=1e-300)
        (line,) = left.plot(range(1, len(share_D) + 1), share_D.clamp(min=1e-12), linewidth=1, label=name)
        right.plot(range(1, len(share_D) + 1), share_D.cumsum(0), color=line.get_color(), linewidth=1)
        right.plot(site["rank"], site["energy_fraction"], "o", color=line.get_color(), markersize=4)
    left.set_yscale("log")
    left.set_xlabel("direction")
    left.set_ylabel("share of the energy")
    right.set_xlabel("directions kept (dot: the rank)")
    right.set_ylabel("energy kept")
    right.set_ylim(0, 1.02)
    if len(project["sites"]) <= 8:
        left.legend(fontsize=7)
    return svg("spectra", figure)


def principal_angles(subspace: Subspace) -> str | None:
    """The angles between the subspaces of sites of one width, pair by pair; None where there is no such pair."""
    pairs = [(a, b) for a, b in combinations(sorted(subspace.sites), 2) if a.width == b.width][:NUM_PAIRS]
    if not pairs:
        return None
    figure, axes = _blank(2.8)
    for a, b in pairs:
        cosine_R = torch.linalg.svdvals(subspace.sites[a].basis_DR.double().T @ subspace.sites[b].basis_DR.double())
        angle_R = cosine_R.clamp(max=1).arccos() * (180 / math.pi)
        axes.plot(range(1, len(angle_R) + 1), angle_R.sort().values, linewidth=1, label=f"{a} and {b}")
    axes.set_xlabel("principal angle")
    axes.set_ylabel("degrees")
    axes.set_ylim(0, 92)
    axes.legend(fontsize=7)
    return svg("angles", figure)


def lengths(answers: Mapping[str, Sequence[Answer]]) -> str:
    """How long each arm's answers are, and how they ended."""
    figure, (left, right) = _blank(2.6, 2)
    longest = max(answer.num_tokens for rows in answers.values() for answer in rows)
    edges = [longest * index / 24 for index in range(25)]
    for arm, rows in answers.items():
        left.hist([answer.num_tokens for answer in rows], bins=edges, histtype="step", linewidth=1.3, label=arm)
    left.set_xlabel("tokens of an answer")
    left.set_ylabel("answers")
    left.legend(fontsize=8)
    arms = list(answers)[::-1]
    ended = [sum(answer.finish_reason == "stop" for answer in answers[arm]) / len(answers[arm]) for arm in arms]
    right.barh(arms, ended, color="#567", label="ended by itself")
    right.barh(arms, [1 - share for share in ended], left=ended, color="#dcb", label="cut at the limit")
    right.set_xlim(0, 1)
    right.grid(visible=False)
    right.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    return svg("lengths", figure)


def curves(losses: Mapping[str, Mapping[int, float]]) -> str:
    """Training loss over optimizer steps, arm by arm."""
    figure, axes = _blank(2.6)
    for arm, by_step in losses.items():
        axes.plot(list(by_step), list(by_step.values()), linewidth=1.1, label=arm)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats a token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8)
    return svg("curves", figure)
