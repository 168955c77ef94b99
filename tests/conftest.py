"""Property tests draw the same cases every time, and take as long as a busy machine needs; what is compiled is kept."""

import os
import sys

from hypothesis import settings

# Tests start a hundred processes: one that compiles all of torch again, because the shell says so, takes 10 s longer.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

settings.register_profile("spd", deadline=None, derandomize=True, database=None)
settings.load_profile("spd")
