"""What rounds refuse before anything is loaded."""

import pytest
from generating import ALONE

from spd_dist.arms import Scope
from spd_dist.errors import ConfigError
from spd_dist.overrides import load_config
from spd_dist.process.signals import StopSignals
from spd_dist.runs.rounds import run_rounds


def test_rounds_of_lora_students_in_bfloat16_are_refused(tmp_path):
    config = load_config([], ["rounds=2", "model.dtype=bfloat16", "model.name=nowhere", f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(ConfigError, match=r"rounds: 2 is not valid with model.dtype=bfloat16.* model.dtype=float32"):
        run_rounds(config, ALONE, StopSignals(), Scope())
    assert not (tmp_path / "run").exists()
