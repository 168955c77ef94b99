"""Stage 1, calibrate: the gradients of the masked loss at the KV sites.

gradient_rows  examples -> gradient rows, micro-batch by micro-batch
moments        the same rows with the activations beside them, as second moments that need no sketch
"""

from spd_dist.stages.calibrate.gradient_rows import calibrate
from spd_dist.stages.calibrate.moments import CalibrationMoments, Moments, gradient_moments, moments_to_rank

__all__ = ["CalibrationMoments", "Moments", "calibrate", "gradient_moments", "moments_to_rank"]
