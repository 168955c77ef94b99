"""Compare arms over seeds: `deepspeed launchers/experiment.py --config configs/experiments/NAME.yaml [key=value ...]`.

The same as `spd experiment`; `--help` says more.
"""

import sys

from spd_dist.launch.run_experiment import main

if __name__ == "__main__":
    sys.exit(main())
