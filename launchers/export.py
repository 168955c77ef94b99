"""Export a projected policy for other engines: `python launchers/export.py RUN_DIR --base MODEL_FOLDER --out FOLDER`.

The same as `spd export`; `--help` says more.
"""

import sys

from spd_dist.launch.export_policy import main

if __name__ == "__main__":
    sys.exit(main())
