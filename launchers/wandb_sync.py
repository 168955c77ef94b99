"""Upload offline W&B runs, in order: `python launchers/wandb_sync.py RUN_DIR [RUN_DIR ...]`, where there is a network.

The same as `spd wandb_sync`; `--help` says more.
"""

import sys

from spd_dist.launch.wandb_tools import sync

if __name__ == "__main__":
    sys.exit(sync())
