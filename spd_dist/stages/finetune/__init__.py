"""Fine-tune the untouched policy on its own completions, next-token loss (paper, Eq. 14), on a DeepSpeed engine.

sequences       completions -> token sequences
batching        sequences -> steps -> micro-batches of each rank, as tensors
step            a step; the loss over a held-out part
training        all epochs: schedule, checkpoints, stopping
checkpoints     whole or absent, at any world size
student_export  the adapter or model, checked against the trained weights
train_student   the stage
"""

from spd_dist.stages.finetune.train_student import StudentSummary, finetune

__all__ = ["StudentSummary", "finetune"]
