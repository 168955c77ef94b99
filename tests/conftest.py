"""Property tests draw the same cases every time, and take as long as a busy machine needs; what is compiled is kept."""

import os
import sys

import pytest
from hypothesis import settings

# Tests start a hundred processes: one that compiles all of torch again, because the shell says so, takes 10 s longer.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

settings.register_profile("spd", deadline=None, derandomize=True, database=None)
settings.load_profile("spd")


@pytest.fixture(scope="module", autouse=True)
def no_world_is_left():
    """A process group that tests of one file joined in this process is none of the next file's."""
    yield
    if "torch.distributed" in sys.modules and sys.modules["torch.distributed"].is_initialized():
        from spd_dist.distributed.world import leave_world

        leave_world()
