"""Write a finished run's page again: `python launchers/report.py RUN_DIR [--against RUN_DIR] [--out FILE]`.

The same as `spd report`; `--help` says more.
"""

import sys

from spd_dist.launch.write_report import main

if __name__ == "__main__":
    sys.exit(main())
