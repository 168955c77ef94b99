"""Look at generated corpora: `python launchers/corpus.py stats|diff|show RUN_DIR [RUN_DIR/arms/psr]`.

The same as `spd corpus`; `--help` says more.
"""

import sys

from spd_dist.launch.show_corpus import main

if __name__ == "__main__":
    sys.exit(main())
