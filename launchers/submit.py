"""Submit to SLURM: `python launchers/submit.py KIND [options] --config configs/NAME.yaml [section.key=value ...]`.

The same as `spd submit`; `--help` says more.
"""

import sys

from spd_dist.launch.submit import main

if __name__ == "__main__":
    sys.exit(main())
