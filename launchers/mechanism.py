"""Does the subspace carry correctness? `deepspeed launchers/mechanism.py --config configs/NAME.yaml [key=value ...]`.

The same as `spd mechanism`; `--help` says more.
"""

import sys

from spd_dist.launch.measure_subspace import main

if __name__ == "__main__":
    sys.exit(main())
