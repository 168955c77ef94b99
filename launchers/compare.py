"""Compare capability subspaces: `python launchers/compare.py A B ... [--png FILE]`.

The same as `spd compare`; `--help` says more.
"""

import sys

from spd_dist.launch.compare import main

if __name__ == "__main__":
    sys.exit(main())
