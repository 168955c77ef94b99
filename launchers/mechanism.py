"""Does the subspace carry correctness? `deepspeed launchers/mechanism.py --config configs/NAME.yaml [key=value ...]`.

The same as `spd mechanism`; `--help` says more.
"""

import sys

from spd_dist.launch.run_method import measure

if __name__ == "__main__":
    sys.exit(measure())
