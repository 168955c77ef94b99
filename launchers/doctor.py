"""Check every node before a run, launched as the run: `deepspeed launchers/doctor.py --config ... [key=value ...]`.

The same as `spd doctor`; `--help` says more.
"""

import sys

from spd_dist.launch.doctor import main

if __name__ == "__main__":
    sys.exit(main())
