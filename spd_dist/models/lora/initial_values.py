"""What adapters begin as: PEFT's `init_lora_weights`, from one generator, on whole or sharded weights.

I: inputs of a module; O: its outputs; R: the adapter's rank; N: rows (tokens).

Methods that begin at a part of the base weight (PiSSA, OLoRA, CorDA) take it off that weight. Here the weight stays as
it is: the part is taken off by a second, frozen adapter of the opposite sign, and both are saved as one adapter of
twice the rank. That is what PEFT's `path_initial_model_for_weight_conversion` makes of it, without a rounded weight.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spd_dist.config import Finetune
from spd_dist.errors import ConfigError, DataError
from spd_dist.types import KVSite, SiteSubspace, Subspace


class Factors(NamedTuple):
    """An adapter at its start: it adds scaling * up @ down to the weight."""

    down_RI: Tensor
    up_OR: Tensor


@dataclass
class InputSums:
    """Of all rows that a module was given, in float32."""

    num_calls: int
    num_rows: int
    total_I: Tensor
    moment_II: Tensor
    """The sum of x x^T."""

    def add_(self, x_NI: Tensor) -> None:
        """Add the rows of a call."""
        self.num_calls += 1
        self.num_rows += len(x_NI)
        self.total_I += x_NI.sum(0)
        self.moment_II += x_NI.T @ x_NI

    @property
    def scatter_II(self) -> Tensor:
        """The moment about the mean."""
        return self.moment_II - self.total_I.outer(self.total_I) / max(1, self.num_rows)


def reads_inputs(config: Finetune) -> bool:
    """Whether the adapters begin at what their modules are given."""
    return config.mode == "lora" and config.lora_init in ("eva", "corda")


@contextmanager
def summing_inputs(modules: Mapping[str, nn.Module], *, scaled: bool) -> Generator[dict[str, InputSums]]:
    """The sums of what each module is given in this context; modules with the same input share one.

    Args:
        modules: By name; those that are called with one tensor right after each other share their sums.
        scaled: divide the rows of a call by the largest entry first, as CorDA does.
    """
    sums: dict[str, InputSums] = {}
    last: list[Tensor | None] = [None]
    owner = [""]

    def add(name: str, x: Tensor) -> None:
        if x is last[0]:
            sums[name] = sums[owner[0]]
            return
        last[0], owner[0] = x, name
        x_NI = x.detach().flatten(0, -2).float()
        if scaled:
            x_NI = x_NI / x_NI.max().abs().clamp(min=1e-12)
        if name not in sums:
            width = x_NI.shape[1]
            sums[name] = InputSums(0, 0, x_NI.new_zeros(width), x_NI.new_zeros(width, width))
        sums[name].add_(x_NI)

    def hook(name: str) -> Any:
        return lambda _, inputs: add(name, inputs[0])

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def initial_factors(
    weight_OI: Tensor, config: Finetune, scaling: float, *, generator: torch.Generator, sums: InputSums | None
) -> Factors:
    """How the adapter of a linear module begins, by any method but `default`, which looks at no weight.

    Args:
        weight_OI: The base weight, whole.
        config: The rank and the method.
        scaling: That the adapter's product is multiplied by.
        generator: Of the draws.
        sums: Of the module's inputs, for `eva` and `corda`.

    Raises:
        DataError: inputs that are not finite.
    """
    weight_OI = weight_OI.float()
    rank, (num_out, num_in) = config.lora_rank, weight_OI.shape
    zeros_OR = weight_OI.new_zeros(num_out, rank)
    match config.lora_init:
        case "gaussian":
            return Factors(_normal((rank, num_in), generator) / rank, zeros_OR)
        case "orthogonal":
            return _orthogonal(rank, num_in, num_out, generator)
        case "eva":
            return Factors(_eva(_checked(sums), rank), zeros_OR)
        case "olora":
            basis, triangle = torch.linalg.qr(weight_OI)
            return Factors(triangle[:rank], basis[:, :rank])
        case "pissa":
            left_OR, value_R, right_RI = _leading(weight_OI, rank, config.lora_init_iterations, generator)
            return _split(left_OR, value_R, right_RI, scaling)
        case _:
            assert config.lora_init == "corda"
            return _corda(weight_OI, _checked(sums), rank, scaling)


def check_subspace(subspace: Subspace, modules: Iterable[str], config: Finetune) -> None:
    """See that adapters on `modules` can begin in a subspace.

    Raises:
        ConfigError: none of them makes keys or values that it is of, or it has too few directions.
    """
    found = {site: part for site, part in subspace.sites.items() if site.module in set(modules)}
    if not found:
        names = sorted({site.module.rpartition(".")[2] for site in subspace.sites})
        raise ConfigError(
            f"finetune.lora_init: spd is not valid with finetune.lora_targets={list(config.lora_targets)}, none of "
            f"which is a module of the subspace; add {' or '.join(names)}, or set finetune.lora_init=default"
        )
    least = min(part.basis_DR.shape[1] for part in found.values())
    if config.lora_rank > least:
        raise ConfigError(
            f"finetune.lora_rank: {config.lora_rank} is not valid with finetune.lora_init=spd, since the subspace has "
            f"{least} directions at a site; set finetune.lora_rank={least}, or raise project.rank"
        )


def begin_in_subspace_(up_OR: Tensor, sites: Mapping[KVSite, SiteSubspace]) -> None:
    """Write the strongest directions of a module's sites into its `up`, in turn where keys and values are one module.

    What is learned first is then, whatever the input, an output within the subspace.
    """
    up_OR.zero_()
    for number, (site, part) in enumerate(sorted(sites.items())):
        features = [index for start, stop in site.columns for index in range(start, stop)]
        chosen = range(number, up_OR.shape[1], len(sites))
        up_OR[torch.tensor(features)[:, None], torch.tensor(chosen)] = part.basis_DR[:, : len(chosen)].to(up_OR)


def is_taken_off(config: Finetune) -> bool:
    """Whether the adapters begin at a part of the weight, which a second one takes off."""
    return config.adapter_rank != config.lora_rank


def _normal(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def _checked(sums: InputSums | None) -> InputSums:
    assert sums is not None  # `reads_inputs` said so
    if not torch.isfinite(sums.moment_II).all():
        raise DataError("finetune.lora_init: a module's inputs are not finite; set finetune.lora_init=default")
    return sums


def _orthogonal(rank: int, num_in: int, num_out: int, generator: torch.Generator) -> Factors:
    """Rows of an orthogonal matrix, the odd ones below and the even ones above, so that the product is zero.

    https://datta0.github.io/posts/rethink-lora-init
    """
    basis, _ = torch.linalg.qr(_normal((rank, rank), generator))
    down_RI = (_normal((num_in, rank // 2), generator) @ basis[0::2]).T / 10
    up_OR = _normal((rank // 2, num_out), generator).T @ basis[1::2] / 10
    return Factors(down_RI, up_OR)


def _eva(sums: InputSums, rank: int) -> Tensor:
    """The directions of the largest variance of the inputs (arXiv 2410.07170), with one rank everywhere (rho = 1)."""
    _, vectors = torch.linalg.eigh(sums.scatter_II.double())
    down_RI = vectors[:, -rank:].flip(1).T
    largest = down_RI.abs().argmax(1, keepdim=True)  # the sign of an eigenvector is anyone's
    return (down_RI * down_RI.gather(1, largest).sign()).float()


def _leading(weight_OI: Tensor, rank: int, iterations: int | None, generator: torch.Generator) -> tuple[Tensor, ...]:
    """The leading singular triplets; with `iterations`, by as many steps of subspace iteration (arXiv 0909.4061)."""
    if iterations is None:
        left, value, right = torch.linalg.svd(weight_OI, full_matrices=False)
        return left[:, :rank], value[:rank], right[:rank]
    probe = _normal((weight_OI.shape[1], rank), generator).to(weight_OI.device)
    basis, _ = torch.linalg.qr(weight_OI @ probe)
    for _ in range(iterations):
        basis, _ = torch.linalg.qr(weight_OI.T @ basis)
        basis, _ = torch.linalg.qr(weight_OI @ basis)
    left, value, right = torch.linalg.svd(basis.T @ weight_OI, full_matrices=False)
    return basis @ left, value, right


def _split(left_OR: Tensor, value_R: Tensor, right_RI: Tensor, scaling: float) -> Factors:
    """Both factors with the root of the values (PiSSA, arXiv 2404.02948)."""
    root_R = (value_R / scaling).sqrt()
    return Factors(root_R[:, None] * right_RI, left_OR * root_R)


def _corda(weight_OI: Tensor, sums: InputSums, rank: int, scaling: float) -> Factors:
    """The leading part of weight @ covariance, with the covariance taken out again (arXiv 2406.05223, IPM)."""
    covariance_II, damping = sums.moment_II / sums.num_calls, 0.01
    unit_II = torch.eye(len(covariance_II), device=covariance_II.device) * covariance_II.diagonal().mean().clamp(1e-12)
    while True:  # the more of the unit matrix, the better it can be inverted
        damped_II = covariance_II + damping * unit_II
        inverse_II = torch.linalg.inv(damped_II)
        if torch.dist(damped_II @ inverse_II, torch.eye(len(damped_II), device=damped_II.device)) < 0.05:
            break
        damping *= 2
    left, value, right = torch.linalg.svd(weight_OI @ damped_II.to(weight_OI.device), full_matrices=False)
    return _split(left[:, :rank], value[:rank], right[:rank] @ inverse_II.to(weight_OI.device), scaling)
