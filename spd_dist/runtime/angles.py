"""Principal angles between a run's subspaces, for its report."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import combinations, islice
from pathlib import Path

from spd_dist.runtime.subspace_file import load_subspace
from spd_dist.runtime.subspaces import principal_angles
from spd_dist.types import SiteSubspace

NUM_PAIRS = 8
"""Pairs of a kind that are compared, the first ones: a model may have hundreds of sites."""


def angles(run_folder: Path, arms: Iterable[str]) -> dict[str, dict[str, list[float]]]:
    """In degrees, smallest first: `sites`, pairs of the method's own; `arms`, others' subspaces against the method's.

    Raises:
        DataError: a subspace is corrupt.
    """
    file = run_folder / "project" / "subspace.safetensors"
    if not file.exists():
        return {"sites": {}, "arms": {}}
    own = load_subspace(file).sites
    same_width = ((a, b) for a, b in combinations(sorted(own), 2) if a.width == b.width)
    between_arms = (
        (f"{arm}, {site}", own[site], part)
        for arm in arms
        for path in [run_folder / "arms" / arm / "project" / file.name]
        if path.exists()
        for site, part in load_subspace(path).sites.items()
        if site in own
    )
    return {
        "sites": {f"{a} and {b}": _degrees(own[a], own[b]) for a, b in islice(same_width, NUM_PAIRS)},
        "arms": {name: _degrees(mine, other) for name, mine, other in islice(between_arms, NUM_PAIRS)},
    }


def _degrees(first: SiteSubspace, second: SiteSubspace) -> list[float]:
    return (principal_angles(first, second) * (180 / math.pi)).tolist()
