"""Sketches against the other ways to the same subspace: speed, memory, energy lost, and what is certified.

    python benchmarks/sketch.py [--json FILE] [--widths 128 512 1024 4096]

Every side sees the same float32 rows and gives the top L/2 directions; what streams gets them as micro-batches of
`BATCH`. `lost` is the energy that these directions miss of what the best L/2 hold. Times are CPU times of this process.

The speed of IncrementalPCA depends on its batch. `fd_over_incremental_pca` gives it each micro-batch as it comes; the
same with L rows at a time, where it needs as much memory as we do, and with its default of 5 D, is in the table.

Shapes: N rows, D width, L rows of a sketch, R directions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy.fft
import torch
from common import interleaved_seconds, parsed, parser, pin_threads, publish
from torch import Tensor

from spd_dist.config import Project, Reduce, Sketch
from spd_dist.distributed.world import World
from spd_dist.stages.project import certified_energy_fraction, subspace
from spd_dist.stages.reduce import reduce
from spd_dist.stages.sketch import ShardPlan, ShardSketch, sketch
from spd_dist.types import GradientBatch, KVSite

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
BATCH = 1024
NUM_ROWS = {128: 16384, 512: 16384, 1024: 8192, 4096: 4096}
SLOW_WIDTH = 4096
"""From this width on every side is timed once: a decomposition of all rows takes a minute."""


class Found(NamedTuple):
    """What a side gives: unit columns, and what it can prove of their energy."""

    basis_DR: Tensor
    certified: float | None = None


@dataclass(frozen=True)
class Side:
    """One way to the subspace: `run` does all the work that is timed, `find` reads the result."""

    name: str
    size: int
    run: Callable[[], Any]
    find: Callable[[Any], Found]
    state_bytes: Callable[[Any], int]


def gradient_rows(num_rows: int, width: int) -> Tensor:
    """Rows like gradients: singular values i^-1 in a fixed basis, and norms that differ by row (lognormal)."""
    source = np.random.default_rng(0)
    rows = source.standard_normal((num_rows, width)) / np.arange(1, width + 1)
    rows *= source.lognormal(0.0, 0.5, (num_rows, 1))
    return torch.from_numpy(scipy.fft.dct(rows, norm="ortho")).float()


def ours(rows_ND: Tensor, config: Sketch, size: int) -> Side:
    """This project's sketch, through its stages."""
    site = KVSite(0, "key", "k_proj", ((0, rows_ND.shape[1]),))
    stream = [GradientBatch(0, {site: part_ND}) for part_ND in rows_ND.split(BATCH)]
    project = Project(rank_rule="fixed", rank=size // 2)

    def run() -> dict[int, ShardSketch]:
        return sketch(stream, [site], config, ALONE, ShardPlan(1, project.planned_rank))

    def find(sketches: dict[int, ShardSketch]) -> Found:
        owned = reduce(sketches, [site], Reduce(), num_shards=1, world=ALONE)
        part = subspace(owned, [site], project, ALONE).sites[site]
        return Found(part.basis_DR, certified_energy_fraction(part))

    name = "spd_dist gram" if config.method == "gram" else "spd_dist frequent_directions"
    return Side(
        name,
        size,
        run,
        find=find,
        state_bytes=lambda sketches: sketches[0].num_bytes(),
    )


def numpy_svd(rows_ND: Tensor, size: int) -> Side:
    """The exact decomposition of all rows, held in memory."""
    rows = rows_ND.numpy()
    return Side(
        "numpy svd of all rows",
        size,
        run=lambda: np.linalg.svd(rows, full_matrices=False)[2],
        find=lambda vt: Found(torch.from_numpy(vt[: size // 2].T.copy())),
        state_bytes=lambda _: rows.nbytes,
    )


def incremental_pca(rows_ND: Tensor, size: int, batch: int, name: str) -> Side:
    """scikit-learn's streaming PCA. It takes off the mean, which these rows hardly have."""
    from sklearn.decomposition import IncrementalPCA

    rows = rows_ND.numpy()

    def run() -> IncrementalPCA:
        return IncrementalPCA(n_components=size, batch_size=batch).fit(rows)

    return Side(
        name,
        size,
        run,
        find=lambda pca: Found(torch.from_numpy(pca.components_[: size // 2].T.copy())),
        state_bytes=lambda pca: pca.components_.nbytes + batch * rows.shape[1] * rows.itemsize,
    )


def numpy_rows(rows_ND: Tensor, size: int) -> Side:
    """Frequent Directions as its authors wrote it: row by row, a numpy SVD each time 2 L rows have gathered."""
    rows = rows_ND.numpy().astype(np.float64)

    def run() -> np.ndarray:
        buffer, filled = np.zeros((2 * size, rows.shape[1])), 0
        for row in rows:
            if np.count_nonzero(row) == 0:
                continue
            if filled == 2 * size:
                filled = _rotate(buffer, size)
            buffer[filled] = row
            filled += 1
        _rotate(buffer, size)
        return buffer[:size]

    return Side(
        "numpy row by row",
        size,
        run,
        find=lambda rows_LD: Found(
            torch.from_numpy(np.linalg.svd(rows_LD, full_matrices=False)[2][: size // 2].T.copy())
        ),
        state_bytes=lambda _: 2 * size * rows.shape[1] * rows.itemsize,
    )


def _rotate(buffer: np.ndarray, size: int) -> int:
    _, values, vt = np.linalg.svd(buffer, full_matrices=False)
    kept = np.sqrt(np.maximum(values[:size] ** 2 - values[size] ** 2, 0.0))
    buffer[:size] = np.diag(kept) @ vt[:size]
    buffer[size:] = 0.0
    return size


def matmul(rows_ND: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    """The products of a Gram matrix alone, by `torch.mm`: the rate that the machine has."""
    parts = [part_ND.to(dtype) for part_ND in rows_ND.split(BATCH)]
    return lambda: [torch.mm(part_ND.T, part_ND) for part_ND in parts]


def lost_energy(rows_ND: Tensor, optimum: float, basis_DR: Tensor) -> float:
    """What the orthonormal columns miss of the energy that as many columns can hold."""
    return 1 - (rows_ND.double() @ basis_DR.double()).square().sum().item() / optimum


def sides_of(rows_ND: Tensor) -> Iterator[Side]:
    """All that is compared at one width."""
    width = rows_ND.shape[1]
    for size in [64] if width <= 512 else [64, 256]:
        yield ours(rows_ND, Sketch(method="frequent_directions", size=size), size)
    yield ours(rows_ND, Sketch(method="gram"), 64)
    yield incremental_pca(rows_ND, 64, BATCH, "IncrementalPCA, batch 1024")
    yield incremental_pca(rows_ND, 64, 64, "IncrementalPCA, batch L")
    if 5 * width <= len(rows_ND):
        yield incremental_pca(rows_ND, 64, 5 * width, "IncrementalPCA, batch 5 D")
    yield numpy_rows(rows_ND, 64)
    yield numpy_svd(rows_ND, 64)


def measure(width: int, num_rows: int, repeats: int) -> tuple[list[dict[str, Any]], Mapping[str, float]]:
    """The rows of one width, and its seconds by side."""
    rows_ND = gradient_rows(num_rows, width)
    sides = {f"{side.name} {side.size}": side for side in sides_of(rows_ND)}
    results: dict[str, Any] = {}

    def timed(name: str, side: Side) -> Callable[[], object]:
        return lambda: results.__setitem__(name, side.run())

    runs = {name: timed(name, side) for name, side in sides.items()}
    runs["matmul float64"] = matmul(rows_ND, torch.float64)
    runs["matmul float32"] = matmul(rows_ND, torch.float32)
    seconds = interleaved_seconds(runs, repeats=repeats, warm_up=repeats > 1, clock=time.process_time)
    eigenvalue_D = torch.linalg.eigvalsh(rows_ND.double().T @ rows_ND.double()).flip(0)
    table = []
    for name, side in sides.items():
        basis_DR, certified = side.find(results[name])
        table.append(
            {
                "D": width,
                "L": side.size,
                "side": side.name,
                "rows/s": len(rows_ND) / seconds[name],
                "us/row": 1e6 * seconds[name] / len(rows_ND),
                "state KiB": side.state_bytes(results[name]) / 1024,
                "lost": lost_energy(rows_ND, eigenvalue_D[: side.size // 2].sum().item(), basis_DR),
                "certified": certified,
            }
        )
    return table, seconds


def main() -> None:
    """Measure every width, and publish."""
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--widths", type=int, nargs="+", default=[128, 512, 1024, 4096])
    options.add_argument("--rows", type=int, help="of each width; by default fewer of the larger ones")
    chosen = parsed(options, "sklearn", widths=[512], rows=2560)
    pin_threads(chosen.threads)
    table, ratios = [], {}
    for width in chosen.widths:
        rows, seconds = measure(width, chosen.rows or NUM_ROWS[width], 1 if width >= SLOW_WIDTH else chosen.repeats)
        table += rows
        if width == 512:
            fd, gram = seconds["spd_dist frequent_directions 64"], seconds["spd_dist gram 64"]
            ratios["fd_over_incremental_pca"] = seconds["IncrementalPCA, batch 1024 64"] / fd
            ratios["fd_over_incremental_pca_batch_l"] = seconds["IncrementalPCA, batch L 64"] / fd
            ratios["fd_over_numpy_rows"] = seconds["numpy row by row 64"] / fd
            ratios["gram_fraction_of_matmul"] = seconds["matmul float64"] / gram
            ratios["gram_fraction_of_float32_matmul"] = seconds["matmul float32"] / gram
    publish("sketch", ratios=ratios, rows=table, json_path=chosen.json)


if __name__ == "__main__":
    main()
