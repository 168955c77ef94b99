"""The subspace as an artifact: `project/subspace.safetensors`, readable by any safetensors library.

Tensors: `layers.L.KIND.basis_DR` (float32), and `layers.L.KIND.singular_value_D` (float64, of the stacked gradient
rows). Metadata: `sites`, JSON with the other fields of each site; and the subspace's own: base model, hashes.

Shapes: D width of a site, R rank of its subspace.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spd_dist.errors import DataError
from spd_dist.storage.artifacts import read_tensors, write_tensors
from spd_dist.storage.records import write_record
from spd_dist.types import Certificate, KVSite, SiteSubspace, Subspace, record_of

SITES = "sites"
FILE_NAME = "subspace.safetensors"
"""In a run's folder `project/`, and in a repository of the hub."""


@dataclass(frozen=True)
class SiteDrift:
    """How far a site's subspace and energy moved since an earlier round."""

    angles_degrees: list[float]
    """The principal angles, smallest first."""
    mean_angle_degrees: float
    largest_angle_degrees: float
    overlap_fraction: float
    energy_ratio: float
    energy_fraction_before: float
    energy_fraction: float
    energy_fraction_held: float
    """The share of this round's energy that the earlier subspace holds."""


@dataclass(frozen=True)
class SiteSummary:
    """A site's subspace in numbers."""

    module: str
    width: int
    rank: int
    energy_fraction: float
    num_rows: int
    sketch_size: int
    certificate: Certificate
    certified_energy_fraction: float
    certified_energy_share: float
    angle_bound: float | str
    """Sine of the largest angle to the exact subspace, or `not certified`."""
    num_null_directions: int
    spectrum: list[float]


@dataclass(frozen=True)
class SubspaceSummary:
    """`project/summary.json`."""

    masks: Mapping[str, Any]
    """What the mask kept of the calibration examples: `data.masking.MaskAudit`."""
    drift: Mapping[str, Mapping[str, SiteDrift]]
    """By earlier round, and site."""
    metadata: Mapping[str, str]
    sites: Mapping[str, SiteSummary]
    """By the site's name, as `layers.15.key`."""


def save_subspace(path: str | Path, subspace: Subspace) -> None:
    """Write the subspace whole."""
    write_tensors(path, _tensors(subspace), {**subspace.metadata, SITES: json.dumps(_described(subspace))})


def write_subspace(folder: Path, subspace: Subspace, summary: SubspaceSummary) -> None:
    """What the folder `project/` of a run holds."""
    save_subspace(folder / FILE_NAME, subspace)
    write_record(folder / "summary.json", summary)


def load_subspace(path: str | Path) -> Subspace:
    """The subspace of a file, on the CPU.

    Raises:
        DataError: the file is missing, corrupt, or no subspace.
    """
    file = read_tensors(path)
    if SITES not in file.metadata:
        raise DataError(f"{path} is no subspace: its metadata has no `{SITES}`; give a project/subspace.safetensors")
    metadata = dict(file.metadata)
    try:
        described = json.loads(metadata.pop(SITES))
        return Subspace(dict(_read_site(path, fields, file.tensors) for fields in described), metadata)
    except DataError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is no subspace: its metadata describes no sites ({error!r})") from error


def fingerprint(subspace: Subspace) -> str:
    """The hash of everything that a subspace holds: equal on all ranks after the broadcast."""
    digest = hashlib.sha256(json.dumps([_described(subspace), dict(subspace.metadata)], sort_keys=True).encode())
    for name, tensor in sorted(_tensors(subspace).items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _tensors(subspace: Subspace) -> dict[str, Tensor]:
    tensors = {}
    for site, part in subspace.sites.items():
        tensors[f"{site}.basis_DR"] = part.basis_DR
        tensors[f"{site}.singular_value_D"] = part.eigenvalue_D.sqrt()
    return tensors


def _described(subspace: Subspace) -> list[dict[str, Any]]:
    return [
        {
            "site": asdict(site),
            "energy_fraction": part.energy_fraction,
            "certificate": asdict(part.certificate),
            "num_null_directions": part.num_null_directions,
        }
        for site, part in subspace.sites.items()
    ]


def _read_site(
    path: str | Path, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[KVSite, SiteSubspace]:
    columns = tuple(tuple(pair) for pair in fields["site"]["columns"])
    site = record_of(KVSite, fields["site"] | {"columns": columns})
    missing = [name for name in (f"{site}.basis_DR", f"{site}.singular_value_D") if name not in tensors]
    if missing:
        raise DataError(f"{path} has no tensor {missing[0]}; write it again with save_subspace")
    basis_DR = tensors[f"{site}.basis_DR"]
    value_D = tensors[f"{site}.singular_value_D"]
    is_basis = basis_DR.ndim == 2 and basis_DR.dtype == torch.float32 and basis_DR.shape[1] <= len(basis_DR)
    if not is_basis or len(basis_DR) != site.width:
        raise DataError(
            f"{path}: {site}.basis_DR is {basis_DR.dtype} of shape {list(basis_DR.shape)}; it must be float32, of "
            f"{site.width} rows, which is the site's width, and at most as many columns"
        )
    if value_D.shape != (site.width,) or value_D.dtype != torch.float64:
        raise DataError(
            f"{path}: {site}.singular_value_D is {value_D.dtype} of shape {list(value_D.shape)}; it must be float64 of "
            f"shape [{site.width}]"
        )
    if not (basis_DR.isfinite().all() and value_D.isfinite().all()):
        raise DataError(f"{path}: {site} has numbers that are not finite; make the subspace again")
    return site, SiteSubspace(
        basis_DR=basis_DR,
        eigenvalue_D=value_D.square(),
        energy_fraction=fields["energy_fraction"],
        certificate=record_of(Certificate, fields["certificate"]),
        num_null_directions=fields["num_null_directions"],
    )
