"""Sweeps, a run a point: `python launchers/sweep.py plan|status|collect|words FILE`.

The same as `spd sweep`; `--help` says more.
"""

import sys

from spd_dist.launch.sweep import main

if __name__ == "__main__":
    sys.exit(main())
