"""Push what a run made to the Hugging Face hub: `python launchers/push.py RUN_DIR PRODUCT OWNER/NAME`.

The same as `spd push`; `--help` says more.
"""

import sys

from spd_dist.launch.push_product import main

if __name__ == "__main__":
    sys.exit(main())
