"""Make the W&B dashboard of a run's project: `python launchers/dashboard.py RUN_DIR [--report] [--dry-run]`.

The same as `spd dashboard`; `--help` says more.
"""

import sys

from spd_dist.launch.wandb_tools import dashboard

if __name__ == "__main__":
    sys.exit(dashboard())
