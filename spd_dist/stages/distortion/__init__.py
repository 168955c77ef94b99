"""How far projections move the policy, without sampling: rows with their reference answers, teacher-forced.

scoring      a row's likelihoods and divergence from the untouched policy
measurement  rows under many projections, on all ranks, kept as they come
matching     two projections at equal divergence
"""

from spd_dist.stages.distortion.matching import MatchSummary, Pair, at_share, blended, match, num_matching_passes
from spd_dist.stages.distortion.measurement import PARTS, VERSION, Measurement, Passes, Values, Variant, base

__all__ = [
    "PARTS", "VERSION", "MatchSummary", "Measurement", "Pair", "Passes", "Values", "Variant", "at_share", "base",
    "blended", "match", "num_matching_passes",
]  # fmt: skip
