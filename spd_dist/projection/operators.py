"""A site's operator as arithmetic: z -> keep * z + z (F w) F', in its cheapest form, for any device and dtype.

And the module of a loaded model, plain or wrapped by PEFT, whose output it changes; one projection a module.

Shapes: N rows, D width of a site, R columns of the factor, O output features of a module. `...` is batch and positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spd_dist.errors import ConfigError, DataError
from spd_dist.models.kv_tracing import output_width
from spd_dist.types import KVSite, Projection, SiteOperator

ORTHONORMAL = 1e-4  # largest entry of F'F - I: float32 bases of any width lie far below it
IDEMPOTENT = 1e-5


class SiteMap:
    """The operator as a function of `z_D`. Factors are computed in float64 and cast once for each device and dtype.

    With fewer than D / 2 columns it multiplies by the thin factors and never builds a D x D matrix. It computes in the
    dtype of z: in bfloat16 the error is 2.4e-3, where rounding the exact result would leave 1.7e-3 (D 192, R 96).
    """

    def __init__(self, operator: SiteOperator) -> None:
        self.operator = operator
        self._forms: dict[tuple[torch.device, torch.dtype], Callable[[Tensor], Tensor]] = {}

    def __call__(self, z_D: Tensor) -> Tensor:
        form = self._forms.get((z_D.device, z_D.dtype))
        if form is None:
            form = self._forms[z_D.device, z_D.dtype] = _form(self.operator, z_D.device, z_D.dtype)
        return form(z_D)

    @property
    def is_idempotent(self) -> bool:
        """Whether applying it twice is applying it once: then a projected z shows by itself that it was projected."""
        gains = torch.cat([self.operator.weight_R + self.operator.keep, torch.tensor([self.operator.keep])])
        return bool((gains * (gains - 1)).abs().max() <= IDEMPOTENT)


def _form(operator: SiteOperator, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    keep, (width, rank) = operator.keep, operator.factor_DR.shape
    if rank == 0:
        return lambda z_D: z_D if keep == 1 else z_D * keep
    with torch.inference_mode(False):  # a factor first used in inference mode must still serve autograd
        factor_DR = operator.factor_DR.to(device, torch.float64)
        scaled_DR = factor_DR * operator.weight_R.to(device, torch.float64)
        if 2 * rank >= width:
            matrix_DD = (keep * torch.eye(width, dtype=torch.float64, device=device) + scaled_DR @ factor_DR.T).to(
                dtype
            )
            return lambda z_D: z_D @ matrix_DD
        left_DR, right_RD = scaled_DR.to(dtype), factor_DR.T.to(dtype).contiguous()

    def thin(z_D: Tensor) -> Tensor:
        z_ND = z_D.reshape(-1, width)
        return torch.addmm(z_ND, z_ND @ left_DR, right_RD, beta=keep).view(z_D.shape)

    return thin


class Columns:
    """The output features of a site within its module's: all, one slice, or an index list."""

    def __init__(self, site: KVSite) -> None:
        self.ranges = site.columns
        self._index: dict[torch.device, Tensor] = {}

    def read(self, output_O: Tensor) -> Tensor:
        """The site's features of `output_O`, KV head after KV head; a view where they are one slice."""
        if len(self.ranges) == 1:
            start, stop = self.ranges[0]
            return output_O[..., start:stop]
        return output_O.index_select(-1, self._on(output_O.device))

    def write_(self, output_O: Tensor, z_D: Tensor) -> None:
        """Replace the site's features of `output_O`."""
        if len(self.ranges) == 1:
            start, stop = self.ranges[0]
            output_O[..., start:stop] = z_D
        else:
            output_O.index_copy_(-1, self._on(output_O.device), z_D)

    def _on(self, device: torch.device) -> Tensor:
        if device not in self._index:
            with torch.inference_mode(False):
                self._index[device] = torch.cat([torch.arange(*pair, device=device) for pair in self.ranges])
        return self._index[device]


class SitePart(NamedTuple):
    """What is done to one site of a module."""

    site: KVSite
    columns: Columns
    apply: SiteMap


def parts_by_module(operators: Mapping[KVSite, SiteOperator]) -> dict[str, list[SitePart]]:
    """The operators, grouped by the module whose output they change.

    Raises:
        DataError: two sites share output features.
    """
    parts: dict[str, list[SitePart]] = {}
    for site, operator in sorted(operators.items(), key=lambda item: item[0]):
        parts.setdefault(site.module, []).append(SitePart(site, Columns(site), SiteMap(operator)))
    for module, group in parts.items():
        ranges = sorted(pair for part in group for pair in part.site.columns)
        if any(stop > start for (_, stop), (start, _) in pairwise(ranges)):
            sites = " and ".join(str(part.site) for part in group)
            raise DataError(f"{sites} share output features of {module}; project one of them (project.kinds)")
    return parts


def check_projection(projection: Projection) -> None:
    """Check every operator's shape against its site, and for `head` that it mixes no two KV heads.

    Raises:
        DataError: a factor of another width, not orthonormal, or with a column over two heads.
        ConfigError: an unknown insertion.
    """
    if projection.insertion not in ("linear", "rope", "head"):
        raise ConfigError(f"project.insertion: {projection.insertion!r} is not valid; it must be linear, rope or head")
    for site, operator in projection.operators.items():
        factor_DR, rank = operator.factor_DR, operator.weight_R.numel()
        if tuple(factor_DR.shape) != (site.width, rank):
            raise DataError(
                f"{site}: the operator's factor is {tuple(factor_DR.shape)} with {rank} weights, and must be "
                f"({site.width}, {rank}); the subspace belongs to another model"
            )
        gram_RR = factor_DR.double().T @ factor_DR.double()
        gap = (gram_RR - torch.eye(rank, dtype=torch.float64)).abs().max().item() if rank else 0.0
        if not gap <= ORTHONORMAL:
            raise DataError(
                f"{site}: the factor's columns are not orthonormal (off by {gap:.1e}, at most {ORTHONORMAL:.0e})"
            )
        if projection.insertion == "head":
            heads_R = (factor_DR.reshape(site.num_heads, -1, rank) != 0).any(1).sum(0)
            if rank and heads_R.max() > 1:
                raise DataError(
                    f"{site}: project.insertion=head, and a column of the factor reaches over {heads_R.max().item()} "
                    f"of {site.num_heads} KV heads; make the operator with the same project.insertion"
                )


def projection_hash(projection: Projection) -> str:
    """A hash of sites, operators and insertion, bit by bit."""
    digest = hashlib.sha256(projection.insertion.encode())
    for site, operator in sorted(projection.operators.items(), key=lambda item: item[0]):
        digest.update(f"{site!r} {operator.keep!r} {tuple(operator.factor_DR.shape)}".encode())
        for tensor in (operator.factor_DR, operator.weight_R):
            digest.update(tensor.double().contiguous().numpy().tobytes())
    return digest.hexdigest()


def is_identity(operator: SiteOperator) -> bool:
    """Whether the operator changes nothing."""
    return as_update(operator).weight_R.numel() == 0


def as_update(operator: SiteOperator) -> SiteOperator:
    """The same operator as the identity and a change of lowest rank: keep 1, and only columns that change something."""
    width, rank = operator.factor_DR.shape
    weight_R = operator.weight_R.double() + (operator.keep - 1)
    columns_DR, outside = operator.factor_DR, torch.zeros(0, dtype=torch.float64)
    if operator.keep != 1:
        frame_DD = torch.linalg.qr(columns_DR.double(), mode="complete").Q
        columns_DR = torch.cat([columns_DR, frame_DD[:, rank:].float()], 1)
        outside = torch.full((width - rank,), operator.keep - 1, dtype=torch.float64)
    weight_R = torch.cat([weight_R, outside])
    changes = weight_R.abs() > IDEMPOTENT
    return SiteOperator(1.0, columns_DR[:, changes], weight_R[changes].float())


MARK = "spd_projected"


class Target(NamedTuple):
    """A module whose output is projected, and what is done to it."""

    name: str
    module: nn.Module
    out_features: int
    parts: list[SitePart]


def targets(model: nn.Module, parts: Mapping[str, list[SitePart]]) -> list[Target]:
    """The modules of `model` that `parts` name.

    A layer that PEFT wraps is taken whole: attention does not see its base layer alone.

    Raises:
        DataError: a module is missing, not linear, or too narrow for its sites.
    """
    return [_target(model, name, group) for name, group in parts.items()]


def find_module(model: nn.Module, name: str) -> nn.Module | None:
    """The module of that name in `model`, or in what PEFT wraps; None if there is none."""
    wrapped: Any = model
    base: nn.Module = wrapped.get_base_model() if hasattr(model, "get_base_model") else model
    for root in (model, base):
        try:
            return root.get_submodule(name.removesuffix(".base_layer"))
        except AttributeError:
            continue
    return None


def _target(model: nn.Module, name: str, parts: list[SitePart]) -> Target:
    sites = " and ".join(str(part.site) for part in parts)
    module = find_module(model, name)
    if module is None:
        raise DataError(f"{sites}: the model has no module {name}; the subspace was computed for another architecture")
    width = output_width(module)
    if width is None:
        raise DataError(
            f"{sites}: {name} is a {type(module).__name__}, not a linear module; compute the subspace for this model"
        )
    needed = max(stop for part in parts for _, stop in part.site.columns)
    if needed > width:
        raise DataError(
            f"{sites}: {name} has {width} output features and the subspace needs {needed}; it belongs to another model"
        )
    return Target(name, module, width, parts)


@contextmanager
def claimed(found: Iterable[Target]) -> Generator[None]:
    """Mark modules as projected, so that a second projection is refused instead of composed with the first.

    Raises:
        DataError: one is marked already.
    """
    with ExitStack() as undo:
        for target in found:
            if hasattr(target.module, MARK):
                raise DataError(
                    f"{target.name} is projected already; leave that context first, or project an untouched model"
                )
            setattr(target.module, MARK, True)
            undo.callback(delattr, target.module, MARK)
        yield
