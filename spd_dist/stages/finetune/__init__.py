"""Fine-tune the untouched policy on its own completions, next-token loss (paper, Eq. 14), on a DeepSpeed engine.

sequences   completions -> token sequences and their supervised part
plan        sequences -> steps -> micro-batches of each rank
batches     micro-batches as tensors
loop        a step; the loss over a held-out part
training    all epochs: schedule, checkpoints, stopping
checkpoints whole or absent, at any world size
export      the adapter or model, checked against the trained weights
"""

from spd_dist.stages.context import StageContext
from spd_dist.stages.finetune.train_student import finetune

__all__ = ["StageContext", "finetune"]
