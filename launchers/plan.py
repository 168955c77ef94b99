"""Predict a run: `python launchers/plan.py --config YAML --nodes N --gpus-per-node G [section.key=value ...]`.

The same as `spd plan`; `--help` says more.
"""

import sys

from spd_dist.launch.plan_run import main

if __name__ == "__main__":
    sys.exit(main())
