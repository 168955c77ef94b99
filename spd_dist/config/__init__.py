"""Every setting: `sections.py` has a field a line, `whole.py` a run and an experiment, `rules.py` what ties them.

Importing this package imports no torch.
"""

from spd_dist.config.engines import Server, engine_of, planned_rows
from spd_dist.config.sections import (
    STAGES,
    Calibrate,
    Choices,
    Data,
    Distributed,
    Evaluate,
    Finetune,
    Generate,
    Mechanism,
    Metrics,
    Model,
    Project,
    Reduce,
    Sketch,
)
from spd_dist.config.whole import Config, Experiment

__all__ = [
    "STAGES",
    "Calibrate",
    "Choices",
    "Config",
    "Data",
    "Distributed",
    "Evaluate",
    "Experiment",
    "Finetune",
    "Generate",
    "Mechanism",
    "Metrics",
    "Model",
    "Project",
    "Reduce",
    "Server",
    "Sketch",
    "engine_of",
    "planned_rows",
]
