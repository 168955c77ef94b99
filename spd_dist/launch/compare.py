"""Compare capability subspaces: `python launchers/compare.py A B ... [--png FILE]`.

Each of A, B, ... is a run's folder, a subspace.safetensors file, or OWNER/NAME on the hub. Prints how far they
overlap, over all sites that they share and site by site; --png draws the overlap matrix and the spectra. Overlap is
the mean squared cosine of the principal angles: 1 where one subspace is the other, or lies in it, and about rank /
width for unrelated ones.
Exit codes: 0 done, 3 an artifact is wrong, 1 anything else.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from spd_dist.analysis.subspace_algebra import overlap, principal_angles, shared_sites
from spd_dist.hub.repository import subspace_file
from spd_dist.launch import launcher
from spd_dist.storage.subspace_file import load_subspace
from spd_dist.types import KVSite, SiteSubspace, Subspace

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@launcher
def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", type=Path, nargs="+", metavar="RUN_DIR|FILE|HUB")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the overlap matrix and the spectra")
    chosen = parser.parse_args(arguments)
    subspaces = load(chosen.paths)
    sites = shared_sites(subspaces)
    matrix = overlaps(subspaces, sites)
    console = Console(width=max(120, Console().width))
    for name, path in zip(subspaces, chosen.paths, strict=True):
        console.print(f"{name}  {path}", highlight=False)
    console.print(matrix_table(matrix, list(subspaces), len(sites)))
    console.print(site_table(subspaces, sites))
    if chosen.png is not None:
        draw(chosen.png, subspaces, sites, matrix)
        print(f"drawn: {chosen.png}")
    return 0


def load(paths: Sequence[Path]) -> dict[str, Subspace]:
    """The subspaces, named A, B, ... in the order of their paths."""
    return {_letter(index): load_subspace(subspace_file(path)) for index, path in enumerate(paths)}


def _letter(index: int) -> str:
    """A to Z, then A1 to Z1, ..."""
    return chr(ord("A") + index % 26) + (str(index // 26) if index >= 26 else "")


def at(subspace: Subspace, site: KVSite) -> SiteSubspace:
    """The part of `subspace` at the site of that name: a module's name may differ between wrapped models."""
    return next(part for other, part in subspace.sites.items() if str(other) == str(site))


def overlaps(subspaces: Mapping[str, Subspace], sites: Sequence[KVSite]) -> list[list[float]]:
    """The mean overlap over all sites, for every pair."""
    return [
        [sum(overlap(at(a, site), at(b, site)) for site in sites) / len(sites) for b in subspaces.values()]
        for a in subspaces.values()
    ]


def matrix_table(matrix: Sequence[Sequence[float]], names: Sequence[str], num_sites: int) -> Table:
    """Every subspace against every other."""
    table = Table("", *names, title=f"overlap, mean of {num_sites} sites")
    for name, row in zip(names, matrix, strict=True):
        table.add_row(name, *(f"{value:.3f}" for value in row))
    return table


def site_table(subspaces: Mapping[str, Subspace], sites: Sequence[KVSite]) -> Table:
    """Every pair at every site; of a single subspace, its own figures."""
    table = Table("site", "width", "of", "ranks", "energy", "overlap", "by chance", "angles (degrees)", title="by site")
    pairs = list(itertools.combinations(subspaces, 2)) or [(name, name) for name in subspaces]
    for site, (first, second) in itertools.product(sites, pairs):
        a, b = at(subspaces[first], site), at(subspaces[second], site)
        ranks = a.basis_DR.shape[1], b.basis_DR.shape[1]
        degrees = [math.degrees(angle) for angle in principal_angles(a, b).tolist()] or [math.nan]
        table.add_row(
            str(site),
            str(site.width),
            first if first == second else f"{first} | {second}",
            f"{ranks[0]} | {ranks[1]}",
            f"{a.energy_fraction:.3f} | {b.energy_fraction:.3f}",
            f"{overlap(a, b):.3f}",
            f"{max(ranks) / site.width:.3f}",
            f"{degrees[0]:.2f} to {degrees[-1]:.2f}",
        )
    return table


def draw(path: Path, subspaces: Mapping[str, Subspace], sites: Sequence[KVSite], matrix: list[list[float]]) -> None:
    """The overlap matrix, and at each site the spectra with a mark at the rank, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    num_columns = min(3, len(sites) + 1)
    num_rows = math.ceil((len(sites) + 1) / num_columns)
    figure, axes = pyplot.subplots(
        num_rows, num_columns, figsize=(4 * num_columns, 3.4 * num_rows), squeeze=False, layout="constrained"
    )
    first, *others = axes.flat
    _draw_matrix(first, matrix, list(subspaces))
    for axis, site in zip(others, sites, strict=False):
        _draw_spectra(axis, site, subspaces)
    for axis in others[len(sites) :]:
        axis.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120)
    pyplot.close(figure)


def _draw_matrix(axis: Axes, matrix: list[list[float]], names: list[str]) -> None:
    axis.imshow(matrix, vmin=0, vmax=1, cmap="viridis")
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks(range(len(names)), names)
    for row, column in itertools.product(range(len(names)), repeat=2):
        value = matrix[row][column]
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", color="black" if value > 0.6 else "white")
    axis.set_title("overlap, mean of the sites", fontsize=9)


def _draw_spectra(axis: Axes, site: KVSite, subspaces: Mapping[str, Subspace]) -> None:
    for name, subspace in subspaces.items():
        part = at(subspace, site)
        share_D = part.eigenvalue_D / part.eigenvalue_D.sum()
        (line,) = axis.plot(range(1, len(share_D) + 1), share_D.clamp_min(1e-12).tolist(), label=name)
        axis.axvline(part.basis_DR.shape[1] + 0.5, color=line.get_color(), linestyle=":", linewidth=1)
    axis.set_yscale("log")
    axis.set_title(f"{site}: share of the energy by direction", fontsize=9)
    axis.legend(fontsize=7)
