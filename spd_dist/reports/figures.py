"""Figures as SVG text to stand inside a page: drawn off screen, the same bytes for the same numbers.

Shapes: D width of a site, R rank of its subspace.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from spd_dist.analysis.comparison import amount
from spd_dist.analysis.intervals import SIGNIFICANCE
from spd_dist.analysis.notebook import visible
from spd_dist.analysis.report import Difference, RoundResult, SeedsDifference
from spd_dist.tracking.metrics import Losses

if TYPE_CHECKING:  # a tenth of what the launchers import, and needed once a run
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE: dict[Any, Any] = {  # matplotlib types each key by name
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.fonttype": "none",
    "text.parse_math": False,  # labels come from configs and models: a `$` in one is a dollar
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
}
INK, EDGE = "#345", "#a33"
NUM_BARS = 24
WIDTH_INCHES = 5.2
Lengths = Sequence[tuple[int, bool]]
"""Tokens of each answer, and whether it ended by itself."""


def svg(name: str, figure: Figure) -> str:
    """`figure` as an `<svg>` element, its inner ids made of `name`: those of one page must differ."""
    from matplotlib import rc_context
    from matplotlib.text import Text

    with rc_context({**STYLE, "svg.hashsalt": name}):
        for label in figure.findobj(Text):
            label.set_parse_math(False)
            label.set_text(visible(label.get_text()))
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    return text.getvalue()[text.getvalue().index("<svg") :]


def blank(height_inches: float, num_columns: int = 1, *, widths: Sequence[float] | None = None) -> tuple[Figure, Any]:
    """A figure of the pages' width and style, and its axes; with `widths` they share the vertical one."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
        return figure, figure.subplots(1, num_columns, sharey=widths is not None, width_ratios=widths)


def short_name(arm: str) -> str:
    """`base T 0.4` for `base@evaluate.temperature=0.4`, which leaves no room for a figure."""
    return arm.replace("@evaluate.temperature=", " T ")


def _legend(axes: Axes, num_columns: int = 1) -> None:
    axes.legend(fontsize=8, frameon=False, labelspacing=0.3, ncols=num_columns)


def forest(comparisons: Sequence[Difference], metric: str) -> str:
    """Every paired difference with its 95 % interval; dots are single seeds.

    It is filled where the interval leaves out zero and the correction for all of them (Holm) shows it, as in verdicts.
    """
    figure, axes = blank(0.8 + 0.35 * len(comparisons))
    scale = 1 if metric == "nll" else 100
    for row, one in enumerate(reversed(comparisons)):
        low, high = (scale * bound for bound in one.interval)
        shown = (low > 0 or high < 0) and one.p_holm < SIGNIFICANCE
        axes.plot([low, high], [row, row], color=INK, linewidth=1.5)
        each = [scale * value for value in (one.values if isinstance(one, SeedsDifference) else ())]
        axes.plot(each, [row - 0.22] * len(each), ".", color=INK, alpha=0.5, markersize=4)
        axes.plot(scale * one.difference, row, "o", color=INK, markerfacecolor=INK if shown else "white")
        axes.annotate(amount(one.difference, metric), (high, row), (4, 4), textcoords="offset points", fontsize=8)
    axes.axvline(0, color=EDGE, linewidth=1)
    named = [[visible(short_name(arm)) for arm in (one.after, one.before)] for one in reversed(comparisons)]
    pairs = [" - ".join(names) for names in named]
    axes.set_yticks(range(len(comparisons)), pairs)
    axes.set_ylim(-0.6, len(comparisons) - 0.4)
    axes.set_xlabel("nats a token (left is better)" if metric == "nll" else "percentage points (right is better)")
    return svg("forest", figure)


def spectra(project: Mapping[str, Any]) -> str:
    """Each site's spectrum, as shares of its energy, and the energy that the strongest directions hold."""
    figure, (left, right) = blank(2.8, 2)
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
        _legend(left)
    return svg("spectra", figure)


def angles(name: str, pairs: Mapping[str, Sequence[float]]) -> str | None:
    """The principal angles of each pair in degrees, smallest first; None where there is no pair."""
    if not pairs:
        return None
    figure, axes = blank(2.8)
    for label, angle_R in pairs.items():
        axes.plot(range(1, len(angle_R) + 1), angle_R, linewidth=1, label=label)
    axes.set_xlabel("principal angle")
    axes.set_ylabel("degrees")
    axes.set_ylim(-2, 92)
    _legend(axes)
    return svg(name, figure)


def lengths(name: str, answers: Mapping[str, Lengths]) -> str:
    """How long each arm's answers are, as a histogram a row, and how they ended."""
    figure, (left, right) = blank(0.9 + 0.42 * len(answers), 2, widths=(3, 2))
    longest = max((num_tokens for rows in answers.values() for num_tokens, _ in rows), default=1)
    edges = [longest * index / NUM_BARS for index in range(NUM_BARS + 1)]
    arms = list(answers)[::-1]
    for row, arm in enumerate(arms):
        count_B = torch.zeros(NUM_BARS)
        for num_tokens, _ in answers[arm]:
            count_B[min(NUM_BARS - 1, int(NUM_BARS * num_tokens / max(longest, 1)))] += 1
        height_B = 0.8 * count_B / count_B.max().clamp(min=1)
        left.stairs((row - 0.4 + height_B).tolist(), edges, baseline=row - 0.4, fill=True, color=INK, alpha=0.65)
        ended = sum(is_ended for _, is_ended in answers[arm]) / max(1, len(answers[arm]))
        right.barh(row, ended, color="#567", label="ended by itself" if row == 0 else None)
        right.barh(row, 1 - ended, left=ended, color="#dcb", label="cut at the limit" if row == 0 else None)
    left.set_yticks(range(len(arms)), [visible(short_name(arm)) for arm in arms])
    left.set_ylim(-0.6, len(arms) - 0.4)
    left.set_xlabel("tokens")
    right.set_xlabel("share")
    right.set_xlim(0, 1)
    right.grid(visible=False)
    figure.legend(loc="outside upper right", fontsize=8, frameon=False, ncols=2)
    return svg(name, figure)


def curves(losses: Losses) -> str | None:
    """Training loss over optimizer steps, arm by arm; None where no arm was trained."""
    if not losses:
        return None
    figure, axes = blank(2.6)
    for arm, one in losses.items():
        axes.plot(one["steps"], one["losses"], linewidth=1.1, label=arm)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss (nats a token)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(axes, 1 + (len(losses) > 5))
    return svg("curves", figure)


def rounds(found: Sequence[RoundResult]) -> str | None:
    """What each round's subspace and the first one's hold of its energy, and how far apart they are: site means."""
    later = [one for one in found if "1" in one.drift]
    if not later:
        return None
    figure, (left, right) = blank(2.6, 2)
    numbers = [one.round for one in found]

    def mean(sites: Sequence[float]) -> float:
        return sum(sites) / len(sites)

    def over_sites(name: str, first: float) -> list[float]:
        return [first, *(mean([vars(site)[name] for site in one.drift["1"].values()]) for one in later)]

    start = mean(list(found[0].energy_fraction.values()))
    own, held = over_sites("energy_fraction", start), over_sites("energy_fraction_held", start)
    angle = over_sites("mean_angle_degrees", 0.0)
    left.plot(numbers, own, "o-", color=INK, label="its own subspace")
    left.plot(numbers, held, "o--", color=EDGE, label="that of round 1")
    left.set_ylabel("energy held")
    _legend(left)
    right.plot(numbers, angle, "o-", color=INK)
    right.set_ylabel("mean angle to round 1 (degrees)")
    for axes in (left, right):
        axes.set_xlabel("round")
        axes.xaxis.get_major_locator().set_params(integer=True)
    return svg("rounds", figure)
