"""`python -m spd_dist.launch NAME [ARGUMENTS]`, and what deepspeed's `--module` starts on every rank."""

import sys

from spd_dist.launch import main

if __name__ == "__main__":
    sys.exit(main())
