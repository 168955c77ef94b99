"""What is compared with what: the primary comparison, named before the run, and those that only explore."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from spd_dist.analysis.subspace_algebra import fix_signs
from spd_dist.config import Mechanism, Project
from spd_dist.errors import ConfigError, DataError
from spd_dist.mechanism.controls import (
    SPD,
    Material,
    control_subspace,
    directions_of,
    equal_energy_subspace,
    given,
    other_basis,
    random_subspace,
)
from spd_dist.stages.distortion import Variant
from spd_dist.stages.project import projection
from spd_dist.types import KVSite, SiteSubspace, Subspace, record_of

PRIMARY = "primary"


@dataclass(frozen=True)
class Comparison:
    """One way to project, in one form of the prompt."""

    name: str
    prompt: Literal["task", "bare"]
    kinds: Literal["key", "value", "both"]
    fraction: float | None
    operator: Literal["hard", "soft", "blend"]
    rho: float
    layers: tuple[int, ...] = ()
    """All of the subspace's if none is named."""
    num_random: int = 0

    @property
    def label(self) -> str:
        """In front of the names of its variants: nothing for the primary form of projecting."""
        return "" if self.name in (PRIMARY, f"prompt={self.prompt}") else f"{self.name}/"


def planned(config: Mechanism) -> list[Comparison]:
    """The primary comparison, then the others of the config.

    Raises:
        ConfigError: a word of `mechanism.explore` that is no change, or a prompt that is named twice.
    """
    if not config.prompts or len(set(config.prompts)) != len(config.prompts):
        raise ConfigError(f"mechanism.prompts: {list(config.prompts)} is not valid; name task, bare or both, each once")
    settings = (config.kinds, config.fraction, config.operator, config.rho)
    first, *others = config.prompts
    primary = Comparison(PRIMARY, first, *settings, num_random=config.num_random)
    explored = dataclasses.replace(primary, num_random=config.num_explored_random)
    prompts = [dataclasses.replace(explored, name=f"prompt={other}", prompt=other) for other in others]
    return [primary, *prompts, *(_explored(word, explored) for word in config.explore)]


def _explored(word: str, base: Comparison) -> Comparison:
    fields = vars(base) | {"name": word}
    for change in word.split("@"):
        key, _, value = change.partition("=")
        fields[key] = _value(word, key, value)
    return record_of(Comparison, fields)


def _value(word: str, key: str, value: str) -> Any:
    choices = {"kinds": ("key", "value", "both"), "operator": ("hard", "soft", "blend"), "prompt": ("task", "bare")}
    try:
        if key == "layers":
            return tuple(int(layer) for layer in value.split("+"))
        if key in ("fraction", "rho") and 0 <= float(value) <= 1:
            return float(value)
    except ValueError:
        pass
    if value in choices.get(key, ()):
        return value
    raise ConfigError(
        f"mechanism.explore: {word!r} is no comparison; write kinds=key|value|both, fraction=SHARE, "
        "operator=hard|soft|blend, rho=SHARE, layers=N+N or prompt=task|bare, several joined by @"
    )


def layers_of(comparisons: Sequence[Comparison]) -> set[int]:
    """Every layer that one of them names."""
    return {layer for one in comparisons for layer in one.layers}


def own_subspace(comparison: Comparison, material: Material) -> Subspace:
    """The method's subspace as a comparison has it: at its sites, and of its rank.

    Raises:
        DataError: the subspace has none of its sites.
    """
    found = material.spd
    sites = _sites(comparison, found, material.further)
    if not sites:
        raise DataError(
            f"mechanism: {comparison.name}: the subspace has no such site (it has {', '.join(map(str, found.sites))}); "
            "change mechanism.kinds, or calibrate other layers"
        )
    if comparison.fraction is not None:
        for site, part in sites.items():
            basis_DR = directions_of(found, given(material.calibration), site, _rank(comparison, site, part))
            sites[site] = dataclasses.replace(part, basis_DR=fix_signs(basis_DR).float(), num_null_directions=0)
    return Subspace(sites, found.metadata)


def check_other(comparison: Comparison, found: Subspace, other: Subspace) -> None:
    """See that another task's subspace has what the comparison needs of it.

    Raises:
        ConfigError: it has not.
    """
    for site, part in _sites(comparison, found, {}).items():
        other_basis(site, _rank(comparison, site, part), other)


def _sites(
    comparison: Comparison, found: Subspace, further: Mapping[KVSite, SiteSubspace]
) -> dict[KVSite, SiteSubspace]:
    """Those of the comparison's layers and kinds; unless it names layers, those that the run calibrated."""
    names = [comparison.kinds] if comparison.kinds != "both" else ["key", "value"]
    layers = comparison.layers or {site.layer for site in found.sites}
    every = {**found.sites, **further}
    return {site: part for site, part in every.items() if site.kind in names and site.layer in layers}


def _rank(comparison: Comparison, site: KVSite, part: SiteSubspace) -> int:
    return part.basis_DR.shape[1] if comparison.fraction is None else max(1, int(site.width * comparison.fraction))


@dataclass(frozen=True)
class Lineup:
    """The variants of one comparison."""

    own: Variant
    random: Mapping[str, Variant]
    others: Mapping[str, Variant]
    rank: Mapping[KVSite, int]

    def all(self) -> list[Variant]:
        """The method's own first."""
        return [self.own, *self.random.values(), *self.others.values()]


def lineup(comparison: Comparison, material: Material, config: Mechanism, seed: int) -> Lineup:
    """The method's subspace, the random ones of its rank, and the controls, each as a projection.

    The random ones of one number are the same directions in every comparison of equal sites and rank.

    Raises:
        UserError: as `own_subspace` and `control_subspace`.
    """
    own = own_subspace(comparison, material)

    def variant(name: str, subspace: Subspace) -> Variant:
        settings = Project(mode=comparison.operator, rho=comparison.rho)
        return Variant(comparison.prompt, comparison.label + name, projection(subspace, settings, seed))

    random = {f"random_{k:03d}": random_subspace(own, seed, k) for k in range(comparison.num_random)}
    others = {}
    if comparison.name == PRIMARY:
        others = {
            f"equal_energy_{k:03d}": equal_energy_subspace(own, given(material.calibration).activation, seed, k)
            for k in range(config.num_equal_energy)
        }
    others |= {
        name: control_subspace(name, own, material)
        for name in material.controls
        if comparison.name == PRIMARY or name == "activation_pca"
    }
    return Lineup(
        variant(SPD, own),
        {name: variant(name, one) for name, one in random.items()},
        {name: variant(name, one) for name, one in others.items()},
        {site: part.basis_DR.shape[1] for site, part in own.sites.items()},
    )
