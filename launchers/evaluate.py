"""Evaluate a model by itself: `python launchers/evaluate.py MODEL --tasks gsm8k mbpp [section.key=value ...]`.

The same as `spd evaluate`; `--help` says more.
"""

import sys

from spd_dist.launch.evaluate_model import main

if __name__ == "__main__":
    sys.exit(main())
