"""Two projections at equal distortion: whichever moves the policy further is blended down to the other's mean KL."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from spd_dist.stages.distortion.measurement import Measurement, Passes, Variant
from spd_dist.types import Projection, SiteOperator

log = logging.getLogger(__name__)

TOLERANCE = 0.05
"""Largest relative difference between the two mean divergences."""
MAX_STEPS = 5
PILOT_SHARE = 4
"""The first guesses are tried on one batch in so many."""
LEAST_SHARE = 1e-3


def blended(projection: Projection, share: float) -> Projection:
    """Z -> (1 - share) z + share P z at every site: for a hard projection, `blend` with rho = 1 - share."""
    operators = {
        site: SiteOperator(1 - share + share * one.keep, one.factor_DR, share * one.weight_R)
        for site, one in projection.operators.items()
    }
    return Projection(operators, projection.insertion)


def at_share(variant: Variant, share: float) -> Variant:
    """The same variant, blended; whole at 1."""
    if share == 1 or variant.projection is None:
        return variant
    return dataclasses.replace(
        variant, name=f"{variant.name}~{share:.6f}", projection=blended(variant.projection, share)
    )


@dataclass(frozen=True)
class Pair:
    """The method's subspace and another at equal distortion."""

    own: Variant
    other: Variant
    share: float
    """Of the projection that the one that was blended keeps; 1 if neither was."""
    is_own_blended: bool
    own_kl: float
    other_kl: float

    @property
    def is_matched(self) -> bool:
        """Whether the two are as close as they must be."""
        return abs(self.own_kl - self.other_kl) <= TOLERANCE * min(self.own_kl, self.other_kl) + 1e-12


@dataclass(frozen=True)
class MatchSummary:
    """`match.json`: a random subspace, blended until it moves the policy as far as the method's own."""

    share: float
    """Of the random projection that is kept; 1 where it moves the policy less, and so cannot be matched."""
    kl: float
    """KL(base || the method's own), nats a token, mean over the rows."""
    random_kl: float
    """The same of the random one, as it is blended."""
    is_matched: bool
    num_rows: int


@dataclass
class _Search:
    """The share at which one variant's divergence is that of another."""

    loud: Variant
    target: float
    whole: float
    points: list[tuple[float, float]]
    """Shares and the divergences there on all rows, the latest last."""
    share: float = 1.0

    @property
    def is_done(self) -> bool:
        return abs(self.points[-1][1] - self.target) <= TOLERANCE * self.target or self.share <= LEAST_SHARE

    def guess(self, points: Sequence[tuple[float, float]], target: float) -> float:
        """Where a power law through the last two points meets the target; divergence grows as the square at first."""
        share, kl = points[-1]
        power = 2.0
        if len(points) > 1 and points[-2][0] != share and min(kl, points[-2][1]) > 0:
            power = (math.log(kl) - math.log(points[-2][1])) / (math.log(share) - math.log(points[-2][0]))
        power = min(8.0, max(0.5, power))
        found = share * (target / max(kl, 1e-30)) ** (1 / power)
        return round(min(1.0, max(LEAST_SHARE, found)), 6)


def num_matching_passes(num_others: int, num_rows: int) -> int:
    """Passes of a row that `match` takes, about: two guesses on a part of the batches and one on all."""
    return num_others * (num_rows + 2 * num_rows // PILOT_SHARE)


def match(measurement: Measurement, own: Variant, others: Mapping[str, Variant], batches: Sequence[int]) -> list[Pair]:
    """Each other subspace against the method's, in the order of `others`. A collective: all have been measured whole.

    First guesses are tried on a part of the batches; the last ones are measured on all.
    """
    own_kl = measurement.mean_kl(own, batches)
    searches: dict[str, _Search] = {}
    for name, other in others.items():
        kl = measurement.mean_kl(other, batches)
        loud, whole, target = (other, kl, own_kl) if kl >= own_kl else (own, own_kl, kl)
        searches[name] = _Search(loud, target, whole, [(1.0, whole)])
    _pilot(measurement, searches, batches)
    for _ in range(MAX_STEPS):
        left = [one for one in searches.values() if not one.is_done]
        if not left:
            break
        measurement.take([Passes(at_share(one.loud, one.share), batches) for one in left])
        for one in left:
            one.points.append((one.share, measurement.mean_kl(at_share(one.loud, one.share), batches)))
            if not one.is_done:
                one.share = one.guess(one.points, one.target)
    return [_pair(measurement, own, others[name], search, batches) for name, search in searches.items()]


def _pilot(measurement: Measurement, searches: Mapping[str, _Search], batches: Sequence[int]) -> None:
    """Two guesses each on some of the batches, as if the divergence there were in proportion to that on all."""
    few = batches[::PILOT_SHARE]
    left = [one for one in searches.values() if not one.is_done]
    points = {id(one): [(1.0, measurement.mean_kl(one.loud, few))] for one in left}
    for one in left:
        one.share = one.guess(points[id(one)], points[id(one)][0][1] * one.target / one.whole)
    if len(batches) < PILOT_SHARE:
        return
    for _ in range(2):
        measurement.take([Passes(at_share(one.loud, one.share), few) for one in left])
        for one in left:
            known = points[id(one)]
            known.append((one.share, measurement.mean_kl(at_share(one.loud, one.share), few)))
            one.share = one.guess(known, known[0][1] * one.target / one.whole)


def _pair(measurement: Measurement, own: Variant, other: Variant, search: _Search, batches: Sequence[int]) -> Pair:
    share, kl = min(search.points, key=lambda point: abs(point[1] - search.target))
    is_own = search.loud.key == own.key
    if is_own:
        pair = Pair(at_share(own, share), other, share, share != 1, kl, measurement.mean_kl(other, batches))
    else:
        pair = Pair(own, at_share(other, share), share, False, measurement.mean_kl(own, batches), kl)
    if not pair.is_matched:
        log.warning(
            "mechanism: %s is not at the KL of %s: %.4g, %.4g", other.name, own.name, pair.other_kl, pair.own_kl
        )
    return pair
