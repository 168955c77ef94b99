"""Every setting: `sections.py` and `side_sections.py` have a field a line, `whole.py` what ties their fields.

Importing this package imports no torch.
"""

from spd_dist.config.engines import Server, engine_of, planned_rows
from spd_dist.config.sections import (
    STAGES,
    Calibrate,
    Choices,
    Data,
    Evaluate,
    Finetune,
    Generate,
    Model,
    Project,
    Reduce,
    Sketch,
)
from spd_dist.config.side_sections import Distributed, Mechanism, Metrics
from spd_dist.config.whole import Config, Experiment, check_across_fields

__all__ = [
    "STAGES", "Calibrate", "Choices", "Config", "Data", "Distributed", "Evaluate", "Experiment", "Finetune",
    "Generate", "Mechanism", "Metrics", "Model", "Project", "Reduce", "Server", "Sketch", "check_across_fields",
    "engine_of", "planned_rows",
]  # fmt: skip
