"""Run Self-Policy Distillation: `deepspeed launchers/spd.py --config configs/NAME.yaml [section.key=value ...]`.

The same as `spd run`; `--help` says more.
"""

import sys

from spd_dist.launch.run_method import main

if __name__ == "__main__":
    sys.exit(main())
