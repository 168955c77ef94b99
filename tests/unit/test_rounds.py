"""What rounds refuse before anything is loaded."""

import pytest
import torch

from spd_dist.arms import Scope
from spd_dist.distributed.world import World
from spd_dist.errors import ConfigError
from spd_dist.overrides import load_config
from spd_dist.process.signals import StopSignals
from spd_dist.runs.rounds import run_rounds


def test_rounds_of_lora_students_in_bfloat16_are_refused(tmp_path):
    config = load_config([], ["rounds=2", "model.name=nowhere", f"run_dir={tmp_path / 'run'}"])
    on_a_gpu = World(0, 1, torch.device("cuda"))  # where the dtype that `auto` takes is known
    with pytest.raises(
        ConfigError, match=r"rounds: 2 is not valid with model.dtype=auto, here torch.bfloat16: .*=float32"
    ):
        run_rounds(config, on_a_gpu, StopSignals(), Scope())
    assert not (tmp_path / "run").exists()
